"""Thin: remove intermediate neurons of experts, and make up for them in the down projection.

Both in closed form from the second moments G `[E, I, I]` of what enters the down projection (Optimal Brain Surgeon,
Hassibi & Stork 1993, for whole neurons). Shapes: E experts, H hidden, I intermediate neurons.
"""

import torch
from torch import Tensor

# share of the mean of a moment's diagonal that is added to it
THIN_RIDGE = 1e-4


def damped(moment: Tensor) -> Tensor:
    """`[E, I, I]`, invertible."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-12)
    return moment + THIN_RIDGE * mean[:, None, None] * torch.eye(
        moment.shape[1], dtype=moment.dtype, device=moment.device
    )


def elimination_order(down: Tensor, moment: Tensor, at_once: int) -> Tensor:
    """The order in which to remove neurons, `[E, I]`: first those whose loss changes the outputs least.

    Args:
        down: down projections `[E, H, I]`. moment: `[E, I, I]`.
        at_once: neurons removed before the others are weighed anew.
    """
    experts, _, neurons = down.shape
    weight, inverse = down.double().clone(), torch.linalg.inv(damped(moment.double()))
    gone = torch.zeros(experts, neurons, dtype=torch.bool, device=down.device)
    order = []
    for start in range(0, neurons, at_once):
        count = min(at_once, neurons - start)
        # what the outputs lose if the rest makes up for a neuron as well as it can
        score = weight.square().sum(1) / inverse.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
        chosen = score.masked_fill(gone, float("inf")).topk(count, largest=False).indices
        order.append(chosen)
        gone.scatter_(1, chosen, True)
        rows = torch.gather(inverse, 1, chosen[:, :, None].expand(-1, -1, neurons))
        square = torch.gather(rows, 2, chosen[:, None].expand(-1, count, -1))
        step = torch.linalg.solve(square, rows)
        taken = torch.gather(weight, 2, chosen[:, None].expand(-1, weight.shape[1], -1))
        weight -= taken @ step
        inverse -= rows.mT @ step
    return torch.cat(order, dim=1)


def compensated(down: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """Down projections for the neurons `kept [E, P]` alone, `[E, H, P]`, that come nearest to the whole ones'
    outputs."""
    moment, neurons = damped(moment.double()), moment.shape[1]
    columns = torch.gather(moment, 2, kept[:, None].expand(-1, neurons, -1))
    square = torch.gather(columns, 1, kept[:, :, None].expand(-1, -1, kept.shape[1]))
    # W' = W G[:, kept] (G[kept, kept])^-1
    return torch.linalg.solve(square, (down.double() @ columns).mT).mT.to(down.dtype)
