"""Sorting rows by their matrix, multiplying and adding them up again, against loops over rows."""

import pytest
import torch
from torch import Tensor

from close import assert_close
from pcgrow_kernels import grouped
from pcgrow_kernels.combine import combine_in_any_order
from pcgrow_kernels.remap import remap

# tokens, choices, experts, branches, grown matrices of each
SHAPES = {
    "usual": (37, 3, 8, 2, 3),
    "no rows": (0, 2, 4, 1, 2),
    "one row": (1, 1, 1, 1, 1),
    "one choice": (50, 1, 5, 1, 2),
    "one expert": (20, 2, 1, 1, 1),
    "most experts without rows": (5, 2, 4000, 3, 900),
    "no branch": (9, 2, 4, 0, 0),
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def routed(shape: str, sentinels: float = 0.2) -> tuple[Tensor, Tensor, Tensor, int]:
    """Index, taker, slots and G of a shape; some rows are nobody's."""
    tokens, choices, experts, branches, each = SHAPES[shape]
    index = torch.randint(experts, (tokens, choices))
    index = index.masked_fill(torch.rand(index.shape) < sentinels, experts)
    slots = torch.full((branches, experts), -1)
    for branch in range(branches):
        chosen = torch.randperm(experts)[: min(each, experts)]
        slots[branch, chosen] = each * branch + torch.arange(len(chosen))
    taker = torch.randint(-1, branches, (tokens, choices)) if branches else torch.full((tokens, choices), -1)
    held = torch.cat([slots, torch.zeros(1, experts, dtype=torch.long)])[taker, index.clamp(max=experts - 1)] >= 0
    return index, torch.where(held, taker, -1), slots, each * branches


def matrix_of(row: int, index: Tensor, taker: Tensor, slots: Tensor, grown: int) -> int:
    expert, branch = int(index.reshape(-1)[row]), int(taker.reshape(-1)[row])
    if expert >= slots.shape[1]:
        return grown + slots.shape[1]
    return grown + expert if branch < 0 else int(slots[branch, expert])


@shapes
@pytest.mark.parametrize("sentinels", [0.0, 0.2, 1.0])
def test_remap(shape, sentinels):
    index, taker, slots, grown = routed(shape, sentinels)
    matrices = [matrix_of(row, index, taker, slots, grown) for row in range(index.numel())]
    order, inverse, ends = remap(index, taker, slots, grown)
    # Python's sort is stable too
    assert order.tolist() == sorted(range(len(matrices)), key=matrices.__getitem__)
    assert [order[place] for place in inverse] == list(range(len(matrices)))
    assert ends.tolist() == [sum(m <= last for m in matrices) for last in range(grown + slots.shape[1])]
    assert (order.dtype, inverse.dtype, ends.dtype) == (torch.int64, torch.int64, torch.int32)


@pytest.mark.parametrize("shape", [shape for shape, (*_, branches, _) in SHAPES.items() if branches])
def test_without_takers(shape):
    """A grown matrix computes all rows of its expert, of which only one branch has one."""
    index, _, slots, grown = routed(shape)
    first = (slots >= 0).int().cumsum(0) == 1
    slots = slots.masked_fill(~first, -1)
    owner = torch.where((slots >= 0).any(0), (slots >= 0).int().argmax(0), -1)
    taker = owner[index.clamp(max=slots.shape[1] - 1)]
    for found, want in zip(remap(index, None, slots, grown), remap(index, taker, slots, grown), strict=True):
        assert torch.equal(found, want)


@shapes
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_in_any_order(shape, weighted, dtype):
    index, taker, slots, grown = routed(shape)
    order, inverse, _ = remap(index, taker, slots, grown)
    tokens, choices = index.shape
    rows, weight = torch.randn(index.numel(), 5).to(dtype), torch.rand(index.shape)
    want = torch.zeros(tokens, 5, dtype=torch.float64)
    for place, row in enumerate(order.tolist()):
        scale = float(weight.view(-1)[row]) if weighted else 1.0
        want[row // choices] += scale * rows[place].double()
    got = combine_in_any_order(rows, inverse.view(index.shape), weight if weighted else None)
    assert (got.dtype, got.shape) == (dtype, want.shape)
    if tokens:
        kind = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        assert_close("sums", got, want, kind)


# ---- products: what a GPU is given runs on a CPU too, as torch's own grouped product does


@pytest.fixture(params=["looped", "two products", "one stack"])
def way(request, monkeypatch):
    """Each way to multiply."""
    if request.param != "looped":
        monkeypatch.setattr(grouped, "_by_device", lambda x, other: len(x) > 0)
    return request.param


def groups(way: str, counts: list[int]) -> Tensor:
    """Ends of groups; several times as many rows where a stack is to be copied for them."""
    times = 40 if way == "one stack" else 1
    return torch.tensor(counts).mul(times).cumsum(0).to(torch.int32)


COUNTS = {"usual": [3, 0, 5, 0, 7, 2], "none grown": [0, 0, 0, 4, 1, 0], "all grown": [4, 2, 9, 0, 0, 0]}
counted = pytest.mark.parametrize("counts", COUNTS)
turning = pytest.mark.parametrize("turned", [True, False])
gathering = pytest.mark.parametrize("gathered", [True, False])


@counted
@turning
@gathering
def test_product(way, counts, turned, gathered):
    """Three matrices of each stack."""
    ends = groups(way, COUNTS[counts])
    rows = torch.randint(11, (int(ends[-1]),)) if gathered else None
    x = torch.randn(11 if gathered else int(ends[-1]), 8)
    first, second = (torch.randn(3, *((16, 8) if turned else (8, 16))) for _ in range(2))
    given, both = x if rows is None else x[rows], torch.cat([first, second])
    matrices = both.mT if turned else both
    place = torch.searchsorted(ends, torch.arange(len(given)), right=True)
    want = torch.stack([row.double() @ matrices[p].double() for row, p in zip(given, place, strict=True)])
    assert_close("both", grouped.product(x, (first, second), ends, turned, rows), want, "fp32")
    own = grouped.product(x, (first,), ends[:3], turned, rows)
    if ends[2]:
        assert_close("first", own[: ends[2]], want[: ends[2]], "fp32")


@counted
@turning
@gathering
def test_outer(way, counts, turned, gathered):
    """Rows past the last end are not read, and what no row met is zeros."""
    ends = groups(way, COUNTS[counts])
    total, held = int(ends[-1]), ends[:3]
    rows = torch.randint(11, (total,)) if gathered else None
    a, b = torch.randn(total, 8), torch.randn(11 if gathered else total, 16)
    a[held[-1] :] = float("nan")
    given, want, start = b if rows is None else b[rows], torch.zeros(3, 8, 16, dtype=torch.float64), 0
    for place, end in enumerate(held.tolist()):
        for row in range(start, end):
            want[place] += torch.outer(a[row].double(), given[row].double())
        start = end
    assert_close("gradient", grouped.outer(a, b, held, turned, rows), want.mT if turned else want, "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_rows(dtype):
    ends, stack = torch.zeros(4, dtype=torch.int32), torch.randn(2, 8, 16, dtype=dtype)
    made = grouped.product(torch.randn(0, 8, dtype=dtype), (stack, stack), ends, False)
    assert made.shape == (0, 16)
    assert not grouped.outer(torch.randn(0, 8, dtype=dtype), made, ends[:2], False).any()
