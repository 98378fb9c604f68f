"""Gated activations: kernels and definitions against autograd in fp64, through the down projection too."""

import pytest
import torch
from torch import Tensor

from close import assert_close
from kernel_runs import DTYPES, KIND, autograd, drawn, in_fp64, needs_triton, poisoned
from pcgrow_kernels import swiglu as op
from pcgrow_kernels.dispatch import WIDEST

# rows, neurons: widths around a power of two, one of all, past a block, none
SHAPES = [(5, 33), (3, 64), (1, 1), (2, WIDEST + 5), (0, 4)]


def closed_form(h: Tensor) -> Tensor:
    gate, up = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    return gate / (1 + (-gate).exp()) * up


def backward_kernel(h: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return op.backward_by_triton(h, q, weight, dh=torch.empty_like(h), act=torch.empty_like(q))


def backward_in_place(h: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return op.backward_by_triton(h, q, weight, dh=h, act=q)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [op.definition, pytest.param(op.by_triton, marks=needs_triton)])
def test_activation(way, dtype, shape):
    h = drawn(shape[0], 2 * shape[1], dtype=dtype)
    with poisoned():
        found = way(h)
    assert found.dtype == dtype
    assert_close("act", found.cpu(), closed_form(*in_fp64(h)), KIND[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "way",
    [op.backward_definition, *(pytest.param(f, marks=needs_triton) for f in (backward_kernel, backward_in_place))],
)
def test_backward_is_that_of_an_expert(way, dtype, shape):
    """Of rows w (act W), from the error at what they add up to, in fp64, routing weights and all."""
    h, weight = drawn(shape[0], 2 * shape[1], dtype=dtype), drawn(shape[0], dtype=dtype)
    down, error = in_fp64(torch.randn(shape[1], 3), torch.randn(shape[0], 3))
    # as the kernel is handed it, rounded
    q = (error @ down.mT).to(h)

    def row_outputs(h: Tensor, weight: Tensor, down: Tensor) -> Tensor:
        return weight.unsqueeze(-1) * (closed_form(h) @ down)

    exact = in_fp64(h, weight)
    _, dh, dw, d_down = autograd(row_outputs, error, *exact, down)
    with poisoned():
        found = way(h.clone(), q.clone(), weight)
    assert [one.dtype for one in found] == [dtype] * 3
    assert_close("dh", found[0].cpu(), dh, KIND[dtype])
    assert_close("act", found[1].cpu(), exact[1].unsqueeze(-1) * closed_form(exact[0]), KIND[dtype])
    assert_close("dW", found[1].cpu().double().mT @ error, d_down, KIND[dtype])
    assert_close("dw", found[2].cpu(), dw, KIND[dtype])


@needs_triton
def test_far_values():
    """Where exp(-g) is beyond fp32 or nothing: no NaN, and the limits."""
    gate = torch.tensor([-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0])
    h = torch.stack([torch.cat([gate, torch.ones(7)])]).to(drawn(1).device)
    with poisoned():
        act, (dh, *_) = op.by_triton(h), backward_kernel(h, torch.ones_like(h[:, :7]), torch.ones_like(h[:, 0]))
    want = autograd(closed_form, *in_fp64(torch.ones(1, 7), h))
    assert_close("act", act.cpu(), want[0], "fp32")
    assert_close("dh", dh.cpu(), want[1], "fp32")
    assert not act.isnan().any()


@needs_triton
def test_strides():
    h, q, weight = drawn(4, 20), drawn(4, 10), drawn(4, 2)[:, 1]
    want = [op.definition(h), *op.backward_definition(h, q, weight)]
    wide, spaced = torch.cat([h, h], dim=1)[:, :20], h.repeat_interleave(2, 1)[:, ::2]
    for given in (wide, spaced, h.mT.contiguous().mT):
        assert not given.is_contiguous()
        with poisoned():
            found = [op.by_triton(given)]
            # rows in one piece, with room between: as rows_of hands them over
            found += backward_kernel(wide, torch.cat([q, q], dim=1)[:, :10], weight)
        for one, other in zip(found, want, strict=True):
            assert_close("turned", one, other, "fp32")


@needs_triton
def test_overwrites_what_it_read():
    """In place: h holds dh and q what the down projection's gradient needs, with nothing in between left over."""
    h, q, weight = drawn(3, 2 * (WIDEST + 5)), drawn(3, WIDEST + 5), drawn(3)
    want = backward_kernel(h, q, weight)
    dh, act, dw = backward_in_place(h, q, weight)
    assert (dh.data_ptr(), act.data_ptr()) == (h.data_ptr(), q.data_ptr())
    for one, other in zip((dh, act, dw), want, strict=True):
        assert torch.equal(one, other)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"gates and ups \(2, 5\): expected \[R, 2 I\]"):
        op.swiglu(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"h \(2, 6\), q \(2, 4\), weights \(2,\): expected \[R, 2 I\], \[R, I\]"):
        op.swiglu_backward(torch.zeros(2, 6), torch.zeros(2, 4), torch.zeros(2))
