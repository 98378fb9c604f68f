"""Add up each token's routed rows, weighted.

    out_t = sum_k w_tk y_r        r = inverse_tk

Rows lie in any order, each of them some token's: `inverse` says where. Nothing is scattered, so sums are the same in
every run (the layout of scattermoe, arXiv:2403.08245). Shapes: T tokens, K rows of each, R = T K, H numbers in a row.

Bytes at T = 8192, K = 8, H = 2048 in bf16, where R rows are U = 0.27 GB: forward 9/8 U (definition: 41/8 U, three steps
there and back; torch's embedding_bag reads as little and adds in another order). FLOPs: 2 R H.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pcgrow_kernels.dispatch import Kernel, block, rows_of, tl, use_triton


def combine(y: Tensor, inverse: Tensor, weight: Tensor | None = None) -> Tensor:
    """`[T, H]` in `y`'s dtype; no gradient.

    A kernel multiplies and adds in the order of `definition` on a GPU, to the bit.

    Args:
        y: rows `[R, H]`. inverse: place in it of each token's rows, `[T, K]`, all of 0..R-1. weight: `[T, K]`; None: 1.
    """
    shapes = [tuple(given.shape) for given in (inverse, weight) if given is not None]
    if len({*shapes}) > 1 or inverse.dim() != 2 or inverse.numel() != len(y):
        raise ValueError(f"places and weights {shapes} of {len(y)} rows: expected [T, K], one for each row")
    if use_triton(y, inverse, *(() if weight is None else (weight,))):
        return by_triton(y, inverse, weight)
    return definition(y, inverse, weight)


def definition(y: Tensor, inverse: Tensor, weight: Tensor | None = None) -> Tensor:
    """The same in torch: rounds each product to the wider dtype of the two, and adds in fp32 or wider."""
    rows = y[inverse.reshape(-1)].view(*inverse.shape, y.shape[1])
    return (rows if weight is None else rows * weight.unsqueeze(-1)).sum(dim=1).to(y.dtype)


def combine_in_any_order(y: Tensor, inverse: Tensor, weight: Tensor | None = None) -> Tensor:
    """The same where no bits are needed, weights rounded to `y`'s dtype, no gradients: on a CPU four times as fast."""
    if not len(inverse) or use_triton(y, inverse):
        return combine(y, inverse, weight)
    return embedding_bag(inverse, y, mode="sum", per_sample_weights=None if weight is None else weight.to(y.dtype))


def by_triton(y: Tensor, inverse: Tensor, weight: Tensor | None = None) -> Tensor:
    """The same by a kernel."""
    y, inverse = rows_of(y), inverse.contiguous()
    (tokens, choices), width = inverse.shape, y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    columns = block(width)
    _sum_rows.launch(
        (tokens, -(-width // columns)),
        *(y, inverse, None if weight is None else weight.contiguous(), out, y.stride(0), width),
        choices=choices,
        rounds=weight is not None and y.dtype == weight.dtype,
        columns=columns,
    )
    return out


@Kernel
def _sum_rows(
    y, inverse, weight, out, y_stride, width, choices: tl.constexpr, rounds: tl.constexpr, columns: tl.constexpr
) -> None:
    """Grid (T, H / columns): a program owns some columns of a token.

    torch's reduction on CUDA keeps four running sums, of every fourth number (ATen/native/cuda/Reduce.cuh, vt0 = 4).
    """
    token = tl.program_id(0).to(tl.int64)  # R H passes 2^31 at 131,072 tokens of 8 rows
    place = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = place < width
    first = tl.zeros([columns], tl.float32)
    second, third, fourth = first, first, first
    for k in tl.static_range(choices):
        row = tl.load(inverse + token * choices + k).to(tl.int64)
        product = tl.load(y + row * y_stride + place, mask=inside, other=0).to(tl.float32)
        if weight is not None:
            product *= tl.load(weight + token * choices + k).to(tl.float32)
        if rounds:
            product = product.to(y.dtype.element_ty).to(tl.float32)
        if k % 4 == 0:
            first += product
        elif k % 4 == 1:
            second += product
        elif k % 4 == 2:
            third += product
        else:
            fourth += product
    tl.store(out + token * width + place, (first + second + third + fourth).to(out.dtype.element_ty), mask=inside)
