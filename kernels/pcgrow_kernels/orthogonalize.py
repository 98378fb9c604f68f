"""Newton-Schulz orthogonalization of stacks of matrices."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


STEPS = 5


def orthogonalize(matrices: Tensor, steps: int = STEPS, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix's singular value decomposition, batched, `[..., O, I]`.

    Singular values end between about 0.7 and 1.2; an all-zero matrix stays zero. Runs in bf16 on a GPU, fp32 on a CPU.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide if x.shape[-2] <= x.shape[-1] else wide.mT).to(matrices.dtype)
