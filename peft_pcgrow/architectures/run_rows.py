"""Run single rows of an experts module the way transformers runs them, to the bit.

A row is one token at one of its chosen experts. Matrix products and sums round differently in another order or with
another number of rows, and vectorized activations at the end of a tensor, so all of it follows the module's own way.
Shapes: T tokens, K experts per token, R = T * K rows, N some of them, G experts in a bank, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.architectures.experts import ExpertsModule, expert_stacks, is_packed
from peft_pcgrow.architectures.host import (
    IMPLEMENTATIONS,
    batched_linear,
    batched_mm_experts_forward,
    grouped_linear,
    grouped_mm_experts_forward,
    implementation_name,
)
from peft_pcgrow.architectures.stack_view import ViewedExperts

# by function, not by name: a name can be registered anew
FAST_PATHS = {grouped_mm_experts_forward: "grouped_mm", batched_mm_experts_forward: "batched_mm"}


@dataclass(frozen=True)
class RowGroup:
    """Rows that the same weights compute.

    Attributes:
        module: the base, or the base with a bank (see `with_bank`).
        chosen: expert of each row in the module, `[N]`; ascending, if the base sorts.
        rows: their places among all R, ascending, `[N]`; None: all of them.
        own: which of the outputs count, as places among the N; None: all of them.
        mine: the same, where `rows` is None, of all rows, `[R, 1]` bool.
    """

    module: ExpertsModule
    chosen: Tensor
    rows: Tensor | None = None
    own: Tensor | None = None
    mine: Tensor | None = None

    def put(self, y: Tensor, made: Tensor | None, total: int) -> Tensor:
        """`made [R, O]`, the outputs so far, with those of this group, `y [N, O]`."""
        if self.rows is None:
            return y if made is None or self.mine is None else torch.where(self.mine, y, made)
        made = y.new_zeros(total, y.shape[1]) if made is None else made
        rows, y = (self.rows, y) if self.own is None else (self.rows[self.own], y[self.own])
        # under autocast a block gives what it is given, and linear layers 16 bits
        wide = torch.promote_types(made.dtype, y.dtype)
        made, y = made.to(wide), y.to(wide)
        return made.index_copy_(0, rows, y)


def row_order(way: str | None, index: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of `index [T, K]` (row t * K + k) as they are handed to experts that run that way: the expert of each,
    `[R]`, and its place among the rows as they are; None: in that order."""
    if way in ("grouped_mm", "sorted"):
        return torch.sort(index.reshape(-1))
    if way != "eager":
        return index.reshape(-1), None
    # the architectures' own loops take first choices first
    places = torch.arange(index.numel(), device=index.device).view(index.shape)
    return index.mT.reshape(-1), places.mT.reshape(-1)


def run_row_groups(
    base: ExpertsModule, way: str | None, x: Tensor, weight: Tensor, groups: Sequence[RowGroup], joint: bool
) -> Tensor:
    """The experts' outputs for all rows, weighted, computed as `base` computes.

    Args:
        way: the base's (see `implementation`). x: inputs `[R, H]`, in `row_order`; weight: theirs, `[R, 1]`.
        groups: where several have a row, it is the last one's; rows that none has are zeros.
        joint: apply activations to all rows at once, as the fast paths do.

    Returns:
        `[R, H]`.
    """

    def together(inputs: Tensor, compute: Callable[[RowGroup, Tensor], Tensor]) -> Tensor:
        made: Tensor | None = None
        for group in groups:
            given = inputs if group.rows is None else inputs[group.rows]
            made = group.put(compute(group, given), made, inputs.shape[0])
        assert made is not None
        return made

    if joint and way == "spread":
        every = torch.arange(len(x), device=x.device)
        rows = [every if group.rows is None else group.rows for group in groups]
        found = iter([group.module.spread(x, own, group.chosen) for group, own in zip(groups, rows, strict=True)])  # type: ignore
        return together(x, lambda group, inputs: next(found)) * weight
    if not joint or way in ("eager", None):

        def whole(group: RowGroup, inputs: Tensor) -> Tensor:
            # a loop weights before it rounds to the dtype that it is given: it matters under autocast
            own = weight if group.rows is None else weight[group.rows]
            return _run(base, way, group, inputs, own if way == "eager" else torch.ones_like(inputs[:, :1]))

        return together(x, whole) if way == "eager" else together(x, whole) * weight
    ends = {id(group): _ends(way, group.module, group.chosen) for group in groups}

    def linear(inputs: Tensor, name: str) -> Tensor:
        return together(inputs, lambda group, own: _linear(group.module, own, group.chosen, name, ends[id(group)]))

    return _chain(base, x, linear) * weight


