"""Parts of experts: which weights they are, their gradients, and that nothing else moves."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks
from tiny import ARCHITECTURES, assert_same, build, logits, snapshot, tokens, train, trainable

# layer 1 has no piece of the up projections, layer 2 all of expert 3
PARTS = {1: {1: ["down_proj"], 4: ["down_proj"]}, 2: {0: ["gate_up_proj"], 3: ["gate_up_proj", "down_proj"]}}


def config(**changes) -> PCGrowConfig:
    return PCGrowConfig(**{"resolution": "matrix", "parts": PARTS, **changes})


def grown(name: str = "qwen3_moe", **changes) -> PeftModel:
    settings = {key: changes.pop(key) for key in ("dtype", "implementation") if key in changes}
    return get_peft_model(build(name, **settings), config(**changes))


def all_pieces(of: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """What each bank parameter stands for in an untouched model: its weights or their gradients."""
    found = {}
    for site in find_experts(of).sites:
        for stack, weight in expert_stacks(site.base).items():
            chosen = PARTS.get(site.layer, {})
            owners = [e for e, listed in chosen.items() if stack.removesuffix("_bias") in listed]
            if owners:
                held = weight.grad if gradients else weight.detach()
                found[f"base_model.model.{site.name}.pcgrow_{stack}.default.weight"] = held[owners]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "backprop"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_the_sub_blocks_of_autograd(name, settle):
    base, ids = build(name, torch.float64), tokens()
    oracle = copy.deepcopy(base).train().requires_grad_(True)
    oracle(input_ids=ids, labels=ids).loss.backward()
    model = get_peft_model(base, config(settle=settle)).train()
    model(input_ids=ids, labels=ids).loss.backward()
    want = all_pieces(oracle, gradients=True)
    assert all(gradient.any() for gradient in want.values())
    assert_all_close({key: p.grad for key, p in trainable(model).items()}, want, "fp64 gradient")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_born_as_the_base(name, implementation):
    """Bits, and the strides that fast paths choose their products by."""
    base = build(name, implementation=implementation)
    before, state = logits(base), copy.deepcopy(base)
    model = get_peft_model(base, config())
    assert torch.equal(logits(model), before)
    held = dict(trainable(model))
    assert held.keys() == all_pieces(state).keys()
    for key, want in all_pieces(state).items():
        assert torch.equal(held[key], want), key
        assert held[key].is_contiguous()
    for layer in model.base_model.tuner_layers():
        for stack, weight in layer.weights("default").items():
            donor = expert_stacks(layer.base_layer)[stack]
            assert torch.equal(weight, donor[list(layer.grown["default"])])
            assert weight.stride() == donor[list(layer.grown["default"])].stride()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_the_pieces_move(name, dtype):
    """Merged after training, the base differs in every piece and nowhere else; unmerged, nowhere."""
    model = grown(name, dtype=dtype)
    start = build(name, dtype)
    train(model, steps=4, lr=3e-2)
    before, apart = snapshot(model), logits(model)
    assert all(torch.equal(p, q) for p, q in zip(stacks(model), stacks(start), strict=True))
    model.merge_adapter()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(model), apart, rtol=tolerance, atol=tolerance)
    marked = copy.deepcopy(start)
    for site in find_experts(marked).sites:
        for weight in expert_stacks(site.base).values():
            # numbers in the place of weights, so that a piece says where it came from
            weight.data = torch.arange(weight.numel(), dtype=torch.float64).view(weight.shape)
    inside = all_pieces(marked)
    for site, origin in zip(find_experts(model).sites, find_experts(start).sites, strict=True):
        for stack, weight in expert_stacks(site.base).items():
            moved = (weight != expert_stacks(origin.base)[stack]).flatten()
            key = f"base_model.{site.name.removeprefix('base_model.')}.pcgrow_{stack}.default.weight"
            places = inside.get(key, torch.zeros(0)).long()
            outside = torch.ones_like(moved)
            outside[places.flatten()] = False
            assert not moved[outside].any(), (site.layer, stack)
            for place in places:
                assert moved[place.flatten()].any(), (site.layer, stack)
    model.unmerge_adapter()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), apart)


def stacks(model: nn.Module) -> list[Tensor]:
    return [weight for site in find_experts(model).sites for weight in expert_stacks(site.base).values()]


def closed_form(hidden: int = 32, inner: int = 16) -> int:
    sizes = {"gate_up_proj": 2 * inner * hidden, "down_proj": inner * hidden}
    return sum(sizes[n] for chosen in PARTS.values() for listed in chosen.values() for n in listed)


def test_counts(caplog):
    model = grown()
    assert model.get_nb_trainable_parameters()[0] == closed_form()
    with caplog.at_level("INFO", logger="peft_pcgrow"):
        train(model, steps=1)
    assert "grows 5 parts (resolution='matrix') of 4 experts (0 of them" in caplog.text
    assert f"{closed_form():,} parameters" in caplog.text


@pytest.mark.slow
def test_all_parts_of_an_expert_are_the_expert():
    """locus= without parts= takes them all: the same losses as whole experts, and the same experts after."""
    losses, merged = [], []
    for given in ("expert", "matrix"):
        model = get_peft_model(build(dtype=torch.float64), PCGrowConfig(locus={1: [1, 4], 2: [3]}, resolution=given))
        losses.append(torch.tensor(train(model)))
        merged.append(snapshot(model.merge_and_unload()))
    assert_close("losses", losses[1], losses[0], "fp64")
    assert_all_close(merged[1], merged[0], "fp64")


def muon(model):
    return create_pcgrow_optimizer(model, lr=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("make", [muon, lambda m: torch.optim.AdamW(trainable(m).values(), lr=1e-2)])
def test_optimizers(make):
    """Every piece moves and the loss falls; Muon orthogonalises each piece by itself."""
    model, ids = grown(), tokens(8)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer, losses = make(model), []
    model.train()
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if not losses and make is muon:
            alone = {name: p.grad.clone() for name, p in trainable(model).items()}
        optimizer.step()
        if not losses and make is muon:
            for name, p in trainable(model).items():
                for place, gradient in enumerate(alone[name]):
                    single = nn.Parameter(before[name][place].clone())
                    single.grad = gradient
                    type(optimizer)([single]).step()
                    assert_close(name, p.detach()[place], single.detach(), "fp32")
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, p in trainable(model).items():
        assert (p != before[name]).flatten(1).any(dim=1).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_map_of_a_grown_model_is_that_of_the_merged_one(name):
    """Also in its summed weight gradients, of the whole experts, and without leaving anything behind."""
    model = grown(name, dtype=torch.float64)
    train(model, lr=3e-2)
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    apart = measure_errors(model, [tokens()], progress=False)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    merged = measure_errors(model.merge_and_unload(), [tokens()], progress=False)
    assert_close("mass", apart.mass, merged.mass, "fp64 gradient")
    assert_all_close(apart.gradient, merged.gradient, "fp64 gradient")
    assert all(gradient.any() for gradient in merged.gradient.values())


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"resolution": "rows"}, "unknown resolution='rows'; choose from expert, matrix"),
        (
            {"resolution": "expert", "parts": {1: {0: [0]}}},
            "'expert' grows as a whole: use resolution='matrix'",
        ),
        ({"parts": {1: {0: [0]}}}, "resolution='expert' grows as a whole"),
        ({"resolution": "matrix", "parts": {1: {0: ["down_proj"]}}, "locus": {1: [0]}}, "leave out locus="),
        ({"resolution": "matrix", "parts": {}}, "parts must map layer -> expert"),
        ({"resolution": "matrix", "parts": [1]}, "parts must map layer -> expert"),
        ({"resolution": "matrix", "parts": {1: {}}}, "layer 1 in parts must map experts"),
        ({"resolution": "matrix", "parts": {1: [0]}}, "layer 1 in parts must map experts"),
        ({"resolution": "matrix", "parts": {1: {0: []}}}, "layer 1, expert 0 in parts must list at least one part"),
        ({"resolution": "matrix", "parts": {1: {0: "down_proj"}}}, "expert 0 in parts must list at least one part"),
        ({"resolution": "matrix", "parts": {1: {0: [0]}}}, "must name weight stacks"),
        ({"resolution": "matrix", "parts": {1: {0: ["a", "a"]}}}, "names a part twice"),
        ({"resolution": "matrix", "parts": {1: {0: ["a"], "0": ["b"]}}}, "is there twice"),
        ({"resolution": "matrix", "parts": {-1: {0: ["a"]}}}, "layer -1 .*not a whole number >= 0"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        PCGrowConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"resolution": "matrix", "parts": {1: {0: ["up_proj"]}}},
            "no matrix 'up_proj'; choose from down_proj, gate_up",
        ),
        (
            {"resolution": "matrix", "parts": {1: {0: ["down_proj_bias"]}}},
            "no matrix 'down_proj_bias'.* bias goes with",
        ),
        ({"resolution": "matrix", "parts": {3: {0: ["down_proj"]}}}, "names layer 3, which has no experts"),
        (
            {"resolution": "matrix", "parts": {1: {8: ["down_proj"]}}},
            "names expert 8 of layer 1, but this model",
        ),
        ({"resolution": "matrix"}, r"locus=\{layer: \[experts\]\} \(or parts=\)"),
    ],
)
def test_what_this_model_does_not_have(settings, text):
    model = build("gpt_oss" if "bias" in str(settings) else "qwen3_moe")
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        get_peft_model(model, PCGrowConfig(**settings))
    assert_same(before, snapshot(model))
