"""Newborns with parts, what they are exported as, and what their updates keep off."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_export import batches, text_map
from test_parts import PARTS, config, grown
from torch import nn
from transformers import AutoModelForCausalLM

from close import assert_all_close
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, export_flat, find_experts
from peft_pcgrow.architectures.experts import expert_stacks
from tiny import (
    assert_same,
    build,
    contrast,
    domain,
    logits,
    mixed,
    snapshot,
    spawned,
    taken,
    train,
    trainable,
)


def newborns(name: str = "qwen3_moe", **changes) -> PeftModel:
    return spawned(name, **{"resolution": "matrix", "parts": PARTS, "locus": None, **changes})


# ---- newborns


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "implementation"),
    [("qwen3_moe", "eager"), ("qwen3_moe", "grouped_mm"), ("mixtral", "eager"), ("gpt_oss", "grouped_mm")],
)
def test_newborns(name, implementation, tmp_path):
    """Born as the base; after training, text that no gate lets pass has the base's bits; saved and loaded."""
    base = logits(build(name, implementation=implementation), mixed())
    model = newborns(name, implementation=implementation)
    assert torch.equal(logits(model, mixed()), base)
    train(model, lr=3e-2, texts=domain)
    after = logits(model, mixed())
    passed = torch.stack(list(taken(model, mixed()).values())).any(dim=0).cummax(dim=1).values
    assert 0 < int(passed.sum()) < passed.numel()
    assert torch.equal(after[~passed], base[~passed])
    assert (after != base).any(dim=-1)[passed].float().mean() > 0.5
    with pytest.raises(ValueError, match="has newborns"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name, implementation=implementation), tmp_path)
    assert torch.equal(logits(loaded, mixed()), after)
    loaded.base_model.set_gate_fpr(0.3)
    assert not torch.equal(logits(loaded, mixed()), after)


def test_gradients_of_newborns():
    found = {}
    for settle in ("sweep", "backprop"):
        model = newborns(dtype=torch.float64, settle=settle, gate_fpr=0.3).train()
        model(input_ids=domain(), labels=domain()).loss.backward()
        found[settle] = {name: p.grad for name, p in trainable(model).items()}
    assert all(gradient.any() for gradient in found["sweep"].values())
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_parts_of_what_is_left_out_are_dropped():
    """grow= may leave located nodes out, for which nothing may be asked of the adapter."""
    emap = copy.deepcopy(contrast())
    emap.separation.domain_rows[1, 4] = 0
    model = newborns(error_map=emap)
    assert model.peft_config["default"].parts == {
        "1": {"1": ["down_proj"]},
        "2": {"0": ["gate_up_proj"], "3": ["down_proj", "gate_up_proj"]},
    }


@pytest.mark.parametrize("whole", [True, False])
def test_a_newborn_needs_a_donor_that_stays(whole):
    """The rest of it would change with the adapter that deepens its donor: refused at creation and activation."""
    deepening = PCGrowConfig(locus={2: [3]}) if whole else config(parts={2: {3: ["down_proj"]}})
    asked = {"error_map": contrast(), "grow": "spawn", "gate_fpr": 0.05}
    model = get_peft_model(build(), deepening)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="the new adapter spawns parts of expert 3 of layer 2, whose other parts would"
    ):
        model.add_adapter("young", config(**asked))
    assert_same(before, snapshot(model))
    assert list(model.peft_config) == ["default"]
    other = newborns()
    other.add_adapter("deep", deepening)
    with pytest.raises(ValueError, match=r"'default' spawns parts of expert 3 of layer 2, .* adapter 'deep'"):
        other.base_model.set_adapter(["default", "deep"])
    assert other.active_adapters == ["default"]


def test_a_whole_newborn_of_a_donor_with_grown_parts():
    """It starts as a copy of the expert in use."""
    model = grown()
    train(model, lr=3e-2)
    before = logits(model, mixed())
    settings = {"error_map": contrast(), "grow": "spawn", "gate_fpr": 0.3, "locus": {1: [1], 2: [3]}}
    model.add_adapter("young", PCGrowConfig(**settings))
    model.base_model.set_adapter(["default", "young"])
    assert torch.equal(logits(model, mixed()), before)
    for layer, expert in zip(model.base_model.tuner_layers(), (1, 3), strict=True):
        for stack, weight in layer.bank("young").items():
            place = layer.grown["default"].index(expert)
            assert torch.equal(weight[0], layer.weights("default")[stack][place])


