"""What inference computes with is made once per change of the weights, and nothing asks the device which rows it is."""

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from close import assert_close
from peft_pcgrow import PCGrowConfig
from peft_pcgrow.adapter import dispatch
from tiny import EXPERTS, HIDDEN, LOCUS, build, logits, tokens

aten = torch.ops.aten
ASKING = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
)


class Copies(TorchDispatchMode):
    """Counts casts of whole banks to bf16."""

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__()
        self.shapes, self.found = {weight.shape for weight in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._to_copy.default and args[0].shape in self.shapes:
            self.found += 1
        return func(*args, **(kwargs or {}))


class Unasked(TorchDispatchMode):
    """Fails where a result has a size, or a branch goes a way, that only the device knows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1])
        assert func not in ASKING, func
        assert not masked, "indexed by a mask"
        return func(*args, **(kwargs or {}))


def grown(**options) -> nn.Module:
    """fp32 banks on a bf16 base, away from their donors."""
    torch.manual_seed(3)
    model = get_peft_model(build(dtype=torch.bfloat16), PCGrowConfig(locus=LOCUS, init_weights=False, **options))
    return model.eval()


def banks(model: nn.Module) -> list[nn.Parameter]:
    return [weight for layer in model.base_model.tuner_layers() for weight in layer.bank("default").values()]


def held(model: nn.Module) -> list[int]:
    return [len(layer._working.held) for layer in model.base_model.tuner_layers()]


def test_cast_once_per_change():
    model = grown()
    weights = banks(model)
    assert {weight.dtype for weight in weights} == {torch.float32}
    with Copies(weights) as first:
        want = logits(model)
    assert first.found == len(weights)
    with Copies(weights) as again:
        assert torch.equal(logits(model), want)
    with torch.no_grad():
        weights[0].mul_(2)
    fresh = copy.deepcopy(model)
    with Copies(weights) as changed:
        found = logits(model)
    assert (again.found, changed.found) == (0, 2)  # a layer's stacks are cast together
    assert not torch.equal(found, want)
    assert torch.equal(found, logits(fresh))


def test_nothing_is_held_beyond_its_use():
    model = grown()
    logits(model)
    assert held(model) == [1, 1]
    assert held(copy.deepcopy(model)) == held(pickle.loads(pickle.dumps(model))) == [0, 0]
    model.train()
    assert held(model) == [0, 0]
    logits(model)
    model.to(torch.float32)
    assert held(model) == [0, 0]
    # of one type with the base, banks are used as they are
    logits(model)
    assert held(model) == [0, 0]


def test_gradients_pass_by():
    """In evaluation too: autograd's, and after a write that nothing counts (`.data`) the next inference is right."""
    model = grown(settle="backprop")
    logits(model)
    model(input_ids=tokens(), use_cache=False).logits.float().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in banks(model))
    assert held(model) == [0, 0]
    for weight in banks(model):
        weight.data.mul_(2)
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))


def test_parts_are_composed_once():
    parts = {"1": {"1": ["down_proj"], "4": ["gate_up_proj"]}}
    torch.manual_seed(3)
    options = {"resolution": "matrix", "parts": parts, "init_weights": False}
    model = get_peft_model(build(), PCGrowConfig(**options)).eval()
    (layer,) = model.base_model.tuner_layers()
    want = logits(model)
    (entry,) = layer._working.held.values()
    assert torch.equal(logits(model), want)
    assert next(iter(layer._working.held.values()))[1] is entry[1]
    for change in (layer.bank("default")["down_proj"], layer.base_layer.gate_up_proj):
        with torch.no_grad():
            change.mul_(1.5)
        found = logits(model)
        assert not torch.equal(found, want)
        assert torch.equal(found, logits(copy.deepcopy(model)))


def called(way: str, gated: bool) -> tuple:
    """What a layer's dispatch is called with: two branches, the second one's rows beside, or from, the first's."""
    base = build(implementation=way).get_decoder().layers[1].mlp.experts
    generator = torch.Generator().manual_seed(5)
    bank = {n: torch.randn(2, *p.shape[1:], generator=generator) for n, p in base.named_parameters()}
    other = {n: torch.randn(3, *p.shape[1:], generator=generator) for n, p in base.named_parameters()}
    passes = torch.rand(40, generator=generator) < 0.5 if gated else None
    chosen = ([1, 4], [4, 6, 7]) if gated else ([1, 4], [0, 6, 7])
    slots = [dispatch.slots(each, EXPERTS) for each in chosen]
    branches = [dispatch.Branch(slots[0], bank, passes), dispatch.Branch(slots[1], other)]
    index = torch.rand(40, EXPERTS, generator=generator).topk(3, dim=1).indices
    weight = torch.rand(40, 3, generator=generator)
    return base, branches, torch.randn(40, HIDDEN, generator=generator), index, weight


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("gated", [True, False])
def test_unasked_as_asked(way, gated):
    """The form for devices that are not to be asked, against the one that takes rows apart."""
    given = called(way, gated)
    with torch.no_grad():
        want = dispatch.run(*given, asking=True)
        with Unasked():
            found = dispatch.run(*given, asking=False)
        assert not torch.allclose(want, given[0](*given[2:]), atol=0.1)
    assert_close(way, found, want, "fp32")


class Counted(TorchDispatchMode):
    """How many operations torch is asked for."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_operations_of_a_token():
    """Decoding is as many calls as products: a grown layer adds few to the base's, fewer where no row is taken."""
    module, branches, *_ = called("grouped_mm", False)
    hidden, weight = torch.randn(2, HIDDEN), torch.rand(2, 2)
    counts = {}
    for kind, index in (("taken", [[1, 5], [2, 3]]), ("idle", [[2, 5], [2, 3]])):
        with Counted() as alone:
            module(hidden, torch.tensor(index), weight)
        with Counted() as both:
            dispatch.run(module, branches[:1], hidden, torch.tensor(index), weight)
        counts[kind] = both.found - alone.found
    assert counts["idle"] <= 8
    assert counts["idle"] < counts["taken"] <= 20


def test_the_watch_sees_questions():
    with pytest.raises(AssertionError), Unasked():
        dispatch.run(*called("grouped_mm", False), asking=True)


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
def test_rows_of_no_expert_are_zeros(way):
    base, branches, hidden, index, weight = called(way, False)
    index = index.masked_fill(index == 5, EXPERTS)
    weight = weight.masked_fill(index == EXPERTS, 0)
    for asking in (True, False):
        found = dispatch.run(base, branches, hidden, index, weight, asking=asking)
        want = dispatch.run(base, branches, hidden, index.masked_fill(index == EXPERTS, 5), weight, asking=True)
        assert_close(f"{asking}", found, want, "fp32")
