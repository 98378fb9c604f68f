"""Deepen: refine the located experts, full rank, each by its own rows. (No layers are added.)

The located experts live in a grown bank, in the base's layout. Rows routed to them are taken from the base's call and
computed by the bank with the base's own code; all other rows run the base's path, and a token that meets no located
expert keeps its bits. Shapes: T tokens, K experts per token, R = T * K routed rows, G experts in a bank, H hidden.
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
    """

    slot: Tensor
    bank: Mapping[str, Tensor]


def slots(chosen: Sequence[int], total: int, device: torch.device | str = "cpu") -> Tensor:
    """`[total]`: position of each expert in `chosen`, -1 elsewhere."""
    slot = torch.full((total,), -1, dtype=torch.long)
    slot[torch.tensor(chosen)] = torch.arange(len(chosen))
    return slot.to(device)


def forward(base: nn.Module, branches: Sequence[Branch], hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The experts' output with the rows of each branch computed by its bank.

    Args:
        base: the experts module; hidden `[T, H]`; index `[T, K]`; weight `[T, K]`, as it is called with.
        branches: with disjoint experts.

    Returns:
        `[T, H]` in `hidden`'s dtype, equal bit for bit to `base(...)` for tokens that no branch takes a row of.
    """
    tokens, choices = index.shape
    # The base's kernels see the rows of each remaining expert in the order they would have seen them, so that their
    # results keep their bits: choice by choice in the architecture's own loop, token by token elsewhere.
    eager = experts.runs_eagerly(base)
    flat = (index.mT if eager else index).reshape(-1)
    taken = torch.zeros_like(flat, dtype=torch.bool)
    outputs, order = [], []
    for branch in branches:
        slot = branch.slot[flat]
        rows = (slot >= 0).nonzero().squeeze(1)
        if rows.numel():
            stacks = experts.expert_stacks(base)
            bank = {name: stack.to(stacks[name].dtype) for name, stack in branch.bank.items()}
            x, ones = _gather(hidden, rows, tokens, choices, eager)
            outputs.append(experts.run_experts(base, bank, x, slot[rows, None], ones))
            order.append(rows)
            taken[rows] = True
    if not outputs:
        return base(hidden, index, weight)
    rest = (~taken).nonzero().squeeze(1)
    if rest.numel():
        x, ones = _gather(hidden, rest, tokens, choices, eager)
        outputs.append(base(x, flat[rest, None], ones))
        order.append(rest)
    rows_out = torch.cat(outputs)[torch.argsort(torch.cat(order))]
    if eager:
        return _sum_ascending(rows_out.view(choices, tokens, -1), index, weight, hidden.dtype)
    weighted = rows_out.view(tokens, choices, -1) * weight.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden.dtype)


def _gather(hidden: Tensor, rows: Tensor, tokens: int, choices: int, eager: bool) -> tuple[Tensor, Tensor]:
    """Inputs `[len(rows), H]` of some routed rows, and unit weights: the routing weight is applied once, at the sum."""
    x = hidden[rows % tokens if eager else rows // choices]
    return x, torch.ones_like(x[:, :1])


def _sum_ascending(rows: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up each token's rows `[K, T, H]` in ascending order of their experts, as the architectures' loops do."""
    weighted = (rows * weight.mT.unsqueeze(-1)).to(dtype)
    ascending = torch.argsort(index, dim=1, stable=True)
    every = torch.arange(index.shape[0], device=index.device)
    total = torch.zeros_like(weighted[0])
    for choice in range(index.shape[1]):
        total = total + weighted[ascending[:, choice], every]
    return total
