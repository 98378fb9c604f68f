"""A run that goes on from an earlier run's adapters: another domain, and what it leaves alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from short_runs import Interrupt, banks, run, text

from peft_pcgrow import load_grown
from peft_pcgrow.maps.resume import weights_in_use
from peft_pcgrow.rounds.one_round import losses_of
from peft_pcgrow.rounds.texts import read_texts
from tiny import DOMAIN_WORDS, RETAIN_WORDS, assert_same, build, logits, mixed, snapshot


def second() -> dict[str, torch.Tensor]:
    """What was the retain text becomes the domain, and the first domain is retained."""
    return {
        "train_on": text(RETAIN_WORDS, 64, 11),
        "heldout": text(RETAIN_WORDS, 16, 12),
        "retain": text(DOMAIN_WORDS, 128, 13),
    }


@pytest.mark.slow
def test_a_second_domain_grows_on_the_first(tmp_path):
    first = run(tmp_path / "a", max_steps=6)
    base = load_grown(build(), tmp_path / "a/adapter")
    before = snapshot(base)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", base, callbacks=[Interrupt(2)], **second())
    assert (list(base.peft_config), list(base.active_adapters)) == (["default"], ["default"])
    assert_same(before, snapshot(base))
    result = run(tmp_path / "b", base, **second())
    assert [done.adapter for done in result.rounds if done.kept] == ["round-2"]
    assert result.gain > 0.1
    assert result.forgetting <= 0.02
    mine = banks(result.model)
    assert_same({name: mine[name] for name in banks(first.model)}, banks(first.model))
    assert not any(p.requires_grad for p in result.model.parameters())
    loaded = load_grown(load_grown(build(), tmp_path / "a/adapter"), tmp_path / "b/adapter")
    given = second()
    texts = read_texts(given["train_on"], given["heldout"], given["retain"], None, 24, 8)
    assert losses_of(loaded, texts, 8) == result.after
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        load_grown(loaded, tmp_path / "a/adapter")
    with pytest.raises(ValueError, match="holds a run with weights="):
        run(tmp_path / "b", build(), **second())


@pytest.mark.slow
def test_taken_back_where_there_were_adapters(tmp_path):
    run(tmp_path / "a", max_steps=2)
    base = load_grown(build(), tmp_path / "a/adapter")
    before = snapshot(base)
    result = run(tmp_path / "b", base, max_forgetting=-10.0, max_steps=2, **second())
    assert not result.rounds[0].kept
    assert (list(result.model.peft_config), list(result.model.active_adapters)) == (["default"], ["default"])
    assert_same(before, snapshot(result.model))
    assert result.adapter is None


@pytest.mark.slow
def test_goes_on_where_a_run_was_taken_back_before(tmp_path):
    """Also where that had grown in layers, and LoRA beside, that no earlier adapter is in: the model is as it was."""
    first = run(tmp_path / "a", budget=0.5, config={"protect": 0.0, "layers_to_transform": [1]})
    assert [*first.model.peft_config["default"].locus] == ["1"]
    base = first.model
    beside = {"protect": 0.0, "lora": LoraConfig(r=2, target_modules=["q_proj"])}
    before, weights = logits(base, mixed()), weights_in_use(base)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", base, callbacks=[Interrupt(2)], config=beside, max_forgetting=-10.0, **second())
    assert weights_in_use(base) == weights
    result = run(tmp_path / "b", base, config=beside, max_forgetting=-10.0, **second())
    assert not result.rounds[0].kept
    assert weights_in_use(result.model) == weights
    assert torch.equal(logits(result.model, mixed()), before)
    again = run(tmp_path / "b", result.model, config=beside, max_forgetting=-10.0, **second())
    assert again.after == result.after


def test_refuses_adapters_of_others(tmp_path):
    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    for call in (lambda: run(tmp_path / "new", model), lambda: load_grown(model, tmp_path)):
        with pytest.raises(TypeError, match="adapters 'default' that no run of grow made"):
            call()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_rounds_of_another_run_are_no_parents(tmp_path):
    """Though nothing tells their first rounds apart but how long they were trained."""
    for name, steps in (("a", 4), ("b", 8)):
        run(tmp_path / name, max_steps=steps, rounds=2, lr=0.05)
    first = load_grown(build(), tmp_path / "a/adapter", ["default"])
    with pytest.raises(ValueError, match="not active here: load that one first"):
        load_grown(first, tmp_path / "b/adapter", ["round-2"])
    assert list(first.active_adapters) == ["default"]


@pytest.mark.slow
def test_loading_is_of_all_rounds_or_none(tmp_path):
    run(tmp_path, max_steps=6, rounds=2)
    file = tmp_path / "adapter/round-2/adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    base = build()
    before, want = snapshot(base), logits(base, mixed())
    for _ in range(2):
        with pytest.raises(SafetensorError):
            load_grown(base, tmp_path / "adapter")
        assert_same(before, snapshot(base))
    assert torch.equal(logits(base, mixed()), want)
    file.write_bytes(whole)
    assert len(load_grown(base, tmp_path / "adapter").peft_config) == 2
