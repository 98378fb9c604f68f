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
    wide = torch.promote_types(delta.dtype, torch.float32)
    norm = torch.linalg.vector_norm(delta, dim=-1, dtype=wide).double()
    routed = (index >= 0) & (index < experts) & (weight != 0)
    if keep is not None:
        routed = routed & keep[:, None]
    # of each token and expert, no row gathered: how many there are is not to be asked of a device
    share = torch.where(routed, weight, 0.0).double()
    held = torch.stack([routed.double(), share, share.abs(), share.square()])
    chosen = index.clamp(0, experts - 1).expand(held.shape)
    dense = held.new_zeros(*held.shape[:2], experts).scatter_add_(2, chosen, held)
    # an error that is not finite counts where it was routed to, and there alone
    once = torch.ones_like(norm)
    per_token = torch.stack([once, once, norm, norm.square()]).unsqueeze(-1)
    rows, weights, errors, squares = torch.where(dense != 0, dense * per_token, 0.0).sum(dim=1)
    return rows, weights, errors, squares
