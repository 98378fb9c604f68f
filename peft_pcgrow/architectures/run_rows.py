"""Run single rows of an experts module the way transformers runs them, to the bit.

A row is one token at one of its chosen experts. Matrix products and sums round differently in another order or with
another number of rows, and vectorized activations at the end of a tensor, so all of it follows the module's own way.
Shapes: T tokens, K experts per token, R = T * K rows, N some of them, G experts in a bank, H hidden.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.architectures.experts import ExpertsModule, expert_stacks, is_adopted, is_packed
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
        rows: their places among all R, ascending, `[N]`.
        chosen: expert of each, or its place in the bank, `[N]`.
        bank: stacks to use instead of the base's, `[G, ...]`, by name.
    """

    rows: Tensor
    chosen: Tensor
    bank: Mapping[str, Tensor] | None = None


def row_order(base: ExpertsModule, index: Tensor) -> Tensor:
    """The order in which `base` hands its rows (row t * K + k of `index [T, K]`) to the experts, `[R]`."""
    way = implementation(base)
    if way in ("grouped_mm", "sorted"):
        return torch.sort(index.reshape(-1)).indices
    rows = torch.arange(index.numel(), device=index.device)
    # the architectures' own loops take first choices first
    return rows.view(index.shape).mT.reshape(-1) if way == "eager" else rows


def run_row_groups(base: ExpertsModule, x: Tensor, groups: Sequence[RowGroup], source: Tensor, joint: bool) -> Tensor:
    """The experts' outputs for all rows, not yet weighted, computed as `base` computes.

    Args:
        x: inputs `[R, H]`, in `row_order`.
        groups: a row may be in several.
        source: of each row, which of the rows of all groups, one after the other, is its own, `[R]`; -1: none, and its
            output is zeros.
        joint: apply activations (and the products of batched_mm) to all rows at once, as the fast paths do.

    Returns:
        `[R, H]`.
    """
    modules: list[Any] = [with_bank(base, group.bank) for group in groups]

    def together(outputs: list[Tensor]) -> Tensor:
        return torch.cat([*outputs, torch.zeros_like(outputs[0][:1])])[source]

    if joint and implementation(base) == "spread":
        return together([m.spread(x, g.rows, g.chosen) for m, g in zip(modules, groups, strict=True)])
    if joint and implementation(base) == "batched_mm":
        # one product of all rows, as the base's own call: kernels are chosen by the number of rows
        return _chain(base, x, lambda inputs, name: _batched(base, inputs, modules, groups, source, name))
    if not joint or implementation(base) in ("eager", None):
        return together([_run(m, x[g.rows], g) for m, g in zip(modules, groups, strict=True)])

    def linear(inputs: Tensor, name: str) -> Tensor:
        return together([_linear(m, inputs[g.rows], g.chosen, name) for m, g in zip(modules, groups, strict=True)])

    return _chain(base, x, linear)


def sum_rows(base: ExpertsModule, weighted: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up each token's weighted rows `[T, K, H]` as `base` does, `[T, H]` in `dtype`.

    The architectures' loops add in ascending order of the experts and round after each; the fast paths add in one sum.
    """
    if implementation(base) not in ("eager", "sorted"):
        return weighted.sum(dim=1).to(dtype)
    rows = weighted.to(dtype)
    ascending = torch.argsort(index, dim=1, stable=True)
    every = torch.arange(index.shape[0], device=index.device)
    total = torch.zeros_like(rows[:, 0])
    for choice in range(index.shape[1]):
        total = total + rows[every, ascending[:, choice]]
    return total


def implementation(base: ExpertsModule) -> str | None:
    """How `base` runs its experts; None: by code that cannot be taken apart.

    "eager", "grouped_mm" or "batched_mm"; adopted ones also "sorted" (as "grouped_mm", added up as "eager"), "spread"
    (each expert is handed all rows, as zeros where they are not its own).
    """
    if is_packed(base):
        return "grouped_mm"
    if is_adopted(base):
        return base.implementation
    way = IMPLEMENTATIONS.get(implementation_name(base.config))
    return "eager" if way is None else FAST_PATHS.get(way)


def with_bank(base: ExpertsModule, bank: Mapping[str, Tensor] | None) -> ExpertsModule:
    """`base` with the stacks of `bank`, cast to the base's dtype, in the place of its own."""
    if bank is None:
        return base
    stacks = {name: bank[name].to(stack.dtype) for name, stack in expert_stacks(base).items()}
    if isinstance(base, ViewedExperts):
        return base.replaced(stacks)
    module = copy.copy(base)
    # a shallow copy shares its dicts with the base: give it its own before anything is put into them
    module.__dict__["_parameters"] = {**base._parameters, **stacks}
    module.__dict__.pop("forward", None)
    module.num_experts = next(iter(stacks.values())).shape[0]
    return module


def _run(module: ExpertsModule, x: Tensor, group: RowGroup) -> Tensor:
    if implementation(module) in ("grouped_mm", "sorted"):
        # not by its own forward, whose sort would reorder equals
        return _chain(module, x, lambda inputs, name: _linear(module, inputs, group.chosen, name))
    run = module if group.bank is None else partial(type(module).forward, module)
    return run(x, group.chosen[:, None], torch.ones_like(x[:, :1]))


def _chain(module: ExpertsModule, x: Tensor, linear: Any) -> Tensor:
    """Both matrices and what is between and after them."""
    inner = module._apply_gate(linear(x, "gate_up_proj")) if module.has_gate else module.act_fn(linear(x, "up_proj"))
    output = linear(inner, "down_proj")
    return module.post_expert_norm(output) if module.has_post_expert_norm else output


def _linear(module: ExpertsModule, inputs: Tensor, chosen: Tensor, name: str) -> Tensor:
    """transformers' own product of rows `[N, I]` with their experts' matrices, by its fast paths."""
    if is_packed(module) or (is_adopted(module) and module.implementation == "sorted"):
        return module.linear(inputs, chosen, name)
    stack, bias = getattr(module, name), getattr(module, f"{name}_bias")[chosen] if module.has_bias else None
    if implementation(module) == "grouped_mm":
        every = torch.arange(module.num_experts, device=chosen.device)
        ends = torch.searchsorted(chosen, every, right=True, out_int32=True)
        return grouped_linear(inputs, stack, ends, bias=bias, is_transposed=module.is_transposed)
    return batched_linear(inputs, stack[chosen], bias=bias, is_transposed=module.is_transposed)


def _batched(
    base: ExpertsModule,
    inputs: Tensor,
    modules: Sequence[ExpertsModule],
    groups: Sequence[RowGroup],
    source: Tensor,
    name: str,
) -> Tensor:
    """transformers' batched product of all rows `[R, I]`, each with the matrix of the group that it is taken from."""

    def gathered(stack: str) -> Tensor:
        first = getattr(base, stack)
        # rows that a group computes for others only go to the end, which is cut off
        held, computed = first.new_zeros(len(source) + 1, *first.shape[1:]), 0
        for module, group in zip(modules, groups, strict=True):
            places = torch.arange(computed, computed + len(group.rows), device=source.device)
            own = torch.where(source[group.rows] == places, group.rows, len(source))
            held.index_put_((own,), getattr(module, stack)[group.chosen])
            computed += len(group.rows)
        return held[:-1]

    bias = gathered(f"{name}_bias") if base.has_bias else None
    return batched_linear(inputs, gathered(name), bias=bias, is_transposed=base.is_transposed)
