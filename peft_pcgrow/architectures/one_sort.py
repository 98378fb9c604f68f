"""Run rows of an experts module and of a bank together: sorted once, multiplied once for each matrix, added up once.

The bank's experts and the base's are one row of matrices, the bank's first. Where `run_rows` follows the module to the
bit, this is for training, whose forward needs no bits, and for grouped products on a GPU, where a row's bits do not
depend on which rows are beside it. Nothing in it asks a GPU for a count.

The backward is by hand. With act = f(x A + a) and y = act B + b of a row at routing weight w whose token's error is d:
q = d Bᵀ gives the routing weight's gradient <act, q> + <b, d> = <y, d> without y, the error w q at act, and so those at
x, A and a; B's is (w act)ᵀ d, b's w d. The base's matrices get none. Shapes: T tokens, K experts per token, R = T * K
rows, E experts, G grown ones, H hidden, I inner.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from pcgrow_kernels.combine import combine_in_any_order
from pcgrow_kernels.dispatch import use_triton
from pcgrow_kernels.grouped import outer, product
from pcgrow_kernels.remap import remap
from pcgrow_kernels.swiglu import swiglu, swiglu_backward
from peft_pcgrow.architectures.experts import ExpertsModule, expert_stacks, first_matrix, is_adopted, is_packed
from peft_pcgrow.architectures.host import gates_by_silu
from peft_pcgrow.architectures.run_rows import implementation, with_bank

# columns of ones that sums are taken by, as products are: 16 bytes of bf16
WIDTH = 8


def kept_from(base: ExpertsModule, exact: bool, wanted: bool = True) -> str:
    """Why a bank's rows and the base's are not run here, in words; "": they are.

    Args:
        exact: whether the base's bits are promised. wanted: whether it is to be considered.
    """
    if not wanted:
        return "it was asked for"
    if is_packed(base) or is_adopted(base):
        return f"the experts are {'packed' if is_packed(base) else 'adopted'}"
    stacks, way = expert_stacks(base), implementation(base)
    device = next(iter(stacks.values())).device.type
    if way not in ("eager", "grouped_mm") or device not in ("cpu", "cuda"):
        return f"no grouped products replace {'its own implementation' if way is None else repr(way)} on {device!r}"
    if way == "eager" and device != "cpu":
        return "the implementation 'eager' is a loop; model.set_experts_implementation('grouped_mm') is not"
    if exact and (device == "cpu" or any(stack.dtype != torch.bfloat16 for stack in stacks.values())):
        return "evaluation gives the base's own bits"
    if way == "eager" and torch.is_autocast_enabled("cpu"):
        return "autocast reaches into the implementation 'eager'"
    own = vars(base)
    if way == "eager" and ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]):
        return "the base's experts have hooks, or a forward of their own"
    if {*stacks} != {*_names(base)} or base.has_post_expert_norm or hasattr(base, "parametrizations"):
        return "the experts hold more than two matrices and biases"
    if any(parameter.requires_grad for _, parameter in base.named_parameters()):
        return "the base's experts train"
    return ""


def _names(base: ExpertsModule) -> list[str]:
    matrices = [first_matrix(base), "down_proj"]
    return [*matrices, *(f"{name}_bias" for name in matrices if base.has_bias)]


def run(
    base: ExpertsModule,
    bank: Mapping[str, Tensor],
    slots: Tensor,
    taker: Tensor | None,
    routed: tuple[Tensor, Tensor, Tensor],
    exact: bool,
    again: Callable[..., Tensor],
) -> Tensor:
    """The experts' output, `[T, H]`.

    Args:
        bank: stacks by name, `[G, ...]`, in any dtype.
        slots: of each branch, the place in the bank of each of the base's experts, `[B, E]`.
        taker: branch of each row, -1: the base, `[T, K]`; None: as in `remap`.
        routed: hidden `[T, H]`, index `[T, K]` and weight `[T, K]`, as the base is called with.
        exact: add up as transformers' grouped products are.
        again: gives the same of a bank, hidden, index and weight, and can be differentiated twice.
    """
    hidden, index, weight = routed
    stacks, total = expert_stacks(base), base.num_experts
    names = _names(base)
    grown = len(bank["down_proj"])
    # nobody's rows are the last expert's, at weight 0: then every row is computed, and none holds what was in memory
    own = index.clamp(max=total - 1)
    order, inverse, ends = remap(own, taker, slots, grown)

    def differentiably(hidden: Tensor, weight: Tensor, *held: Tensor) -> Tensor:
        return again(dict(zip(names, held, strict=True)), hidden, own, weight)

    settings = base, exact, differentiably
    both = *(bank[name] for name in names), *(stacks[name] for name in names)
    weight = weight.masked_fill(index >= total, 0)
    return _OneSort.apply(settings, order, inverse, ends, hidden, weight, *both)  # type: ignore[return-value]


class _Layer(NamedTuple):
    """One of the two layers of all experts: stacks of matrices, the bank's and the base's, and of biases."""

    stacks: Sequence[Tensor]
    biases: Sequence[Tensor]
    turned: bool

    def alone(self) -> "_Layer":
        """The bank's."""
        return _Layer(self.stacks[:1], self.biases[:1], self.turned)

    def __call__(self, x: Tensor, ends: Tensor, rows: Tensor | None = None) -> Tensor:
        made = product(x, self.stacks, ends, self.turned, rows)
        return made.add_(self.added(ends, len(made))) if self.biases else made

    def added(self, ends: Tensor, rows: int) -> Tensor:
        """The bias of each sorted row."""
        place = torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)
        return torch.cat([*self.biases])[place.clamp(max=len(ends) - 1)]

    def back(self, error: Tensor, ends: Tensor, rows: Tensor | None = None) -> Tensor:
        return product(error, self.stacks, ends, not self.turned, rows)


