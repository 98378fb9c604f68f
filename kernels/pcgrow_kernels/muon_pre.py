"""What Muon does before it orthogonalises (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    m <- b m + (1 - b) g        x = (1 - b) g + b m, or m without Nesterov        n = |x|

for a stack of matrices. Afterwards a step is one `add_` of torch, which reads and writes as little as a kernel could.

Bytes for each number, x in bf16: 14 (definition: 24, or 32 where torch rounds to x's dtype in a step of its own), so
about 8 GB of 19 for 774 M parameters. FLOPs: about 8 a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pcgrow_kernels.dispatch import Kernel, block, tl, use_triton


def muon_pre(gradient: Tensor, momentum: Tensor, out: Tensor, beta: float, nesterov: bool = True) -> Tensor:
    """Step `momentum` in place, write x to `out`, and give each matrix's norm of it, as rounded, `[N]` fp32.

    Args:
        gradient, momentum, out: stacks `[N, O, I]` with any strides, x in the dtype of `out`. beta: b.
    """
    if gradient.dim() != 3 or not gradient.shape == momentum.shape == out.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (gradient, momentum, out))
        raise ValueError(f"gradient, momentum and out of {shapes}: expected one shape [N, O, I]")
    arguments = gradient, momentum, out, beta, nesterov
    return by_triton(*arguments) if use_triton(gradient, momentum, out) else definition(*arguments)


def definition(gradient: Tensor, momentum: Tensor, out: Tensor, beta: float, nesterov: bool) -> Tensor:
    """The same in torch."""
    momentum.lerp_(gradient, 1 - beta)
    out.copy_(gradient.lerp(momentum, beta) if nesterov else momentum)
    return torch.linalg.vector_norm(out, dim=(-2, -1), dtype=torch.promote_types(out.dtype, torch.float32))


def by_triton(gradient: Tensor, momentum: Tensor, out: Tensor, beta: float, nesterov: bool) -> Tensor:
    """The same by a kernel."""
    if gradient.stride(1) < gradient.stride(2):
        # read along the axis that lies closer
        gradient, momentum, out = gradient.mT, momentum.mT, out.mT
    matrices, rows, width = gradient.shape
    squares = torch.empty(matrices, rows, dtype=torch.float32, device=gradient.device)
    _average.launch(
        (matrices * rows,),
        *(gradient, momentum, out, squares, 1 - beta, rows, width),
        *(*gradient.stride(), *momentum.stride(), *out.stride()),
        nesterov=nesterov,
        columns=block(width),
    )
    return squares.sum(1).sqrt_()


@Kernel
def _average(
    gradient,
    momentum,
    out,
    squares,
    fresh,
    rows,
    width,
    gradient_stack,
    gradient_row,
    gradient_column,
    momentum_stack,
    momentum_row,
    momentum_column,
    out_stack,
    out_row,
    out_column,
    nesterov: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    """Grid (N O,): a program owns one row of a matrix."""
    at = tl.program_id(0)
    stack, row = (at // rows).to(tl.int64), (at % rows).to(tl.int64)  # N O I may pass 2^31
    gradient += stack * gradient_stack + row * gradient_row
    momentum += stack * momentum_stack + row * momentum_row
    out += stack * out_stack + row * out_row
    total = tl.zeros([columns], tl.float32)
    for start in range(0, width, columns):
        place = start + tl.arange(0, columns)
        inside, far = place < width, place.to(tl.int64)
        g = tl.load(gradient + far * gradient_column, mask=inside, other=0).to(tl.float32)
        m = tl.load(momentum + far * momentum_column, mask=inside, other=0).to(tl.float32)
        m += fresh * (g - m)
        tl.store(momentum + far * momentum_column, m.to(momentum.dtype.element_ty), mask=inside)
        x = (m - fresh * (m - g) if nesterov else m).to(out.dtype.element_ty)
        tl.store(out + far * out_column, x, mask=inside)
        total += x.to(tl.float32) * x.to(tl.float32)
    tl.store(squares + at, tl.sum(total))
