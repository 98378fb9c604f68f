"""Weighted sums of routed rows: kernel and definition against loops over tokens in fp64, and the order of the sums."""

import mmap
import sys

import pytest
import torch
from torch import Tensor

from close import assert_close
from kernel_runs import DEVICE, DTYPES, KIND, drawn, in_fp64, needs_triton, poisoned
from pcgrow_kernels import combine as op
from pcgrow_kernels.dispatch import WIDEST

# tokens, choices, width: more choices than running sums; one of all; widths around a power of two, and past a block
SHAPES = [(5, 8, 33), (3, 6, 64), (4, 3, 7), (1, 1, 1), (2, 2, WIDEST + 5)]


WAYS = [op.definition, pytest.param(op.by_triton, marks=needs_triton)]


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
@pytest.mark.parametrize("way", WAYS)
def test_sums(way, dtype, shape):
    inputs = made(*shape, dtype=dtype)
    with poisoned():
        found = way(*inputs)
    assert found.dtype == dtype
    assert_close("sum", found.cpu(), loop(*in_fp64(*inputs)), KIND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_without_weights(way, dtype):
    y, inverse, weight = made(5, 6, 33, dtype)
    with poisoned():
        found = way(y, inverse)
    assert_close("sum", found.cpu(), loop(y.cpu().double(), inverse.cpu(), torch.ones_like(weight.cpu())), KIND[dtype])


@needs_triton
def test_order_of_the_sums():
    """Four running sums of every fourth row, as torch's on CUDA: the same bits, not only the same numbers."""
    y, inverse, weight = made(6, 7, 50)
    parts = (y[inverse] * weight.unsqueeze(-1)).unbind(1)
    sums = [parts[k] + parts[k + 4] if k < 3 else parts[k] for k in range(4)]
    with poisoned():
        found = op.by_triton(y, inverse, weight)
    assert torch.equal(found, sums[0] + sums[1] + sums[2] + sums[3])
    assert not torch.equal(found, sum(parts[1:], parts[0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("wider", [False, True])
@pytest.mark.parametrize("choices", [1, 2, 6, 8, 10])
def test_bits_of_the_definition(choices, wider):
    y, inverse, weight = made(300, choices, 2048, torch.bfloat16)
    weight = weight.float() if wider else weight
    assert torch.equal(op.by_triton(y, inverse, weight), op.definition(y, inverse, weight))


@needs_triton
@pytest.mark.parametrize("spaced", [False, True])
def test_strides(spaced):
    """Rows in no piece, rows with room between, weights and places turned."""
    y, inverse, weight = made(4, 3, 10, spaced=spaced)
    room = torch.cat([y, y], dim=1)[:, :10]
    turned = [inverse.mT.contiguous().mT, weight.mT.contiguous().mT]
    with poisoned():
        assert_close("turned", op.by_triton(room, *turned), op.definition(y, inverse, weight), "fp32")


@needs_triton
@pytest.mark.parametrize(("tokens", "width"), [(0, 5), (3, 0)])
def test_nothing(tokens, width):
    assert op.by_triton(*made(tokens, 2, width)).shape == (tokens, width)


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
    assert_close("far apart", op.by_triton(y, inverse, weight), op.definition(y.clone(), inverse, weight), "fp32")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"places and weights \[\(2, 2\), \(2, 2\)\] of 3 rows: expected \[T, K\]"):
        op.combine(torch.zeros(3, 4), torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2))
