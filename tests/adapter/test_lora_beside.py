"""LoRA beside the grown experts is part of their adapter: it trains, saves, loads, switches and merges with it."""

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from test_bad_input import refused
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from close import assert_all_close, assert_close
from loaders import LOADERS
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, export_flat, measure_errors
from tiny import LOCUS, assert_same, backward, build, domain, logits, retain, snapshot, spawning, tokens, train


def lora(**changes) -> LoraConfig:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**{**settings, **changes})


def grown(name: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **settings) -> PeftModel:
    return get_peft_model(build(name, dtype), PCGrowConfig(**{"locus": LOCUS, "lora": lora(), **settings}))


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "lora_bias": False}, {"target_modules": "all-linear"}])
def test_loaders_restore_it(loader, changes, tmp_path):
    """Every loader gives the trained model's logits, bit for bit, and on the way PEFT warns of nothing."""
    build().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(peft_config|modify a model|second time|multiple adapters).*")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        plain = logits(base)
        model = get_peft_model(base, PCGrowConfig(locus=LOCUS, lora=lora(init_lora_weights=True, **changes)))
        assert torch.equal(logits(model), plain)
        train(model)
        assert all(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)
        model.save_pretrained(tmp_path / "adapter")
        loaded = LOADERS[loader](tmp_path / "base", tmp_path / "adapter")
    expected = logits(model)
    assert not torch.equal(expected, plain)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_gradients_are_autograds(name):
    targets = ["q_proj", "v_proj"] if name == "qwen3_moe" else ["q_b_proj", "o_proj"]
    found = {}
    for settle in ("sweep", "backprop"):
        torch.manual_seed(0)
        model = grown(name, torch.float64, settle=settle, lora=lora(target_modules=targets))
        found[settle] = backward(model)
    assert {".lora_" in key for key in found["sweep"]} == {True, False}
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@pytest.mark.slow
def test_disable_merge_and_unload():
    model, plain = grown(), logits(build())
    train(model)
    expected, banks = logits(model), {n: t for n, t in snapshot(model).items() if "experts.base_layer" in n}
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    assert_close("merged", logits(model), expected, "fp32")
    model.unmerge_adapter()
    assert_same(banks, {n: t for n, t in snapshot(model).items() if n in banks})
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "pcgrow" in name]
    assert_close("merged and unloaded", logits(merged), expected, "fp32")


@pytest.mark.slow
def test_several_adapters_take_turns():
    """Each adapter's LoRA is active with it alone, also after another was added or deleted."""
    alone = {}
    for name, locus in (("default", LOCUS), ("second", {0: [2]}), ("bare", {0: [5]})):
        torch.manual_seed(len(alone))
        settings = {} if name == "bare" else {"lora": lora()}
        alone[name] = get_peft_model(build(), PCGrowConfig(locus=locus, init_weights=False, **settings), name)
    torch.manual_seed(0)
    model = get_peft_model(build(), PCGrowConfig(locus=LOCUS, init_weights=False, lora=lora()))
    for seed, (name, locus) in enumerate((("second", {0: [2]}), ("bare", {0: [5]})), 1):
        torch.manual_seed(seed)
        settings = {} if name == "bare" else {"lora": lora()}
        model.add_adapter(name, PCGrowConfig(locus=locus, init_weights=False, **settings))
        assert torch.equal(logits(model), logits(alone["default"]))
        assert not any(p.requires_grad for n, p in model.named_parameters() if f".{name}." in n)
    for name in ("bare", "second", "default", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(alone[name]))
        trains = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
        assert trains == {name}
    model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), logits(alone["default"]))


def test_config_is_plain_json(tmp_path):
    """Also given as a dict, as YAML and the adapter's file give it; what PEFT resolved is what is stored."""
    given = PCGrowConfig(
        locus=LOCUS, lora={"r": 2, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {"q_proj": 8}}
    )
    model = get_peft_model(build(), given)
    model.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "adapter_config.json").read_text())["lora"]
    assert held["target_modules"] == ["q_proj", "v_proj"]
    assert held["r"] == 2
    again = PeftConfig.from_pretrained(tmp_path)
    assert again.lora.target_modules == {"q_proj", "v_proj"}
    assert again.lora.rank_pattern == {"q_proj": 8}
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0] == 8


