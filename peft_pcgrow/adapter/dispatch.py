"""Deepen: refine the located experts, full rank, each by its own rows. (No layers are added.)

The located experts live in a grown bank, in the base's layout. Rows routed to them are taken from the base's call and
computed by the bank with the base's own code; all other rows run the base's path, and a token that meets no located
expert keeps its bits. A spawned expert (see `spawn`) takes those of its donor's rows that its gate lets pass. Shapes: T
tokens, K experts per token, R = T * K routed rows, G experts in a bank, H hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from peft_pcgrow.architectures import one_sort, run_rows
from peft_pcgrow.architectures.experts import ExpertsModule


@dataclass(frozen=True)
class Branch:
    """Some grown nodes of one layer.

    Attributes:
        slot: place in the bank of each of the base's experts, -1 where it has none, `[E]` integer.
        bank: the bank's stacks by name, `[G, ...]`.
        passes: tokens that the gate of these nodes lets pass, `[T]`; rows of others stay with the donors. None: all do.
        parents: places, among the branches asked before, of those whose rows these nodes take; none: the base's.
    """

    slot: Tensor
    bank: Mapping[str, Tensor]
    passes: Tensor | None = None
    parents: tuple[int, ...] = ()


def slots(chosen: Sequence[int], total: int, device: torch.device | str = "cpu") -> Tensor:
    """`[total]`: position of each expert in `chosen`, -1 elsewhere."""
    slot = torch.full((total,), -1, dtype=torch.long, device="cpu")
    slot[torch.tensor(chosen, device="cpu")] = torch.arange(len(chosen), device="cpu")
    return slot.to(device)


def takers(branches: Sequence[Branch], index: Tensor, total: int) -> Tensor:
    """Who computes each row of `index [T, K]`: the place of a branch, -1: the base, `[T, K]`.

    Branches are asked in turn for the rows that nobody took before, or for those that their parents took.

    Args:
        total: experts of the base; rows whose index is that are nobody's, -1.
    """
    taker, expert = torch.full_like(index, -1), index.clamp(max=total - 1)
    for place, branch in enumerate(branches):
        free = taker == (branch.parents[0] if branch.parents else -1)
        for parent in branch.parents[1:]:
            free |= taker == parent
        free &= (branch.slot[expert] >= 0) & (index < total)
        if branch.passes is not None:
            free &= branch.passes.unsqueeze(1)
        taker = taker.masked_fill(free, place)
    return taker


def nodes(
    branches: Sequence[Branch],
    owners: Sequence[str],
    newborns: Sequence[tuple[str, int]],
    index: Tensor,
    total: int,
) -> Tensor:
    """Which node computes each row of `index [T, K]`: an expert of the base's `total`, E, or E + n for newborn n,
    `[T, K]`; nobody's is E + N.

    Args:
        branches: as for `takers`. owners: whose newborns each of them is, "" if none. newborns: (owner, donor).
    """
    # the last row is the base's
    table = torch.arange(total + 1, device="cpu").repeat(len(branches) + 1, 1)
    table[:, total] = total + len(newborns)
    for n, (owner, donor) in enumerate(newborns):
        table[[place for place, other in enumerate(owners) if other == owner], donor] = total + n
    return table.to(index)[takers(branches, index, total), index.clamp(max=total)]


def run(
    base: ExpertsModule,
    branches: Sequence[Branch],
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    exact: bool = True,
    together: bool = True,
) -> Tensor:
    """The experts' output with the rows of each branch computed by its bank.

    Both are run together where that can be (see `one_sort`). Else every expert sees its rows in the order in which the
    base would have handed them over, and a token's rows are added up in the base's order: matrix products and sums
    round differently in another order. An implementation that cannot be taken apart (a fused kernel, one of the user's)
    is called as it is, the rows taken from it with weight zero.

    Args:
        base: the experts module; hidden `[T, H]`; index `[T, K]`; weight `[T, K]`, as it is called with. Rows whose
            index is the number of experts are nobody's.
        branches: in the order in which they are asked for rows (see `takers`); without a gate, experts are disjoint.
        exact: matrix products also round differently with another number of rows, so an expert that keeps some of its
            rows and loses others computes all of them, and so does who takes them. False: each row is computed once.
        together: False: not together, even where that can be.

    Returns:
        `[T, H]` in `hidden`'s dtype; if `exact`, equal bit for bit to `base(...)` for tokens that no branch takes a row
        of, and for all if the banks hold the base's own weights and the implementation can be taken apart. So it is on
        CPUs, and on an H100 with "eager" and "grouped_mm". "batched_mm", which `generate` decodes by on a GPU, is the
        base's one product of all rows here too, but untried there: count on the rounding of the dtype.
    """
    if one_sort.kept_from(base, exact, together):
        return _taken_apart(base, branches, hidden, index, weight, exact)
    joint = _joint(branches)

    def again(bank: Mapping[str, Tensor], *routed: Tensor) -> Tensor:
        return _taken_apart(base, [replace(branch, bank=bank) for branch in joint], *routed, exact=False)

    slots, taker = torch.stack([branch.slot for branch in joint]), takers(joint, index, base.num_experts)
    return one_sort.run(base, joint[0].bank, slots, taker, (hidden, index, weight), exact, again)


def _joint(branches: Sequence[Branch]) -> list[Branch]:
    """The branches, all of one bank, which holds theirs one after another."""
    banks = {id(branch.bank): branch.bank for branch in branches}
    if len(banks) == 1:
        return [*branches]
    starts = dict(zip(banks, accumulate((len(bank["down_proj"]) for bank in banks.values()), initial=0), strict=False))
    whole = {name: torch.cat([bank[name] for bank in banks.values()]) for name in branches[0].bank}
    moved = [torch.where(branch.slot < 0, -1, branch.slot + starts[id(branch.bank)]) for branch in branches]
    return [replace(branch, bank=whole, slot=slot) for branch, slot in zip(branches, moved, strict=True)]


def _taken_apart(
    base: ExpertsModule, branches: Sequence[Branch], hidden: Tensor, index: Tensor, weight: Tensor, exact: bool
) -> Tensor:
    tokens, choices = index.shape
    apart = run_rows.implementation(base) is not None
    exact = exact and apart
    order = run_rows.row_order(base, index)
    chosen = index.reshape(-1)[order]
    taker = takers(branches, index, base.num_experts)
    left = (taker < 0) & (index < base.num_experts)
    taker = taker.reshape(-1)[order]
    groups: list[run_rows.RowGroup] = []
    idle: list[Branch] = []
    source, computed = torch.full_like(order, -1), 0
    for number, branch in enumerate((*branches, None)):
        if branch is None and not groups:
            return _counted(base(hidden, index, weight), idle)
        if branch is None and not apart:
            break
        mine = left.reshape(-1)[order] if branch is None else taker == number
        found = (_with_siblings(chosen, mine, index) if exact else mine).nonzero().squeeze(1)
        if not found.numel():
            idle += [branch] if branch is not None else []
            continue
        place = torch.empty_like(order)
        place[found] = torch.arange(computed, computed + len(found), device=found.device)
        source = torch.where(mine, place, source)
        computed += len(found)
        own = chosen[found]
        groups.append(
            run_rows.RowGroup(found, own) if branch is None else run_rows.RowGroup(found, branch.slot[own], branch.bank)
        )
    ordered = run_rows.run_row_groups(base, hidden[order // choices], groups, source, joint=exact)
    weighted = (ordered * weight.reshape(-1)[order].unsqueeze(-1))[torch.argsort(order)]
    total = run_rows.sum_rows(base, weighted.view(tokens, choices, -1), index, hidden.dtype)
    total = total if apart else total + base(hidden, index, weight.masked_fill(~left, 0))
    return _counted(total, idle)


def _with_siblings(chosen: Tensor, mine: Tensor, index: Tensor) -> Tensor:
    """All rows of the experts that some row of `mine` was routed to, `[R]` bool."""
    touched = torch.zeros(int(index.max()) + 1, dtype=torch.bool, device=chosen.device)
    touched[chosen[mine]] = True
    return touched[chosen]


def _counted(output: Tensor, idle: Sequence[Branch]) -> Tensor:
    """`output`, with gradients of zero, not none, for banks that no row met: DDP waits for every parameter's."""
    banks = [weight for branch in idle for weight in branch.bank.values() if weight.requires_grad]
    return _Counted.apply(output, *banks) if banks and torch.is_grad_enabled() else output  # type: ignore[return-value]


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, *banks: Tensor) -> Tensor:  # type: ignore[override]
        ctx.like = [(bank.shape, bank.dtype, bank.device) for bank in banks]
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *errors: Tensor):
        return *errors, *(torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.like)
