"""Muon's averages: kernel and definition against torch.optim's formula, written out in fp64."""

import pytest
import torch

from close import assert_close
from kernel_runs import CUDA, DTYPES, KIND, drawn, needs_triton, poisoned
from pcgrow_kernels import muon_pre as op
from pcgrow_kernels.dispatch import WIDEST

WAYS = pytest.mark.parametrize("way", [op.definition, pytest.param(op.by_triton, marks=needs_triton)])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 64), (1, 1, 1), (1, 2, WIDEST + 3), (0, 4, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
@WAYS
def test_averages_and_norms(way, dtype, shape, nesterov):
    """`dtype` is that of what is orthogonalised; gradient and momentum are in fp32."""
    gradient, momentum, beta = drawn(*shape), drawn(*shape), 0.95
    average = beta * momentum.double() + (1 - beta) * gradient.double()
    want = (1 - beta) * gradient.double() + beta * average if nesterov else average
    with poisoned():
        out = torch.empty(shape, dtype=dtype, device=gradient.device)
        norm = way(gradient, momentum, out, beta, nesterov)
    assert_close("momentum", momentum, average, "fp32")
    assert_close("direction", out, want, KIND[dtype])
    # of the rounded numbers, not of those that were rounded
    assert_close("norm", norm, out.double().square().sum((1, 2)).sqrt(), "fp32")


@WAYS
def test_strides(way):
    """Halves of a stack, every second row, transposed stacks; what lies beside them is left alone."""
    held = {name: drawn(2, 6, 10) for name in ("gradient", "momentum", "out")}
    views = {
        "upper half": lambda x: x[:, 3:],
        "in turns": lambda x: x[:, ::2],
        "columns in turns": lambda x: x[:, :, 1::2],
        "turned": lambda x: x.mT,
        "turned half": lambda x: x.mT[:, :5],
    }
    for name, view in views.items():
        mine = {key: x.clone() for key, x in held.items()}
        given = [view(mine[key]) for key in ("gradient", "momentum", "out")]
        plain = [x.clone(memory_format=torch.contiguous_format) for x in given]
        with poisoned():
            norm, want = way(*given, 0.9, True), op.definition(*plain, 0.9, True)
        for one, other in zip((norm, *given), (want, *plain), strict=True):
            assert_close(name, one, other, "fp32")
        for key in ("momentum", "out"):
            view(mine[key]).copy_(view(held[key]))
            assert torch.equal(mine[key], held[key]), name


@needs_triton
def test_both_stand_still_at_zero():
    """A matrix whose gradients were all zero has none of a norm: bits of zero, not what was there."""
    gradient, momentum = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    if CUDA:
        gradient, momentum = gradient.cuda(), momentum.cuda()
    with poisoned():
        out = torch.empty_like(gradient)
        norm = op.by_triton(gradient, momentum, out, 0.95, True)
    assert not out.any()
    assert not norm.any()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"of \(2, 3\), \(2, 3\), \(2, 3\): expected one shape \[N, O, I\]"):
        op.muon_pre(*(torch.zeros(2, 3) for _ in range(3)), 0.9)
