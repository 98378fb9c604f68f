"""Every op of the package in plain torch: the definition, and what runs where no kernel is dispatched.

Shapes: T tokens, K experts per token, E experts, H hidden.
"""

import torch
from torch import Tensor


def expert_error(
    delta: Tensor, index: Tensor, weight: Tensor, experts: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, per expert, what its routed rows received.

    The error at the output of routed row (t, k) is `weight[t, k] * delta[t]`, so its norm is
    `weight[t, k] * |delta[t]|` and no `[T * K, H]` tensor is ever built.

    Args:
        delta: error at the experts module's summed output, `[T, H]`, dLoss/d(output) in nats per unit.
        index: expert chosen by each row, `[T, K]`, integer; values outside `0..experts-1` are no expert.
        weight: routing weight of each row, `[T, K]`; a row at weight 0 does nothing and is not counted (ZAYA's router
            sends tokens that skip the experts to the first of them so).
        experts: E.
        keep: `[T]` bool, tokens that count (padding does not); all of them if None.

    Returns:
        Four `[E]` fp64 tensors: rows, sum of routing weights, sum of error norms, sum of squared error norms.
    """
    norm = torch.linalg.vector_norm(delta, dim=-1, dtype=torch.promote_types(delta.dtype, torch.float32)).double()
    routed = (index >= 0) & (index < experts) & (weight != 0)
    if keep is not None:
        routed = routed & keep[:, None]
    chosen = index[routed]
    weights = weight.double()
    errors = (weights.abs() * norm[:, None])[routed]

    def per_expert(values: Tensor) -> Tensor:
        return torch.zeros(experts, dtype=torch.float64, device=delta.device).index_add_(0, chosen, values)

    return (
        per_expert(torch.ones_like(errors)),
        per_expert(weights[routed]),
        per_expert(errors),
        per_expert(errors.square()),
    )
