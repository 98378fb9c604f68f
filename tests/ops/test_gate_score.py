"""Scores of tokens along a gate's direction: kernel and definition against products in fp64."""

import pytest
import torch

from close import assert_close
from kernel_runs import DEVICE, DTYPES, drawn, needs_triton, poisoned
from pcgrow_kernels import gate_score as op
from pcgrow_kernels.dispatch import WIDEST

WAYS = pytest.mark.parametrize("way", [op.definition, pytest.param(op.by_triton, marks=needs_triton)])


# a batch of texts, tokens of no batch, one token, none; past a block
@pytest.mark.parametrize("shape", [(2, 5, 33), (7, 64), (1, 1, 1), (3, 0, 8), (2, WIDEST + 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@WAYS
def test_scores(way, dtype, shape):
    x, direction = drawn(*shape, dtype=dtype), drawn(shape[-1])
    with poisoned():
        found = way(x, direction)
    assert found.dtype == torch.float32
    # products of 16 bits are exact in fp32
    assert_close("scores", found.cpu(), x.cpu().double() @ direction.cpu().double(), "fp32")


@WAYS
def test_strides(way):
    """Tokens of a wider tensor, every second column, texts last; a direction that is a column."""
    x, direction = drawn(3, 4, 10), drawn(10, 2)[:, 1]
    want = x @ direction
    wide = torch.cat([x, x], dim=-1)[..., :10]
    for name, given in (
        ("wide", wide),
        ("spaced", x.repeat_interleave(2, -1)[..., ::2]),
        ("turned", x.mT.contiguous().mT),
    ):
        assert not given.is_contiguous(), name
        with poisoned():
            assert_close(name, way(given, direction), want, "fp32")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"a direction \(3,\) for tokens \(2, 4\): expected \[H\]"):
        op.gate_score(torch.zeros(2, 4, device=DEVICE), torch.zeros(3, device=DEVICE))
