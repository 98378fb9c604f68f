"""export_flat with deepened experts, several adapters, further modules that train, and tied embeddings."""

import pytest
import torch
from peft import PeftModel
from test_export import bank_slice, batches, config, load, newborns, text_map, trained
from test_spawn_settings import changed_map
from torch import nn

from peft_pcgrow import PCGrowConfig, export_flat, find_experts
from tiny import EXPERTS, assert_same, build, domain, train


def assert_deepened(model: PeftModel, flat: nn.Module, nodes: dict[tuple[int, int], str]) -> None:
    """The checkpoint's first experts are the base's, but for nodes that an adapter deepened."""
    for mine, theirs in zip(find_experts(flat).sites, find_experts(model).sites, strict=True):
        assert torch.equal(mine.router.weight[:EXPERTS], theirs.router.weight)
        for expert in range(EXPERTS):
            base = {name: stack[expert] for name, stack in theirs.base.named_parameters()}
            adapter = nodes.get((mine.layer, expert))
            want = bank_slice(model, mine.layer, adapter, expert) if adapter else base
            assert_same(want, {name: stack[expert] for name, stack in mine.base.named_parameters()})
            assert adapter is None or not torch.equal(want["down_proj"], base["down_proj"])


@pytest.mark.slow
def test_auto_writes_deepened_experts(tmp_path):
    emap = changed_map(text_map("gpt_oss"), retain_rows={(1, 4): 0.0, (2, 3): 0.0})
    model = trained("gpt_oss", grow="auto", error_map=emap)
    assert newborns(model) == {0: [], 1: [("default", 1)], 2: [("default", 0), ("default", 7)], 3: []}
    assert export_flat(model, tmp_path / "flat", batches()).experts == EXPERTS + 2
    assert_deepened(model, load(tmp_path / "flat"), {(1, 4): "default", (2, 3): "default"})


def with_deepened(model: PeftModel) -> PeftModel:
    """And an adapter that deepens a newborn's donor and another expert."""
    model.add_adapter("deep", PCGrowConfig(locus={1: [newborns(model)[1][0][1], 0]}))
    model.set_adapter("deep")
    train(model, lr=3e-2, seed=9, texts=domain)
    model.base_model.set_adapter(["default", "deep"])
    return model


@pytest.mark.slow
def test_an_adapter_that_deepens(tmp_path):
    model = with_deepened(trained())
    (_, donor), _ = newborns(model)[1]
    export_flat(model, tmp_path / "flat", batches())
    assert_deepened(model, load(tmp_path / "flat"), {(1, donor): "deep", (1, 0): "deep"})


@pytest.mark.slow
def test_several_spawned_adapters(tmp_path):
    """Every newborn of every active adapter is an expert, those of the first listed first."""
    model = trained(budget=0.125, gate_fpr=0.02)
    donors = {layer: [found[0][1]] for layer, found in newborns(model).items()}
    model.add_adapter("other", config(locus=donors, budget=0.12, gate_fpr=0.3))
    model.set_adapter("other")
    train(model, lr=3e-2, seed=9, texts=domain)
    assert export_flat(model, tmp_path / "one", batches()).experts == EXPERTS + 1
    model.base_model.set_adapter(["other", "default"])
    assert export_flat(model, tmp_path / "two", batches()).experts == EXPERTS + 2
    for site in find_experts(load(tmp_path / "two")).sites:
        for place, adapter in enumerate(("other", "default"), EXPERTS):
            held = {name: stack[place] for name, stack in site.base.named_parameters()}
            assert_same(bank_slice(model, site.layer, adapter, donors[site.layer][0]), held)
        assert not torch.equal(site.router.weight[EXPERTS], site.router.weight[EXPERTS + 1])


@pytest.mark.slow
def test_further_modules(tmp_path):
    """What modules_to_save trained is part of what the model computes."""
    model = trained(modules_to_save=["lm_head"])
    export_flat(model, tmp_path / "flat", batches())
    want = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert not torch.equal(want, build().lm_head.weight)
    assert torch.equal(load(tmp_path / "flat").lm_head.weight, want)


@pytest.mark.slow
def test_tied_embeddings(tmp_path):
    model = trained(base={"tie_word_embeddings": True})
    assert export_flat(model, tmp_path / "flat", batches()).reload_difference == 0
    flat = load(tmp_path / "flat")
    assert flat.lm_head.weight is flat.model.embed_tokens.weight
    assert torch.equal(flat.lm_head.weight, model.get_base_model().lm_head.weight)
