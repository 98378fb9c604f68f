"""Experts on the meta device: they make what the real ones make, in the same order, and compute nothing.

With a bank they follow `architectures.one_sort`, line by line; without one, transformers' grouped products; adopted
ones, which have no single sort, the products of either rows apart. An expert is taken to have as many rows as any
other. Shapes: T tokens, K experts per token, R = T K rows, G grown experts, H hidden, I inner.
"""

from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.experts import (
    ExpertsModule,
    expert_stacks,
    first_matrix,
    input_width,
    intermediate_size,
    is_adopted,
)


class MetaExperts(nn.Module):
    """What stands in for an experts module.

    Args:
        base: on the meta device. grown: how many of its experts have grown. device: whose kernels are followed, "cpu"
            or "cuda".
    """

    def __init__(self, base: ExpertsModule, grown: int, device: str):
        super().__init__()
        self.base, self.cuda = (base,), device == "cuda"  # type: ignore
        self.share = grown / base.num_experts
        self.hidden, self.inner = input_width(base, first_matrix(base)), intermediate_size(base)
        self.outer = self.inner * (2 if base.has_gate else 1)
        shapes = {name: tuple(stack.shape[1:]) for name, stack in expert_stacks(base).items()}
        self.dtype = next(iter(expert_stacks(base).values())).dtype
        self.count = base.num_experts + grown
        meta: Any = {"device": "meta", "dtype": torch.float32}
        self.bank = nn.ParameterList([torch.empty(grown, *shape, **meta) for shape in shapes.values() if grown])

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if len(self.bank) and not is_adopted(self.base[0]):
            return _OneSort.apply(self, hidden, index, weight, *self.bank)  # type: ignore[return-value]
        rows = hidden[index.reshape(-1)] if index.shape[1] > 1 else hidden
        order = torch.empty_like(index).view(-1)
        bank = [stack.to(self.dtype) for stack in self.bank if stack.dim() == 3] or [None, None]
        pre = _Product.apply(rows, self.outer, self.share, bank[0])
        y = _Product.apply(self.activated(pre), self.hidden, self.share, bank[1])
        if index.shape[1] == 1:
            return y * weight
        return (y * weight.view(-1, 1))[order].view(*index.shape, -1).sum(1).to(hidden.dtype)

    def activated(self, pre: Tensor) -> Tensor:
        base = self.base[0]
        return base._apply_gate(pre) if base.has_gate else base.act_fn(pre)

    def product(self, x: Tensor, rows: int, width: int, gathers: bool, both: bool = True) -> Tensor:
        """As `pcgrow_kernels.grouped.product`, of the bank's rows and the base's, or of the bank's alone."""
        if not self.cuda:
            return x.new_empty(rows, width)
        given = x.new_empty(rows, x.shape[1]) if gathers else x
        if not both:
            return given.new_empty(rows, width)
        if 2 * self.count * x.shape[1] < 3 * rows:
            x.new_empty(self.count, x.shape[1], width)  # both stacks as one
            return given.new_empty(rows, width)
        first, second = x.new_empty(rows, width), x.new_empty(rows, width)
        return torch.where(first > 0, first, second)

    def gradient(self, a: Tensor, b: Tensor, like: Tensor, gathers: bool) -> Tensor:
        """As `pcgrow_kernels.grouped.outer`."""
        given = b.new_empty(len(a), b.shape[1]) if self.cuda and gathers else b
        return given.new_empty(like.shape).to(like.dtype)


class _OneSort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, experts: MetaExperts, hidden: Tensor, index: Tensor, weight: Tensor, *bank: Tensor):  # type: ignore[override]
        rows = index.numel()
        order, inverse = torch.empty_like(index), torch.empty_like(index)
        cast = [stack.to(experts.dtype) for stack in bank]
        pre = experts.product(hidden, rows, experts.outer, True)
        y = experts.product(experts.activated(pre), rows, experts.hidden, False)
        output = y.new_empty(hidden.shape)
        kept = (pre,) if any(ctx.needs_input_grad[1:4]) else ()
        ctx.experts, ctx.count = experts, len(cast)
        ctx.save_for_backward(order, inverse, hidden, weight, *bank, *kept)
        return output

    @staticmethod
    def backward(ctx, error: Tensor):
        experts: MetaExperts = ctx.experts
        order, _, hidden, weight, *held = ctx.saved_tensors
        bank, kept = held[: ctx.count], held[ctx.count :]
        cast = [stack.to(experts.dtype) for stack in bank]
        all_rows, needs = order.numel(), ctx.needs_input_grad
        own = max(1, round(all_rows * experts.share))
        rows = all_rows if kept or experts.cuda else own
        pre = kept[0] if kept else experts.product(hidden, rows, experts.outer, True, both=False)
        q = experts.product(error, rows, experts.inner, True, both=bool(kept))
        scaled = q * q.new_empty(rows, 1)
        act, arrived = torch.empty_like(scaled), torch.empty_like(pre)
        del scaled
        down = experts.product(arrived, rows, experts.hidden, False) if needs[1] else None
        entered = None if down is None else down.new_empty(hidden.shape)
        del down
        weighted = (act * q).new_empty(weight.shape) if needs[3] else None
        wide = [place for place, stack in enumerate(bank) if stack.dim() == 3]
        found: list[Tensor | None] = [torch.empty_like(stack) for stack in bank]
        found[wide[0]] = experts.gradient(arrived, hidden, bank[wide[0]], True)
        found[wide[1]] = experts.gradient(act * q, error, bank[wide[1]], True)
        del cast
        return None, entered, None, weighted, *found


class _Product(torch.autograd.Function):
    """Rows times matrices that do not train, but for a bank's, which gets a share of the rows."""

    @staticmethod
    def forward(ctx, x: Tensor, width: int, share: float, bank: Tensor | None):  # type: ignore[override]
        ctx.save_for_backward(*(() if bank is None else (x.new_empty(int(len(x) * share), x.shape[1]), bank)))
        ctx.width = x.shape[1]
        return x.new_empty(len(x), width)

    @staticmethod
    def backward(ctx, error: Tensor):
        entered = error.new_empty(len(error), ctx.width) if ctx.needs_input_grad[0] else None
        return entered, None, None, (torch.empty_like(ctx.saved_tensors[1]) if ctx.needs_input_grad[3] else None)
