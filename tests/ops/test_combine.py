"""Weighted sums of routed rows: kernel and definition against loops over tokens in fp64, and the order of the sums."""

import mmap
import sys

import pytest
import torch
from torch import Tensor

from close import assert_close
from kernel_runs import DEVICE, DTYPES, KIND, autograd, drawn, in_fp64, needs_triton, poisoned
from pcgrow_kernels import combine as op
from pcgrow_kernels.dispatch import WIDEST

# tokens, choices, width: more choices than running sums; one of all; widths around a power of two, and past a block
SHAPES = [(5, 8, 33), (3, 6, 64), (4, 3, 7), (1, 1, 1), (2, 2, WIDEST + 5)]


def loop(y: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    rows = [
        sum((weight[t, k] * y[inverse[t, k]] for k in range(inverse.shape[1])), torch.zeros_like(y[0]))
        for t in range(len(inverse))
    ]
    return torch.stack(rows)


def made(tokens: int, choices: int, width: int, dtype: torch.dtype = torch.float32, spaced: bool = False) -> list:
    inverse = torch.randperm(tokens * choices).view(tokens, choices).to(DEVICE)
    return [drawn(len(inverse.view(-1)), width, dtype=dtype, spaced=spaced), inverse, drawn(tokens, choices).to(dtype)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [op.definition, pytest.param(op.Combined.apply, marks=needs_triton)])
def test_sums_and_gradients(way, dtype, shape):
    inputs, error = made(*shape, dtype=dtype), drawn(shape[0], shape[2], dtype=dtype)
    want = autograd(loop, error.cpu().double(), *in_fp64(*inputs))
    with poisoned():
        found = autograd(way, error, *inputs)
    for name, one, other in zip(("sum", "dy", "dw"), found, want, strict=True):
        assert one.dtype == dtype
        assert_close(name, one.cpu(), other, KIND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [op.definition, pytest.param(op.Combined.apply, marks=needs_triton)])
def test_without_weights(way, dtype):
    (y, inverse, weight), error = made(5, 6, 33, dtype), drawn(5, 33, dtype=dtype)
    want = autograd(lambda y: loop(y, inverse.cpu(), torch.ones_like(weight.cpu())), *in_fp64(error, y))
    with poisoned():
        found = autograd(lambda y: way(y, inverse), error, y)
    for name, one, other in zip(("sum", "dy"), found, want, strict=True):
        assert_close(name, one.cpu(), other, KIND[dtype])


@needs_triton
def test_order_of_the_sums():
    """Four running sums of every fourth row, as torch's on CUDA: the same bits, not only the same numbers."""
    y, inverse, weight = made(6, 7, 50)
    parts = (y[inverse] * weight.unsqueeze(-1)).unbind(1)
    sums = [parts[k] + parts[k + 4] if k < 3 else parts[k] for k in range(4)]
    with poisoned():
        found = op.Combined.apply(y, inverse, weight)
    assert torch.equal(found, sums[0] + sums[1] + sums[2] + sums[3])
    assert not torch.equal(found, sum(parts[1:], parts[0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("wider", [False, True])
@pytest.mark.parametrize("choices", [1, 2, 6, 8, 10])
def test_bits_of_the_definition(choices, wider):
    y, inverse, weight = made(300, choices, 2048, torch.bfloat16)
    weight = weight.float() if wider else weight
    assert torch.equal(op.Combined.apply(y, inverse, weight), op.definition(y, inverse, weight))


@needs_triton
@pytest.mark.parametrize("spaced", [False, True])
def test_strides(spaced):
    """Rows in no piece, rows with room between, weights and places turned, an error that is one row for all."""
    y, inverse, weight = made(4, 3, 10, spaced=spaced)
    room = torch.cat([y, y], dim=1)[:, :10]
    turned = [inverse.mT.contiguous().mT, weight.mT.contiguous().mT]
    error = drawn(1, 1).expand(4, 10)
    want = autograd(op.definition, error, y, inverse, weight)
    with poisoned():
        for one, other in zip(autograd(op.Combined.apply, error, room, *turned), want, strict=True):
            assert_close("turned", one, other, "fp32")


@needs_triton
@pytest.mark.parametrize(("tokens", "width"), [(0, 5), (3, 0)])
def test_nothing(tokens, width):
    inputs = made(tokens, 2, width)
    out, dy, dw = autograd(op.Combined.apply, drawn(tokens, width), *inputs)
    assert (out.shape, dy.shape, dw.shape) == ((tokens, width), (tokens * 2, width), (tokens, 2))
    assert not dw.any()


@needs_triton
def test_rows_far_apart():
    """Places beyond 2^31: three rows in 8 GB of address space, of which the pages that hold them are used."""
    apart = 2**30 + 16
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < 9 * 2**30:
            pytest.skip("needs 9 GB of free memory on the GPU")
        held = torch.empty(2 * apart + 8, device=DEVICE)
    else:
        if sys.platform != "linux":
            pytest.skip("needs memory that is taken only where it is used: Linux")
        # the last is MAP_NORESERVE, which Python names from 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        held = torch.frombuffer(mmap.mmap(-1, 4 * (2 * apart + 8), flags=flags), dtype=torch.float32)
    y = held.as_strided((3, 8), (apart, 1))
    y.copy_(drawn(3, 8))
    inverse, weight = torch.tensor([[2, 0, 1]], device=DEVICE), drawn(1, 3)
    error = drawn(1, 8)
    want = autograd(op.definition, error, y.clone(), inverse, weight)
    for one, other in zip(autograd(op.Combined.apply, error, y, inverse, weight), want, strict=True):
        assert_close("far apart", one, other, "fp32")


@needs_triton
def test_one_gradient_alone():
    """Of rows or of weights, where the other needs none; and none of a gradient, rather than a wrong one."""
    y, inverse, weight = made(3, 4, 6)
    error = drawn(3, 6)
    _, dy, dw = autograd(op.definition, error, y, inverse, weight)
    assert_close("dy", autograd(lambda y: op.Combined.apply(y, inverse, weight), error, y)[1], dy, "fp32")
    assert_close("dw", autograd(lambda weight: op.Combined.apply(y, inverse, weight), error, weight)[1], dw, "fp32")
    out, error = op.Combined.apply(y.requires_grad_(), inverse, weight), error.requires_grad_()
    (first,) = torch.autograd.grad(out, y, error, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"places and weights \[\(2, 2\), \(2, 2\)\] of 3 rows: expected \[T, K\]"):
        op.combine(torch.zeros(3, 4), torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2))
