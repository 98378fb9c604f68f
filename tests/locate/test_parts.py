"""Parts of experts: which weights they are, their gradients, and that nothing else moves."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks, stack_inputs
from peft_pcgrow.locate.parts import compose, pieces_of, placed
from tiny import ARCHITECTURES, assert_same, build, logits, snapshot, tokens, train, trainable

BLOCK = 4
PARTS = {
    # layer 1 has no piece of the up projections, layer 2 all of expert 3
    "matrix": {1: {1: ["down_proj"], 4: ["down_proj"]}, 2: {0: ["gate_up_proj"], 3: ["gate_up_proj", "down_proj"]}},
    "neurons": {1: {1: [0, 2], 4: [3]}, 2: {0: [1], 3: [0, 1, 2, 3], 7: [2]}},
}
CASES = [(name, resolution) for name in ARCHITECTURES for resolution in PARTS]


def config(resolution: str, **changes) -> PCGrowConfig:
    return PCGrowConfig(**{"resolution": resolution, "parts": PARTS[resolution], "block": BLOCK, **changes})


def grown(name: str = "qwen3_moe", resolution: str = "neurons", **changes) -> PeftModel:
    settings = {key: changes.pop(key) for key in ("dtype", "implementation") if key in changes}
    return get_peft_model(build(name, **settings), config(resolution, **changes))


def pieces(model_name: str, stack: str, tensor: Tensor, chosen: dict[int, list], resolution: str) -> Tensor | None:
    """The slices `[B, ...]` of one layer's stack, or of its gradient, cut out by hand."""
    if resolution == "matrix":
        experts = [e for e, listed in chosen.items() if stack.removesuffix("_bias") in listed]
        return tensor[experts] if experts else None
    cut = []
    for expert, blocks in chosen.items():
        for block in blocks:
            neurons = list(range(BLOCK * block, BLOCK * (block + 1)))
            one = tensor[expert]
            if stack == "down_proj_bias":
                return None
            if model_name == "gpt_oss":  # input first; gate and up of a neuron beside one another
                both = [i for n in neurons for i in (2 * n, 2 * n + 1)]
                cut.append(one[neurons] if stack == "down_proj" else one[..., both])
            elif stack == "down_proj":
                cut.append(one[:, neurons])
            else:
                cut.append(torch.cat([one[neurons], one[len(one) // 2 :][neurons]]))
    return torch.stack(cut) if cut else None


def all_pieces(name: str, resolution: str, of: nn.Module, gradients: bool = False) -> dict[str, Tensor]:
    """What each bank parameter stands for in an untouched model: its weights or their gradients."""
    found = {}
    for site in find_experts(of).sites:
        for stack, weight in expert_stacks(site.base).items():
            chosen = PARTS[resolution].get(site.layer, {})
            cut = pieces(name, stack, weight.grad if gradients else weight.detach(), chosen, resolution)
            if chosen and cut is not None:
                found[f"base_model.model.{site.name}.pcgrow_{stack}.default.weight"] = cut
    return found


@pytest.mark.parametrize("settle", ["sweep", "backprop"])
@pytest.mark.parametrize(("name", "resolution"), CASES)
def test_gradients_are_the_sub_blocks_of_autograd(name, resolution, settle):
    base, ids = build(name, torch.float64), tokens()
    oracle = copy.deepcopy(base).train().requires_grad_(True)
    oracle(input_ids=ids, labels=ids).loss.backward()
    model = get_peft_model(base, config(resolution, settle=settle)).train()
    model(input_ids=ids, labels=ids).loss.backward()
    want = all_pieces(name, resolution, oracle, gradients=True)
    assert all(gradient.any() for gradient in want.values())
    assert_all_close({key: p.grad for key, p in trainable(model).items()}, want, "fp64 gradient")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("name", "resolution"), CASES)
def test_born_as_the_base(name, resolution, implementation):
    """Bits, and the strides that fast paths choose their products by."""
    base = build(name, implementation=implementation)
    before, state = logits(base), copy.deepcopy(base)
    model = get_peft_model(base, config(resolution))
    assert torch.equal(logits(model), before)
    held = dict(trainable(model))
    assert held.keys() == all_pieces(name, resolution, state).keys()
    for key, want in all_pieces(name, resolution, state).items():
        assert torch.equal(held[key], want), key
        assert held[key].is_contiguous()
    for layer in model.base_model.tuner_layers():
        for stack, weight in layer.weights("default").items():
            donor = expert_stacks(layer.base_layer)[stack]
            assert torch.equal(weight, donor[list(layer.grown["default"])])
            assert weight.stride() == donor[list(layer.grown["default"])].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "resolution"), CASES)
def test_only_the_pieces_move(name, resolution, dtype):
    """Merged after training, the base differs in every piece and nowhere else; unmerged, nowhere."""
    model = grown(name, resolution, dtype=dtype)
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
    inside = all_pieces(name, resolution, marked)
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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_neurons(name):
    """A trained block of the up projections changes what its own neurons say, and no other neuron's value."""
    model = grown(name, "neurons")
    train(model, steps=3, lr=3e-2)
    x = torch.randn(20, 32)
    bases = {site.layer: site.base for site in find_experts(build(name)).sites}
    model.merge_adapter()
    for site in find_experts(model).sites:
        for expert, blocks in PARTS["neurons"].get(site.layer, {}).items():
            before, after = (stack_inputs(base, x, expert)["down_proj"] for base in (bases[site.layer], site.base))
            changed = (before != after).any(dim=0).nonzero().flatten().tolist()
            assert changed == [BLOCK * block + i for block in blocks for i in range(BLOCK)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", ["none", "concatenated", "interleaved"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_layout(gate, transposed, bias):
    """Layouts that no tiny model has: random pieces written into zeros leave all but their neurons at zero."""
    e, h, i = 3, 5, 8
    shapes = {"up_proj": (i, h)} if gate == "none" else {"gate_up_proj": (2 * i, h)}
    shapes["down_proj"] = (h, i)
    split = {"interleaved": lambda y: (y[..., ::2], y[..., 1::2]), "concatenated": lambda y: y.chunk(2, dim=-1)}
    facts = {
        "num_experts": e,
        "has_gate": gate != "none",
        "has_bias": bias,
        "is_transposed": transposed,
        "is_concatenated": gate != "interleaved",
        "_apply_gate": lambda y: torch.stack(split[gate](y)).abs().sum(0),
        "act_fn": torch.abs,
    }
    base = nn.Module()
    base.__dict__.update(facts)
    for name, (rows, columns) in shapes.items():
        setattr(base, name, nn.Parameter(torch.zeros(e, *((columns, rows) if transposed else (rows, columns)))))
        if bias:
            setattr(base, f"{name}_bias", nn.Parameter(torch.zeros(e, rows)))
    found = pieces_of(base, {"0": [3], "2": [0, 1]}, "neurons", 2)
    assert found.keys() == {name for name in expert_stacks(base) if name != "down_proj_bias"}
    bank = {name: torch.rand_like(held.read(expert_stacks(base)[name])) + 1 for name, held in found.items()}
    sizes = {"up_proj": 2, "gate_up_proj": 4, "down_proj": 2}
    for name, values in bank.items():
        assert sorted(values.shape[1:]) == sorted([sizes[name.removesuffix("_bias")], h][: values.dim() - 1])
    slot = torch.tensor([0, -1, 1])
    weights = compose(base, (0, 2), placed(found, slot), bank)
    full = SimpleNamespace(**facts, **weights)
    for place, neurons in ((0, [6, 7]), (1, [0, 1, 2, 3])):
        inner = stack_inputs(full, torch.rand(4, h) + 1, place)["down_proj"]
        assert inner.any(dim=0).nonzero().flatten().tolist() == neurons
        down = weights["down_proj"][place]
        assert (down if transposed else down.mT).any(dim=1).nonzero().flatten().tolist() == neurons


def closed_form(resolution: str, hidden: int = 32, inner: int = 16) -> int:
    if resolution == "neurons":
        blocks = sum(len(blocks) for chosen in PARTS["neurons"].values() for blocks in chosen.values())
        return blocks * 3 * BLOCK * hidden
    sizes = {"gate_up_proj": 2 * inner * hidden, "down_proj": inner * hidden}
    return sum(sizes[n] for chosen in PARTS["matrix"].values() for listed in chosen.values() for n in listed)


@pytest.mark.parametrize("resolution", PARTS)
def test_counts(resolution, caplog):
    model = grown(resolution=resolution)
    assert model.get_nb_trainable_parameters()[0] == closed_form(resolution)
    with caplog.at_level("INFO", logger="peft_pcgrow"):
        train(model, steps=1)
    number, experts = {"neurons": (9, 5), "matrix": (5, 4)}[resolution]
    assert f"grows {number} parts (resolution={resolution!r}) of {experts} experts (0 of them" in caplog.text
    assert f"{closed_form(resolution):,} parameters" in caplog.text


@pytest.mark.parametrize("resolution", PARTS)
def test_all_parts_of_an_expert_are_the_expert(resolution):
    """locus= without parts= takes them all: the same losses as whole experts, and the same experts after."""
    losses, merged = [], []
    for given in ("expert", resolution):
        model = get_peft_model(
            build(dtype=torch.float64), PCGrowConfig(locus={1: [1, 4], 2: [3]}, resolution=given, block=8)
        )
        losses.append(torch.tensor(train(model)))
        merged.append(snapshot(model.merge_and_unload()))
    assert_close("losses", losses[1], losses[0], "fp64")
    assert_all_close(merged[1], merged[0], "fp64")


def muon(model):
    return create_pcgrow_optimizer(model, lr=0.02)


@pytest.mark.parametrize("resolution", PARTS)
@pytest.mark.parametrize("make", [muon, lambda m: torch.optim.AdamW(trainable(m).values(), lr=1e-2)])
def test_optimizers(resolution, make):
    """Every piece moves and the loss falls; Muon orthogonalises each piece by itself."""
    model, ids = grown(resolution=resolution), tokens(8)
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


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("resolution", PARTS)
def test_map_of_a_grown_model_is_that_of_the_merged_one(name, resolution):
    """Also in its summed weight gradients, of the whole experts, and without leaving anything behind."""
    model = grown(name, resolution, dtype=torch.float64)
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
        ({"resolution": "rows"}, "unknown resolution='rows'; choose from expert, matrix, neurons"),
        ({"resolution": "expert", "parts": {1: {0: [0]}}}, "resolution='expert' grows as a whole: use resolution="),
        ({"parts": {1: {0: [0]}}}, "resolution='expert' grows as a whole"),
        ({"resolution": "neurons", "parts": {1: {0: [0]}}, "locus": {1: [0]}}, "leave out locus="),
        ({"resolution": "neurons", "parts": {}}, "parts must map layer -> expert"),
        ({"resolution": "neurons", "parts": [1]}, "parts must map layer -> expert"),
        ({"resolution": "neurons", "parts": {1: {}}}, "layer 1 in parts must map experts"),
        ({"resolution": "neurons", "parts": {1: [0]}}, "layer 1 in parts must map experts"),
        ({"resolution": "neurons", "parts": {1: {0: []}}}, "layer 1, expert 0 in parts must list at least one part"),
        ({"resolution": "matrix", "parts": {1: {0: "down_proj"}}}, "expert 0 in parts must list at least one part"),
        ({"resolution": "matrix", "parts": {1: {0: [0]}}}, "must name weight stacks"),
        ({"resolution": "neurons", "parts": {1: {0: [1, 1]}}}, "names a part twice"),
        ({"resolution": "neurons", "parts": {1: {0: [1], "0": [2]}}}, "is there twice"),
        ({"resolution": "neurons", "parts": {1: {0: [-1]}}}, "block -1 in parts is not a whole number >= 0"),
        ({"resolution": "neurons", "parts": {1: {0: [1.5]}}}, "block 1.5 .*not a whole number >= 0"),
        ({"resolution": "neurons", "parts": {-1: {0: [1]}}}, "layer -1 .*not a whole number >= 0"),
        ({"resolution": "neurons", "block": 0}, "block must be a whole number from 1 to"),
        ({"resolution": "neurons", "block": 2.5}, "block must be a whole number from 1 to"),
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
        (
            {"resolution": "neurons", "parts": {1: {0: [4]}}, "block": 4},
            "has no block 4: its 16 .* blocks of 4, 0 to 3",
        ),
        (
            {"resolution": "neurons", "parts": {1: {0: [0]}}, "block": 5},
            "block=5 does not divide the 16 .*: 1, 2, 4, 8",
        ),
        ({"resolution": "neurons", "locus": {1: [0]}, "block": 32}, "block=32 does not divide the 16"),
        ({"resolution": "neurons", "parts": {3: {0: [0]}}}, "names layer 3, which has no experts"),
        ({"resolution": "neurons", "parts": {1: {8: [0]}}}, "names expert 8 of layer 1, but this model has only 8"),
        ({"resolution": "neurons"}, r"locus=\{layer: \[experts\]\} \(or parts=\)"),
    ],
)
def test_what_this_model_does_not_have(settings, text):
    model = build("gpt_oss" if "bias" in str(settings) else "qwen3_moe")
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        get_peft_model(model, PCGrowConfig(**settings))
    assert_same(before, snapshot(model))
