"""Newborns with parts, what they are exported as, and what their updates keep off."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_export import batches, text_map
from test_parts import BLOCK, PARTS, config, grown
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, export_flat, find_experts
from peft_pcgrow.architectures.experts import expert_stacks, neuron_places
from peft_pcgrow.gates.directions import MomentSketch, main_directions
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

RESOLUTIONS = list(PARTS)


def newborns(resolution: str = "neurons", name: str = "qwen3_moe", **changes) -> PeftModel:
    given = {"resolution": resolution, "parts": PARTS[resolution], "block": BLOCK, "locus": None}
    return spawned(name, **{**given, **changes})


# ---- newborns


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("qwen3_moe", "eager"), ("qwen3_moe", "grouped_mm"), ("mixtral", "eager"), ("gpt_oss", "grouped_mm")],
)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_newborns(resolution, name, implementation, tmp_path):
    """Born as the base; after training, text that no gate lets pass has the base's bits; saved and loaded."""
    base = logits(build(name, implementation=implementation), mixed())
    model = newborns(resolution, name, implementation=implementation)
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


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_gradients_of_newborns(resolution):
    found = {}
    for settle in ("sweep", "backprop"):
        model = newborns(resolution, dtype=torch.float64, settle=settle, gate_fpr=0.3).train()
        model(input_ids=domain(), labels=domain()).loss.backward()
        found[settle] = {name: p.grad for name, p in trainable(model).items()}
    assert all(gradient.any() for gradient in found["sweep"].values())
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_parts_of_what_is_left_out_are_dropped():
    """grow= may leave located nodes out, for which nothing may be asked of the adapter."""
    emap = copy.deepcopy(contrast())
    emap.separation.domain_rows[1, 4] = 0
    model = newborns(error_map=emap)
    assert model.peft_config["default"].parts == {"1": {"1": [0, 2]}, "2": {"0": [1], "3": [0, 1, 2, 3], "7": [2]}}


@pytest.mark.parametrize("whole", [True, False])
def test_a_newborn_needs_a_donor_that_stays(whole):
    """The rest of it would change with the adapter that deepens its donor: refused at creation and activation."""
    deepening = PCGrowConfig(locus={2: [3]}) if whole else config("matrix", parts={2: {3: ["down_proj"]}})
    asked = {"error_map": contrast(), "grow": "spawn", "gate_fpr": 0.05}
    model = get_peft_model(build(), deepening)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="the new adapter spawns parts of expert 3 of layer 2, whose other parts would"
    ):
        model.add_adapter("young", config("neurons", **asked))
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


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_export(resolution, tmp_path):
    """A plain checkpoint holds newborns and what was deepened by parts, composed."""
    emap = copy.deepcopy(text_map("gpt_oss"))
    emap.separation.retain_rows[2, 3] = 0
    parts = {1: {1: ["down_proj"]}, 2: {3: ["down_proj"], 0: ["gate_up_proj"]}}
    if resolution == "neurons":
        parts = {1: {1: [0, 2]}, 2: {3: [1], 0: [3]}}
    settings = {"resolution": resolution, "parts": parts, "block": BLOCK, "gate_fpr": 0.3}
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


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_directions_of_some_inputs(share):
    """Of an exact moment, the main directions of those inputs alone; a sketch of few rows knows the same ones."""
    basis = torch.linalg.qr(torch.randn(40, 40)).Q
    x = torch.randn(300, 5) * 0.6 ** torch.arange(5) @ basis[:5]
    chosen = torch.tensor([3, 4, 5, 20, 21, 22, 30])
    want = main_directions(MomentSketch(7)(x[:, chosen]), float(x[:, chosen].square().sum()), share, MomentSketch(7))
    for dim in (40, 12):
        sketch = MomentSketch(dim)
        v = main_directions(sketch(x), float(x.square().sum()), share, sketch, chosen)
        assert v.shape == want.shape
        # the same span: directions themselves may turn
        assert_close("span", v @ v.mT, want @ want.mT, "fp32 ill-conditioned solve")
        assert v.shape[1] > 0


def test_directions_that_a_sketch_misses_are_spread_evenly():
    """White inputs, of which the sketch holds a fifth: a share of 40 equal inputs takes about as many directions."""
    x, sketch, chosen = torch.randn(4000, 80), MomentSketch(16), torch.arange(40)
    v = main_directions(sketch(x), float(x.square().sum()), 0.15, sketch, chosen)
    assert v.shape[0] == 40
    # of what the sketch holds alone, two directions are that share
    assert 4 <= v.shape[1] <= round(0.15 * 40)
    assert_close("V'V", v.mT @ v, torch.eye(v.shape[1]), "fp32")
    assert main_directions(sketch(0 * x), 0.0, 0.5, sketch, chosen).shape == (40, 0)


def muon(model):
    return create_pcgrow_optimizer(model, lr=0.02)


@pytest.mark.parametrize("make", [muon, lambda m: torch.optim.AdamW(trainable(m).values(), lr=1e-2)])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_protected(resolution, name, make, tmp_path):
    """Pieces move, and not along the main directions of what enters them, recomputed from the map's moments."""
    model = newborns(resolution, name, protect=0.6)
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
            for change, (expert, inputs) in zip(moved, owners(site, stack, resolution), strict=True):
                moment = separation.moment[stack][row, expert].double()[inputs][:, inputs]
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


def owners(site, stack: str, resolution: str) -> list[tuple[int, Tensor]]:
    """Expert and inputs of each slice of a bank."""
    chosen = PARTS[resolution][site.layer]
    if resolution == "matrix":
        return [
            (e, torch.arange(32 if stack != "down_proj" else 16)) for e, listed in chosen.items() if stack in listed
        ]
    nodes = [(e, torch.arange(BLOCK) + BLOCK * block) for e, blocks in chosen.items() for block in blocks]
    return nodes if stack == "down_proj" else [(e, torch.arange(32)) for e, _ in nodes]


def test_a_block_protected_whole_stays():
    """Where the share takes all of a small block's inputs its down projection stays, and no guard complains."""
    model = newborns(protect=0.9999, gate_fpr=0.3)
    layer = model.base_model.tuner_layers()[0]
    directions = layer.directions("default", "down_proj")
    assert directions.shape[1:] == (BLOCK, BLOCK)
    full = directions.any(dim=1).all(dim=1)
    assert full.any()
    before = layer.bank("default")["down_proj"].detach().clone()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-2)
    model.train()(input_ids=domain(), labels=domain()).loss.backward()
    optimizer.step()
    assert torch.equal(layer.bank("default")["down_proj"].detach()[full], before[full])


def test_neurons_of_the_down_bias():
    """It belongs to no block."""
    site = find_experts(build("gpt_oss")).sites[0]
    assert neuron_places(site.base, "down_proj_bias", torch.arange(4)) is None