def sum_rows(way: str | None, weighted: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up each token's weighted rows `[T, K, H]` as the base does, `[T, H]` in `dtype`.

    The architectures' loops add in ascending order of the experts and round after each; the fast paths add in one sum.
    """
    if way not in ("eager", "sorted"):
        return weighted.sum(dim=1).to(dtype)
    rows = weighted.to(dtype)
    ascending = torch.argsort(index, dim=1, stable=True)
    every = torch.arange(index.shape[0], device=index.device)
    total = torch.zeros_like(rows[:, 0])
    for choice in range(index.shape[1]):
        total = total + rows[every, ascending[:, choice]]
    return total


def implementation(base: ExpertsModule, index: Tensor | None = None) -> str | None:
    """How `base` runs its experts, for rows `index [T, K]` or in general; None: by code that cannot be taken apart.

    "eager", "grouped_mm" or "batched_mm"; adopted ones also "sorted" (as "grouped_mm", added up as "eager"), "spread"
    (each expert is handed all rows, as zeros where they are not its own).
    """
    if isinstance(base, ViewedExperts):
        each = index is not None and base.takes_each_row(index)
        return "batched_mm" if each else "grouped_mm" if base.packed else base.implementation  # type: ignore
    way = IMPLEMENTATIONS.get(implementation_name(base.config))
    return "eager" if way is None else FAST_PATHS.get(way)


def asks_nothing(base: ExpertsModule, way: str | None, x: Tensor) -> bool:
    """Whether the base's own way of running rows `x [R, H]` never asks the device where they go, and a row's bits do
    not depend on how many others its expert has. So it is with products of single rows, and, as measured on an H100,
    with grouped ones of bf16; other dtypes' are a loop that asks."""
    if way == "batched_mm":
        return True
    grouped = way == "grouped_mm" and not is_packed(base)
    return grouped and (torch.compiler.is_compiling() or (x.is_cuda and x.dtype == torch.bfloat16))


def with_bank(base: ExpertsModule, bank: Mapping[str, Tensor]) -> ExpertsModule:
    """`base` with the stacks of `bank`, cast to the base's dtype, in the place of its own."""
    if isinstance(base, ViewedExperts):
        return base.replaced({name: bank[name].to(stack.dtype) for name, stack in expert_stacks(base).items()})
    own = base._parameters
    stacks = {name: weight.to(own[name].dtype) for name, weight in bank.items()}
    module: Any = object.__new__(type(base))
    # a shallow copy shares its dicts with the base: give it its own before anything is put into them
    vars(module).update(vars(base), _parameters={**own, **stacks}, num_experts=next(iter(stacks.values())).shape[0])
    vars(module).pop("forward", None)
    return module


def _run(base: ExpertsModule, way: str | None, group: RowGroup, x: Tensor, weight: Tensor) -> Tensor:
    module = group.module
    if way in ("grouped_mm", "sorted"):
        # not by its own forward, whose sort would reorder equals
        ends = _ends(way, module, group.chosen)
        return _chain(module, x, lambda inputs, name: _linear(module, inputs, group.chosen, name, ends))
    run = module if module is base else partial(type(module).forward, module)
    return run(x, group.chosen[:, None], weight)


def _chain(module: ExpertsModule, x: Tensor, linear: Any) -> Tensor:
    """Both matrices and what is between and after them."""
    inner = module._apply_gate(linear(x, "gate_up_proj")) if module.has_gate else module.act_fn(linear(x, "up_proj"))
    output = linear(inner, "down_proj")
    return module.post_expert_norm(output) if module.has_post_expert_norm else output


def _ends(way: str | None, module: ExpertsModule, chosen: Tensor) -> Any:
    """Where the rows of each expert end, for ways that sort them; of negative experts, they are the first one's too."""
    if way != "grouped_mm":
        return None
    if is_packed(module):
        return module.ends_of(chosen)
    every = torch.arange(module.num_experts, device=chosen.device)
    return torch.searchsorted(chosen, every, right=True, out_int32=True)


def _linear(module: ExpertsModule, inputs: Tensor, chosen: Tensor, name: str, ends: Any) -> Tensor:
    """transformers' own product of rows `[N, I]` with their experts' matrices, by its fast paths."""
    if isinstance(module, ViewedExperts):
        return module.linear(inputs, chosen, name, *([ends] if module.packed else []))  # type: ignore
    held = module._parameters
    stack, bias = held[name], held[f"{name}_bias"] if module.has_bias else None
    if ends is None or bias is not None:
        chosen = chosen.clamp(0, module.num_experts - 1)
    bias = None if bias is None else bias[chosen]
    if ends is not None:
        return grouped_linear(inputs, stack, ends, bias=bias, is_transposed=module.is_transposed)
    return batched_linear(inputs, stack[chosen], bias=bias, is_transposed=module.is_transposed)