@pytest.mark.slow
def test_export(tmp_path):
    """A plain checkpoint holds newborns and what was deepened by parts, composed."""
    emap = copy.deepcopy(text_map("gpt_oss"))
    emap.separation.retain_rows[2, 3] = 0
    parts = {1: {1: ["down_proj"]}, 2: {3: ["down_proj"], 0: ["gate_up_proj"]}}
    settings = {"resolution": "matrix", "parts": parts, "gate_fpr": 0.3}
    model = get_peft_model(build("gpt_oss"), PCGrowConfig(error_map=emap, grow="auto", **settings))
    assert model.peft_config["default"].spawned == {"1": [1], "2": [0]}
    train(model, lr=3e-2, texts=domain)
    report = export_flat(model, tmp_path / "flat", batches())
    assert report.reload_difference == 0
    flat = AutoModelForCausalLM.from_pretrained(tmp_path / "flat")
    for site in find_experts(model).sites:
        written = next(found.base for found in find_experts(flat).sites if found.layer == site.layer)
        for stack, weight in expert_stacks(written).items():
            want = expert_stacks(site.base)[stack].detach().clone()
            if site.layer in (1, 2):
                held = site.module.weights("default")[stack]
                assert torch.equal(weight[8], held[0])
                if site.layer == 2:
                    want[3] = held[1]
                    assert stack not in trainable_stacks(site.module) or not torch.equal(held[1], weight[0])
            assert torch.equal(weight[:8], want)


def trainable_stacks(layer: nn.Module) -> set[str]:
    return set(layer.bank("default"))


# ---- protection


def muon(model):
    return create_pcgrow_optimizer(model, lr=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("make", [muon, lambda m: torch.optim.AdamW(trainable(m).values(), lr=1e-2)])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_protected(name, make, tmp_path):
    """Pieces move, and not along the main directions of what enters them, recomputed from the map's moments."""
    model = newborns(name, protect=0.6)
    start = {key: p.detach().clone() for key, p in trainable(model).items()}
    optimizer = make(model)
    for seed in range(3):
        model.train()(input_ids=domain(seed=seed), labels=domain(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    separation, along = contrast(name).separation, 0
    for site in find_experts(model).sites:
        for stack, parameter in site.module.bank("default").items() if hasattr(site.module, "births") else ():
            before = next(start[key] for key, p in trainable(model).items() if p is parameter)
            moved = parameter.detach() - before
            if stack.endswith("_bias"):
                assert not moved.any()
                continue
            row = contrast(name).layers.index(site.layer)
            owners = [e for e, listed in PARTS[site.layer].items() if stack in listed]
            for change, expert in zip(moved, owners, strict=True):
                moment = separation.moment[stack][row, expert].double()
                values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
                rank = int((values.flip(0).cumsum(0) / values.sum() < 0.6).sum()) + 1
                v = vectors.flip(1)[:, :rank].float()
                change = change.mT if site.base.is_transposed else change
                assert change.any(), (stack, expert)
                assert float((change @ v).norm() / change.norm()) < 1e-4
                along += rank
    assert along > 0
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True)
    for one, other in zip(model.base_model.tuner_layers(), loaded.base_model.tuner_layers(), strict=True):
        for stack in one.bank("default"):
            if not stack.endswith("_bias"):
                assert torch.equal(one.directions("default", stack), other.directions("default", stack))
                assert len(one.directions("default", stack)) == len(one.bank("default")[stack])
    assert torch.equal(logits(loaded, mixed()), logits(model, mixed()))


def test_a_matrix_protected_whole_stays():
    """Where the share takes all of its inputs, and no guard complains."""
    model = newborns(protect=0.999999, gate_fpr=0.3)
    layer = model.base_model.tuner_layers()[0]
    directions = layer.directions("default", "down_proj")
    assert directions.shape[1:] == (16, 16)
    full = directions.any(dim=1).all(dim=1)
    assert full.any()
    before = layer.bank("default")["down_proj"].detach().clone()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-2)
    model.train()(input_ids=domain(), labels=domain()).loss.backward()
    optimizer.step()
    assert torch.equal(layer.bank("default")["down_proj"].detach()[full], before[full])
