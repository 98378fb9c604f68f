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
        slot: place in the bank of each of the base's experts, -1 where it has none; the last: of rows of no expert, -1,
            `[E + 1]` integer.
        bank: the bank's stacks by name, `[G, ...]`.
        passes: tokens that the gate of these nodes lets pass, `[T]`; rows of others stay with the donors. None: all do.
        parents: places, among the branches asked before, of those whose rows these nodes take; none: the base's.
    """

    slot: Tensor
    bank: Mapping[str, Tensor]
    passes: Tensor | None = None
    parents: tuple[int, ...] = ()


def slots(chosen: Sequence[int], total: int, device: torch.device | str = "cpu") -> Tensor:
    """`[total + 1]`: position of each expert in `chosen`, -1 elsewhere; the last is of rows of no expert."""
    slot = torch.full((total + 1,), -1, dtype=torch.long, device="cpu")
    slot[torch.tensor(chosen, device="cpu")] = torch.arange(len(chosen), device="cpu")
    return slot.to(device)


def taken(branches: Sequence[Branch], chosen: Tensor, tokens: Tensor | None) -> list[Tensor]:
    """Which rows each branch computes, `[R]` bool each.

    Branches are asked in turn for the rows that nobody took before, or for those that their parents took.

    Args:
        chosen: expert of each row, `[R]`; E of rows of no expert.
        tokens: token of each row; None: there are no gates.
    """
    found: list[Tensor] = []
    for branch in branches:
        mine = branch.slot[chosen] >= 0
        if branch.passes is not None and tokens is not None:
            mine = mine & branch.passes[tokens]
        if others := [found[place] for place in branch.parents] or found:
            among = torch.stack(others).any(0) if len(others) > 1 else others[0]
            mine = mine & (among if branch.parents else ~among)
        for place in branch.parents:
            found[place] = found[place] & ~mine
        found.append(mine)
    return found


def takers(branches: Sequence[Branch], index: Tensor, total: int) -> Tensor:
    """Who computes each row of `index [T, K]`: the place of a branch, -1: the base (or no expert, for those of index
    `total` or more), `[T, K]`."""
    flat = index.reshape(-1).clamp(max=total)
    taker = torch.full_like(flat, -1)
    for place, mine in enumerate(taken(branches, flat, tokens_of(branches, index))):
        taker = taker.masked_fill(mine, place)
    return taker.view(index.shape)


def has_gates(branches: Sequence[Branch]) -> bool:
    return any(branch.passes is not None for branch in branches)


def tokens_of(branches: Sequence[Branch], index: Tensor) -> Tensor | None:
    """Token of each row of `index [T, K]` as they come, `[R]`, where a gate asks for it."""
    return torch.arange(index.numel(), device=index.device) // index.shape[1] if has_gates(branches) else None


def nodes(
    branches: Sequence[Branch],
    owners: Sequence[str],
    newborns: Sequence[tuple[str, int]],
    index: Tensor,
    total: int,
) -> Tensor:
    """Which node computes each row of `index [T, K]`: an expert of the base's `total`, E, or E + n for newborn n,
    `[T, K]`; E + N of rows of no expert.

    Args:
        branches: as for `taken`. owners: whose newborns each of them is, "" if none. newborns: (owner, donor).
    """
    flat = index.reshape(-1)
    found = flat.masked_fill(flat == total, total + len(newborns))
    for owner, mine in zip(owners, taken(branches, flat, tokens_of(branches, index)), strict=True):
        table = torch.arange(total + 1, device="cpu")
        for n, (other, donor) in enumerate(newborns):
            table[donor] = total + n if other == owner else table[donor]
        found = torch.where(mine, table.to(flat)[flat], found)
    return found.view(index.shape)


def run(
    base: ExpertsModule,
    branches: Sequence[Branch],
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    exact: bool = True,
    together: bool = True,
    asking: bool | None = None,
) -> Tensor:
    """The experts' output with the rows of each branch computed by its bank.

    Both are run together where that can be (see `one_sort`). Else every expert sees its rows in the order in which the
    base would have handed them over, and a token's rows are added up in the base's order: matrix products and sums
    round differently in another order. An implementation that cannot be taken apart (a fused kernel, one of the user's)
    is called as it is, the rows taken from it with weight zero.

    Args:
        base: the experts module; hidden `[T, H]`; index `[T, K]`; weight `[T, K]`, as it is called with. Rows whose
            index is the number of experts are no expert's.
        branches: in the order in which they are asked for rows (see `taken`); without a gate, experts are disjoint.
        exact: matrix products also round differently with another number of rows, so the base computes all of them,
            and so does a bank those of each expert that it takes some of. False: each row is computed once.
        together: False: not together, even where that can be.
        asking: whether to ask the device which rows are taken, and compute no others; None: where that costs nothing,
            or the base's own code asks anyway (see `run_rows.asks_nothing`).

    Returns:
        `[T, H]` in `hidden`'s dtype; if `exact`, equal bit for bit to `base(...)` for tokens that no branch takes a row
        of, and for all if the banks hold the base's own weights and the implementation can be taken apart. So it is on
        CPUs, and on an H100 with "eager" and "grouped_mm". "batched_mm", which `generate` decodes by on a GPU, is
        products of as many rows as the base's here too, but untried there: count on the rounding of the dtype.
    """
    # on a CPU bits keep them apart, and every token that is decoded comes by here
    if (exact and hidden.device.type == "cpu") or one_sort.kept_from(base, exact, together):
        return _taken_apart(base, branches, hidden, index, weight, exact, asking)
    joint = _joint(branches)

    def again(bank: Mapping[str, Tensor], *routed: Tensor) -> Tensor:
        return _taken_apart(base, [replace(branch, bank=bank) for branch in joint], *routed, exact=False)

    slots = torch.stack([branch.slot[: base.num_experts] for branch in joint])
    # without gates an expert's rows are taken all together
    taker = takers(joint, index, base.num_experts) if has_gates(joint) else None
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
    base: ExpertsModule,
    branches: Sequence[Branch],
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    exact: bool,
    asking: bool | None = None,
) -> Tensor:
    way, (tokens, choices) = run_rows.implementation(base, index), index.shape
    exact = exact and way is not None
    silent = exact and (run_rows.asks_nothing(base, way, hidden) if asking is None else not asking)
    # on a CPU answers are at hand
    at_hand = asking is not False and index.device.type == "cpu" and not torch.compiler.is_compiling()
    if silent:
        groups, order, idle = _of_all_rows(base, way, branches, index, at_hand)
    else:
        groups, order, idle = _of_their_rows(base, way, branches, index, exact)
    if len(idle) == len(branches):
        return _counted(base(hidden, index, weight), idle)
    if order is None:
        given, scale = hidden.repeat_interleave(choices, dim=0), weight.reshape(-1, 1)
    else:
        given, scale = hidden[torch.div(order, choices, rounding_mode="floor")], weight.reshape(-1, 1)[order]
    weighted = run_rows.run_row_groups(base, way, given, scale, groups, joint=exact)
    if order is not None:
        weighted = torch.empty_like(weighted).index_copy_(0, order, weighted)
    weighted = weighted.view(tokens, choices, -1)
    if exact:
        # what no expert computes may come out as anything
        unassigned = index >= base.num_experts
        if not at_hand or bool(unassigned.any()):
            weighted = weighted.masked_fill(unassigned.unsqueeze(-1), 0)
    total = run_rows.sum_rows(way, weighted, index, hidden.dtype)
    if way is None:
        theirs = torch.zeros(index.numel(), dtype=torch.bool, device=index.device)
        for group in groups:
            theirs[group.rows] = True
        total = total + base(hidden, index, weight.masked_fill(theirs.view(index.shape), 0))
    return _counted(total, idle)


# groups, the order of the rows that they are of (None: as they come), and the branches without any
Groups = tuple[list[run_rows.RowGroup], Tensor | None, list[Branch]]


def _of_all_rows(
    base: ExpertsModule, way: str | None, branches: Sequence[Branch], index: Tensor, at_hand: bool
) -> Groups:
    """Row groups that each are handed all rows; none, if it is `at_hand` that nobody takes any.

    Where the base sorts, rows go bank by bank, then to the base. The first expert of each is handed the rows before its
    own too, for nothing.
    """
    flat = index.reshape(-1)
    mine = taken(branches, flat, tokens_of(branches, index))
    if at_hand and not any(bool(own.any()) for own in mine):
        return [], None, list(branches)
    modules = [run_rows.with_bank(base, branch.bank) for branch in branches]
    if way == "batched_mm":
        rows = zip(modules, branches, mine, strict=True)
        groups = [run_rows.RowGroup(module, branch.slot[flat], mine=own.unsqueeze(1)) for module, branch, own in rows]
        return [run_rows.RowGroup(base, flat), *groups], None, []
    starts = [sum(module.num_experts for module in modules[:place]) for place in range(len(modules) + 1)]
    key = flat + starts[-1]
    for branch, own, start in zip(branches, mine, starts, strict=False):
        key = torch.where(own, branch.slot[flat] + start, key)
    key, order = torch.sort(key)
    groups = [run_rows.RowGroup(base, key - starts[-1])]
    for module, start, end in zip(modules, starts, starts[1:], strict=False):
        groups.append(run_rows.RowGroup(module, key - start, mine=((key >= start) & (key < end)).unsqueeze(1)))
    return groups, order, []


def _of_their_rows(
    base: ExpertsModule, way: str | None, branches: Sequence[Branch], index: Tensor, exact: bool
) -> Groups:
    """Row groups that are handed the rows that they compute, the base all of them if `exact`."""
    chosen, order = run_rows.row_order(way, index)
    gated = has_gates(branches)
    places = torch.arange(chosen.numel(), device=chosen.device) if order is None and gated else order
    mine = taken(branches, chosen, places // index.shape[1] if gated and places is not None else None)
    groups: list[run_rows.RowGroup] = []
    idle: list[Branch] = []
    for branch, own in zip(branches, mine, strict=True):
        # without a gate, an expert's rows are taken all together
        rows = (_with_siblings(base, chosen, own) if exact and gated else own).nonzero().squeeze(1)
        if not rows.numel():
            idle.append(branch)
            continue
        counted = own[rows].nonzero().squeeze(1) if exact and gated else None
        groups.append(
            run_rows.RowGroup(run_rows.with_bank(base, branch.bank), branch.slot[chosen[rows]], rows, counted)
        )
    if exact:
        groups.insert(0, run_rows.RowGroup(base, chosen))
    elif way is not None:
        left = ~torch.stack(mine).any(0) & (chosen < base.num_experts)
        left = left.nonzero().squeeze(1)
        groups += [run_rows.RowGroup(base, chosen[left], left)] if left.numel() else []
    return groups, order, idle


def _with_siblings(base: ExpertsModule, chosen: Tensor, mine: Tensor) -> Tensor:
    """All rows of the experts that some row of `mine` was routed to, `[R]` bool."""
    touched = torch.zeros(base.num_experts + 1, dtype=torch.bool, device=chosen.device)
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
