"""Deepen: refine the located experts, full rank, each by its own rows. (No layers are added.)

The located experts live in a grown bank, in the base's layout. Rows routed to them are taken from the base's call and
computed by the bank with the base's own code; all other rows run the base's path, and a token that meets no located
expert keeps its bits. A spawned expert (see `spawn`) takes those of its donor's rows that its gate lets pass. Shapes: T tokens, K experts per token, R = T * K routed rows, G experts in a bank, H hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_pcgrow import experts


@dataclass(frozen=True)
class Branch:
    """Some grown nodes of one layer.

    Attributes:
        slot: place in the bank of each of the base's experts, -1 where it has none, `[E]` integer.
        bank: the bank's stacks by name, `[G, ...]`.
        margin: how far above its threshold each grown node's gate finds each token, `[T, G]`; a row at 0 or below stays
            with its donor. None: these nodes take all rows.
    """

    slot: Tensor
    bank: Mapping[str, Tensor]
    margin: Tensor | None = None


def slots(chosen: Sequence[int], total: int, device: torch.device | str = "cpu") -> Tensor:
    """`[total]`: position of each expert in `chosen`, -1 elsewhere."""
    slot = torch.full((total,), -1, dtype=torch.long)
    slot[torch.tensor(chosen)] = torch.arange(len(chosen))
    return slot.to(device)


def forward(base: nn.Module, branches: Sequence[Branch], hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The experts' output with the rows of each branch computed by its bank.

    Every expert sees its rows in the order in which the base would have handed them over, and a token's rows are added
    up in the base's order: matrix products and sums round differently in another order.

    Args:
        base: the experts module; hidden `[T, H]`; index `[T, K]`; weight `[T, K]`, as it is called with.
        branches: a row that several gates let pass goes to the first of them; without a gate, experts are disjoint.

    Returns:
        `[T, H]` in `hidden`'s dtype, equal bit for bit to `base(...)` for tokens that no branch takes a row of.
    """
    tokens, choices = index.shape
    order = experts.row_order(base, index)
    chosen = index.reshape(-1)[order]
    taken = torch.zeros_like(chosen, dtype=torch.bool)
    outputs, places = [], []
    # newborns come before what was deepened under them
    for branch in sorted(branches, key=lambda branch: branch.margin is None):
        slot = branch.slot[chosen]
        mine = (slot >= 0) & ~taken
        if branch.margin is not None:
            mine &= branch.margin[order // choices, slot] > 0
        rows = mine.nonzero().squeeze(1)
        if rows.numel():
            x = hidden[order[rows] // choices]
            outputs.append(experts.run_rows(base, x, slot[rows], branch.bank))
            places.append(rows)
            taken |= mine
    if not outputs:
        return base(hidden, index, weight)
    rest = (~taken).nonzero().squeeze(1)
    if rest.numel():
        outputs.append(experts.run_rows(base, hidden[order[rest] // choices], chosen[rest]))
        places.append(rest)
    ordered = torch.cat(outputs)[torch.argsort(torch.cat(places))]
    weighted = (ordered * weight.reshape(-1)[order].unsqueeze(-1))[torch.argsort(order)]
    return experts.sum_rows(base, weighted.view(tokens, choices, -1), index, hidden.dtype)