def _layers(base: ExpertsModule, held: Sequence[Tensor]) -> list[_Layer]:
    """Of what is given to `_OneSort`, the bank's in the base's dtype."""
    kinds, names = len(held) // 2, _names(base)
    cast = with_bank(base, dict(zip(names, held[:kinds], strict=True)))
    held = *(getattr(cast, name) for name in names), *held[kinds:]
    return [
        _Layer(held[place::kinds], held[place + 2 :: kinds] if base.has_bias else (), not base.is_transposed)
        for place in range(2)
    ]


class _OneSort(torch.autograd.Function):
    """Stacks are the bank's, then the base's: of each the two matrices, then their biases, if there are any.

    What comes of the first matrix is kept where errors go further down; else it is made again, of the bank's rows.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        settings: tuple,
        order: Tensor,
        inverse: Tensor,
        ends: Tensor,
        hidden: Tensor,
        weight: Tensor,
        *held: Tensor,
    ) -> Tensor:
        base, exact, _ = settings
        first, last = _layers(base, held)
        pre = first(hidden.to(held[-1].dtype), ends, order // weight.shape[1])
        y = last(_activated(base, pre) if exact else _activated_in_any_bits(base, pre), ends)
        if exact:
            weighted = (y * weight.reshape(-1)[order].unsqueeze(-1))[inverse]
            output = weighted.view(*weight.shape, -1).sum(dim=1)
        else:
            output = combine_in_any_order(y, inverse.view(weight.shape), weight)
        ctx.settings = settings
        kept = (pre,) if any(ctx.needs_input_grad[4:6]) else ()
        ctx.save_for_backward(order, inverse, ends, hidden, weight, *held, *kept)
        return output.to(hidden.dtype)

    @staticmethod
    def backward(ctx, error: Tensor):
        base, _, again = ctx.settings
        order, inverse, ends, hidden, weight, *held = ctx.saved_tensors
        kept = [held.pop()] if len(held) % 2 else []
        kinds = len(held) // 2
        needs = ctx.needs_input_grad[4 : 6 + kinds]
        if torch.is_grad_enabled():
            found = _differentiably(again, [hidden, weight, *held[:kinds]], needs, error)
            return None, None, None, None, *found, *[None] * kinds
        first, last = _layers(base, held)
        dtype, choices, grown = held[-1].dtype, weight.shape[1], ends[: len(held[0])]
        tokens, error, x = order // choices, error.to(dtype), hidden.to(dtype)
        if not kept:
            # the bank's rows alone, which come first
            first, last, ends = first.alone(), last.alone(), grown
        pre = kept[0] if kept else first(x, ends, tokens)
        q = last.back(error, ends, tokens)
        tokens, scale = tokens[: len(q)], weight.reshape(-1)[order[: len(q)]].to(dtype)
        arrived, scaled, received = _through_activation(base, pre, q, scale, bool(kept))
        found: list[Tensor | None] = [None] * len(needs)
        if needs[0]:
            found[0] = combine_in_any_order(first.back(arrived, ends), inverse.view(weight.shape))
        if needs[1] and received is not None:
            if base.has_bias:
                received += (last.added(ends, len(order)) * error[tokens]).sum(-1)
            found[1] = received[inverse].view(weight.shape)
        if needs[2]:
            found[2] = outer(arrived, x, grown, not first.turned, tokens)
        if needs[3]:
            found[3] = outer(scaled, error, grown, last.turned, tokens)
        if any(needs[4:]):
            scale = scale.unsqueeze(1)
            ones = torch.ones_like(scale).expand(-1, WIDTH).contiguous()
            found[4] = outer(ones, arrived, grown, False)[:, 0]
            found[5] = outer(ones * scale, error, grown, False, tokens)[:, 0]
        found = [g if g is None else g.to(t.dtype) for g, t in zip(found, (hidden, weight, *held), strict=False)]
        return None, None, None, None, *found, *[None] * kinds


def _activated(base: ExpertsModule, pre: Tensor) -> Tensor:
    return base._apply_gate(pre) if base.has_gate else base.act_fn(pre)


def _activated_in_any_bits(base: ExpertsModule, pre: Tensor) -> Tensor:
    """The same, by a kernel where there is one."""
    return swiglu(pre) if gates_by_silu(base) and use_triton(pre) else _activated(base, pre)


def _through_activation(
    base: ExpertsModule, pre: Tensor, q: Tensor, scale: Tensor, kept: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The error at what the activation was made of, from `scale * q` at it; the activation times `scale`, `[R, I]`; and
    `<activation, q>`, `[R]`, if `pre` was kept for that.

    Args:
        pre: what it was made of, `[R, 2 I]` or `[R, I]`. q: `[R, I]`; it may be written over. scale: `[R]`. kept:
            whether `pre` is of the forward, and may be asked for again; else it may be written over, too.
    """
    if gates_by_silu(base) and use_triton(pre, q, scale):
        return swiglu_backward(pre, q, scale, spare=not kept)
    scale = scale.unsqueeze(1)
    if gates_by_silu(base):
        gate, up = pre.chunk(2, dim=-1)
        act, arrived = silu(gate), torch.empty_like(pre)
        of_gate, of_up = arrived.chunk(2, dim=-1)
        error = q * scale
        torch.mul(error, act, out=of_up)
        torch.ops.aten.silu_backward.grad_input(error.mul_(up), gate, grad_input=of_gate)
        del error
        act.mul_(up)
        received = (act * q).sum(-1) if kept else None
        return arrived, act.mul_(scale), received
    with torch.enable_grad():
        pre = pre.detach().requires_grad_()
        act = _activated(base, pre)
        arrived = torch.autograd.grad(act, pre, q * scale)[0]
    act = act.detach()
    return arrived, act * scale, (act * q).sum(-1) if kept else None


def _differentiably(
    again: Callable[..., Tensor], given: Sequence[Tensor], needs: Sequence[bool], error: Tensor
) -> list[Tensor | None]:
    """The gradients that a backward `needs` which is to be differentiated itself."""
    # views: the routing weights may hang on the hidden states themselves
    given = [tensor.view_as(tensor) for tensor in given]
    wanted = [tensor for tensor, needed in zip(given, needs, strict=True) if needed]
    made = iter(torch.autograd.grad(again(*given), wanted, error, create_graph=True, allow_unused=True))
    return [next(made) if needed else None for needed in needs]
