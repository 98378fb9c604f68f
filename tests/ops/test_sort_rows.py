"""Counting sort of routed rows: kernel and definition against Python's own stable sort."""

import pytest
import torch

from kernel_runs import DEVICE, needs_triton, poisoned
from pcgrow_kernels import sort_rows as op


# rows, keys: many of each key; more keys than rows; one key; a power of two of them; blocks of one row; none
@pytest.mark.parametrize(("rows", "keys"), [(700, 5), (9, 40), (300, 1), (600, 64), (5, 20000), (0, 3)])
@pytest.mark.parametrize("way", [op.definition, pytest.param(op.by_triton, marks=needs_triton)])
def test_sorts(way, rows, keys):
    """Some rows are nobody's; of five keys or more, one has no row."""
    key = torch.randint(0, keys + 1, (rows,)).cpu()
    key[key == 2] = keys
    with poisoned():
        order, inverse, ends = way(key.to(DEVICE), keys)
    want = sorted(range(rows), key=key.tolist().__getitem__)
    assert order.tolist() == want
    assert [want[place] for place in inverse.tolist()] == list(range(rows))
    assert (order.dtype, inverse.dtype, ends.dtype) == (torch.int64, torch.int64, torch.int32)
    below = torch.bincount(key, minlength=keys + 1).cumsum(0)[:keys]
    assert torch.equal(ends.cpu(), below.int())
    assert ends.is_contiguous()


@needs_triton
def test_one_key_for_all():
    key = torch.full((520,), 3, device=DEVICE)
    order, inverse, ends = op.by_triton(key, 4)
    assert order.tolist() == inverse.tolist() == list(range(520))
    assert ends.tolist() == [0, 0, 0, 520]


@needs_triton
def test_strides():
    key = torch.randint(0, 7, (50, 2), device=DEVICE)[:, 1]
    for one, other in zip(op.by_triton(key, 7), op.definition(key.clone(), 7), strict=True):
        assert torch.equal(one, other)
