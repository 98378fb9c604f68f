"""The gated activation of an expert, SwiGLU (Shazeer 2020, arXiv:2002.05202), and all that follows from it backward.

    act = silu(g) u          silu(g) = g s          s = 1 / (1 + exp(-g))          [g | u] = h

and, with q = dy W_down for rows of error dy whose outputs count w times,

    dw = <act, q>        du = w q silu(g)        dg = w q u (s + silu(g) (1 - s))

dw is the routing weight's gradient, <W_down act, dy>, without the row's output; (w act)^T dy is the down projection's.
Shapes: R rows, I neurons; gates and ups lie side by side, `[R, 2 I]`.

Bytes at R = 65536, I = 1024 in bf16, where h is U = 0.27 GB: forward 3/2 U (definition: 5/2 U), backward 3 U, h and q
read once and overwritten (definition: 17 U in a dozen steps). FLOPs: about 5 R I, and 14 R I back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pcgrow_kernels.dispatch import Kernel, block, rows_of, tl, use_triton

libdevice: Any = None


def swiglu(h: Tensor) -> Tensor:
    """act `[R, I]` of `h [R, 2 I]`; no gradient. A kernel rounds silu(g) as the definition does."""
    if h.dim() != 2 or h.shape[1] % 2:
        raise ValueError(f"gates and ups {tuple(h.shape)}: expected [R, 2 I]")
    return by_triton(h) if use_triton(h) else definition(h)


def definition(h: Tensor) -> Tensor:
    """`swiglu` in torch."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def by_triton(h: Tensor) -> Tensor:
    """The same by a kernel."""
    h = rows_of(h)
    act = torch.empty(len(h), h.shape[1] // 2, dtype=h.dtype, device=h.device)
    columns = block(act.shape[1])
    _activate.launch(
        (len(h), -(-act.shape[1] // columns)),
        *(h, act, h.stride(0), act.shape[1]),
        exact=h.device.type != "cpu",
        columns=columns,
    )
    return act


def swiglu_backward(h: Tensor, q: Tensor, weight: Tensor, spare: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """dh `[R, 2 I]`, w act `[R, I]` and dw `[R]`; no autograd.

    A kernel keeps what is between in fp32, where the definition rounds, and may write over `q`.

    Args:
        h: `[R, 2 I]`, as `swiglu` had it. q: `[R, I]`. weight: w, `[R]`.
        spare: whether `h` may be written over too. Not if it was saved for a backward that can run again: autograd
            does not see that a kernel writes.
    """
    if h.shape != (len(q), 2 * q.shape[1]) or weight.shape != q.shape[:1]:
        raise ValueError(
            f"h {tuple(h.shape)}, q {tuple(q.shape)}, weights {tuple(weight.shape)}: expected [R, 2 I], [R, I] and [R]"
        )
    if use_triton(h, q, weight):
        h, q = rows_of(h), rows_of(q)
        dh = h if spare else torch.empty(h.shape, dtype=h.dtype, device=h.device)
        return backward_by_triton(h, q, weight, dh, act=q)
    return backward_definition(h, q, weight)


def backward_definition(h: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu_backward` in torch, out of place."""
    gate, up = h.chunk(2, dim=-1)
    s, w = torch.sigmoid(gate), weight.unsqueeze(-1).to(q.dtype)
    silu = gate * s
    act, error = silu * up, q * w
    dh = torch.cat([error * up * (s + silu * (1 - s)), error * silu], dim=-1)
    return dh, act * w, (act * q).sum(-1).to(weight.dtype)


def backward_by_triton(h: Tensor, q: Tensor, weight: Tensor, dh: Tensor, act: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu_backward` by a kernel, into `dh` and `act`, which may be `h` and `q`."""
    dw = torch.empty(len(h), dtype=weight.dtype, device=h.device)
    _activate_backward.launch(
        (len(h),),
        *(h, q, weight.contiguous(), dh, act, dw),
        *(h.stride(0), q.stride(0), dh.stride(0), act.stride(0), q.shape[1]),
        columns=block(q.shape[1]),
    )
    return dh, act, dw


@Kernel
def _activate(h, act, h_stride, width, exact: tl.constexpr, columns: tl.constexpr) -> None:
    """Grid (R, I / columns): a program owns some neurons of a row.

    exact: by the exponential that torch is compiled with, not the GPU's approximate one; there is none on CPUs.
    """
    row = tl.program_id(0).to(tl.int64)  # R 2 I may pass 2^31
    place = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = place < width
    gate = tl.load(h + row * h_stride + place, mask=inside, other=0).to(tl.float32)
    up = tl.load(h + row * h_stride + width + place, mask=inside, other=0).to(tl.float32)
    falling = libdevice.exp(-gate) if exact else tl.exp(-gate)
    silu = tl.div_rn(gate, 1 + falling).to(h.dtype.element_ty).to(tl.float32)
    tl.store(act + row * width + place, (silu * up).to(act.dtype.element_ty), mask=inside)


@Kernel
def _activate_backward(
    h,
    q,
    weight,
    dh,
    act,
    dw,
    h_stride,
    q_stride,
    dh_stride,
    act_stride,
    width,
    columns: tl.constexpr,
) -> None:
    """Grid (R,): a program owns one row, and reads each place before it writes there."""
    row = tl.program_id(0).to(tl.int64)  # R 2 I may pass 2^31
    w = tl.load(weight + row).to(tl.float32)
    total = tl.zeros([columns], tl.float32)
    for start in range(0, width, columns):
        place = start + tl.arange(0, columns)
        inside = place < width
        gate = tl.load(h + row * h_stride + place, mask=inside, other=0).to(tl.float32)
        up = tl.load(h + row * h_stride + width + place, mask=inside, other=0).to(tl.float32)
        error = tl.load(q + row * q_stride + place, mask=inside, other=0).to(tl.float32)
        s = 1 / (1 + tl.exp(-gate))
        silu = gate * s
        total += silu * up * error
        error *= w
        d_gate, d_up = error * up * (s + silu * (1 - s)), error * silu
        tl.store(dh + row * dh_stride + place, d_gate.to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + row * dh_stride + width + place, d_up.to(dh.dtype.element_ty), mask=inside)
        tl.store(act + row * act_stride + place, (silu * up * w).to(act.dtype.element_ty), mask=inside)
    tl.store(dw + row, tl.sum(total).to(dw.dtype.element_ty))
