"""Newton-Schulz orthogonalization of stacks of matrices."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


STEPS = 5


def working_dtype(device: torch.device) -> torch.dtype:
    """What the iteration runs in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalize(matrices: Tensor, steps: int = STEPS, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix's singular value decomposition, batched, `[..., O, I]`.

    Singular values end between about 0.7 and 1.2; an all-zero matrix stays zero.
    """
    x = matrices.to(working_dtype(matrices.device), copy=True)
    return orthogonalize_(x.reshape(-1, *x.shape[-2:]), steps, eps).view(x.shape).to(matrices.dtype)


def orthogonalize_(x: Tensor, steps: int = STEPS, eps: float = 1e-7, norms: Tensor | None = None) -> Tensor:
    """The same for `[N, O, I]` in the dtype that it is in; writes to `x`, and returns it or another tensor.

    Takes room for three more of its size at most. norms: the matrices' Frobenius norms, `[N]`; None: to be taken.
    """
    a, b, c = COEFFICIENTS
    norms = torch.linalg.vector_norm(x, dim=(-2, -1)) if norms is None else norms
    x /= norms.clamp_min(eps)[:, None, None]
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    gram = wide.new_empty(*wide.shape[:-1], wide.shape[-2])
    polynomial, other = torch.empty_like(gram), torch.empty_like(wide)
    for _ in range(steps):
        torch.bmm(wide, wide.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        wide, other = torch.baddbmm(wide, polynomial, wide, beta=a, out=other), wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT
