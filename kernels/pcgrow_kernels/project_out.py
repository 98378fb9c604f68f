"""Take out of a step its part along some input directions."""

from torch import Tensor


def project_out(weight: Tensor, directions: Tensor, target: Tensor | None, transposed: bool) -> None:
    """In place, give `weight @ directions` the value `target` (None: zero) without touching the rest of `weight`.

    Args:
        weight: `[N, O, I]`, or `[N, I, O]` if `transposed`.
        directions: `[N, I, K]`, orthonormal columns or columns of zeros.
        target: `[N, O, K]`.
    """
    view = weight.mT if transposed else weight
    v = directions.to(weight.device, weight.dtype)
    excess = view @ v
    if target is not None:
        excess -= target.to(excess.device, excess.dtype)
    view -= excess @ v.mT