@pytest.mark.slow
def test_trainer_resumes(tmp_path):
    """Two steps, a checkpoint and two more are four steps."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(64)]

    def run(steps: int, **resume) -> PeftModel:
        torch.manual_seed(0)
        model = grown(lora=lora(init_lora_weights=True))
        args = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        optimizer = create_pcgrow_optimizer(model, lr=0.01)
        Trainer(model=model, args=args, train_dataset=rows, optimizers=(optimizer, None)).train(**resume)
        return model

    whole = snapshot(run(4))
    run(2)
    assert_same(whole, snapshot(run(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))))


@pytest.mark.slow
def test_newborns_beside_it(tmp_path):
    """Maps, newborns and their export see the model with its LoRA."""
    model = get_peft_model(build("gpt_oss"), spawning("gpt_oss", router="branch"))
    model.add_adapter("deep", PCGrowConfig(locus={0: [7]}, lora=lora()))
    model.base_model.set_adapter(["default", "deep"])
    train(model, texts=domain)
    emap = measure_errors(model, [domain()], progress=False)
    with torch.no_grad():
        loss = model(input_ids=domain(), labels=domain()).loss
    assert emap.loss / emap.labels == pytest.approx(float(loss), rel=1e-5)
    report = export_flat(model, tmp_path / "flat", [domain(), retain()])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "flat")
    assert report.reload_difference == 0
    # nothing of the attention is approximated
    state = model.base_model.model.model.layers[0].self_attn.q_proj
    merged = state.base_layer.weight + state.get_delta_weight("deep")
    assert_close("q_proj", plain.model.layers[0].self_attn.q_proj.weight, merged, "fp32")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_lora_weights": "pissa"}, "writes to the base's weights"),
        ({"bias": "all"}, r"bias='all'\) does not hold beside grown experts"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save and trainable_token_indices are settings of PCGrowConfig"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "does not hold"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "does not hold"),
    ],
)
def test_settings_that_do_not_hold(changes, text):
    with pytest.raises(ValueError, match=text):
        PCGrowConfig(locus=LOCUS, lora=lora(**changes))


def test_one_lora_config_for_two_adapters():
    """And for plain LoRA before: PEFT writes into what it is given, and nothing of that is asked for."""
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(build(), lora)
    before = copy.deepcopy(vars(lora))
    model: Any = get_peft_model(build(), PCGrowConfig(locus={1: [1]}, lora=lora), adapter_name="a")
    model.add_adapter("b", PCGrowConfig(locus={2: [1]}, lora=lora))
    assert vars(lora) == before
    assert all(model.peft_config[name].lora.r == 2 for name in "ab")


def test_no_lora():
    with pytest.raises(TypeError, match=r"peft.LoraConfig or its settings as a dict, got str"):
        PCGrowConfig(locus=LOCUS, lora="q_proj")
    with pytest.raises(ValueError, match="settings that LoraConfig does not know: rank"):
        PCGrowConfig(locus=LOCUS, lora={"rank": 4})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lora": lora(target_modules=["absent"])}, "absent"),
        ({"lora": lora(), "locus": {7: [0]}}, "layer"),
        (
            {"lora": lora(target_modules=["up_proj"]), "nodes": "shared", "locus": {1: [0]}},
            "leave them out of its targets",
        ),
    ],
)
def test_refused_before_anything_changed(settings, text):
    model = build("qwen2_moe")
    with refused(model, ValueError, text):
        get_peft_model(model, PCGrowConfig(**{"locus": LOCUS, **settings}))


def test_targets_that_are_parameters():
    """PEFT takes the router's name for its weight, which LoRA would wrap together with what it routes to."""
    model = build()
    with refused(model, ValueError, r"parameters of experts or routers in this model \(gate.weight\)"):
        get_peft_model(model, PCGrowConfig(locus=LOCUS, lora=lora(target_modules=["q_proj", "gate"])))


def test_refused_beside_an_adapter():
    """An adapter that cannot be added leaves the one that is there, with its LoRA, as it was."""
    model = grown()
    before, expected = snapshot(model), logits(model)
    with pytest.raises(ValueError, match="absent"):
        model.add_adapter("second", PCGrowConfig(locus=LOCUS, lora=lora(target_modules=["absent"])))
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), expected)


def test_lora_of_another_tuner(tmp_path):
    """What trains beside and could not be restored is refused when it is saved; what is frozen is not ours to save."""
    plain = inject_adapter_in_model(lora(), build())
    with refused(plain, ValueError, r"carries LoRA already .*let PCGrowConfig\(lora=...\) create it"):
        get_peft_model(plain, PCGrowConfig(locus=LOCUS, lora=lora()))
    model = get_peft_model(plain, PCGrowConfig(locus=LOCUS))
    with pytest.raises(ValueError, match=r"lora_A.* trains beside adapter 'default' and belongs to another tuner"):
        model.save_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert all("pcgrow_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
