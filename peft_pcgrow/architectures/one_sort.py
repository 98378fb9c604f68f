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
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from pcgrow_kernels.grouped import outer, product
from pcgrow_kernels.remap import combine, remap
from peft_pcgrow.architectures.experts import ExpertsModule, expert_stacks, first_matrix, is_adopted, is_packed
from peft_pcgrow.architectures.host import gates_by_silu
from peft_pcgrow.architectures.run_rows import implementation

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
    if way == "eager" and ("forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks):
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
    taker: Tensor,
    routed: tuple[Tensor, Tensor, Tensor],
    exact: bool,
    again: Callable[..., Tensor],
) -> Tensor:
    """The experts' output, `[T, H]`.

    Args:
        bank: stacks by name, `[G, ...]`, in the base's dtype.
        slots: of each branch, the place in the bank of each of the base's experts, `[B, E]`.
        taker: branch of each row, -1: the base, `[T, K]`.
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
    return _OneSort.apply(settings, hidden, weight, order, inverse, ends, *both)  # type: ignore[return-value]


class _OneSort(torch.autograd.Function):
    """Of the stacks, each a pair of the bank's and the base's: two matrices, then their biases, if there are any."""

    @staticmethod
    def forward(ctx, settings: tuple, hidden: Tensor, weight: Tensor, *held: Tensor) -> Tensor:  # type: ignore[override]
        base, exact, _ = settings
        (order, inverse, ends), stacks = held[:3], held[3:]
        first, last, *biases = _pairs(stacks)
        turned, dtype, choices = not base.is_transposed, first[0].dtype, weight.shape[1]
        pre = product(hidden.to(dtype), first, ends, turned, order // choices)
        if biases:
            pre += torch.cat(biases[0])[_matrices(ends, order)]
        y = product(_activated(base, pre), last, ends, turned)
        if biases:
            y += torch.cat(biases[1])[_matrices(ends, order)]
        if exact:
            weighted = (y * weight.reshape(-1)[order].unsqueeze(-1))[inverse]
            output = weighted.view(*weight.shape, -1).sum(dim=1)
        else:
            output = combine(y, inverse, choices, weight)
        ctx.settings = settings
        ctx.save_for_backward(hidden, weight, *held, pre)
        return output.to(hidden.dtype)

    @staticmethod
    def backward(ctx, error: Tensor):
        if torch.is_grad_enabled():
            return _differentiably(ctx, error)
        base, *_ = ctx.settings
        hidden, weight, order, inverse, ends, *stacks, pre = ctx.saved_tensors
        needs_hidden, needs_weight, _, _, _, *needs = ctx.needs_input_grad[1:]
        first, last, *biases = _pairs(stacks)
        turned, dtype, choices = not base.is_transposed, pre.dtype, weight.shape[1]
        grown, tokens, error = ends[: len(first[0])], order // choices, error.to(dtype)
        if not (needs_hidden or needs_weight):
            # the bank's rows alone, which come first
            first, last, ends = first[:1], last[:1], grown
        q = product(error, last, ends, not turned, tokens)
        count = len(q)
        tokens, scale = tokens[:count], weight.reshape(-1)[order[:count]].unsqueeze(1).to(dtype)
        act, arrived = _through_activation(base, pre[:count], q * scale)
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if needs_hidden:
            found[1] = combine(product(arrived, first, ends, not turned), inverse, choices).to(hidden.dtype)
        if needs_weight:
            received = (act * q).sum(-1)
            if biases:
                received += (torch.cat(biases[1])[_matrices(ends, order)] * error[tokens]).sum(-1)
            found[2] = received[inverse].view(weight.shape).to(weight.dtype)
        if any(needs):
            ones = torch.ones_like(scale).expand(-1, WIDTH).contiguous()
            gradients = (
                outer(arrived, hidden.to(dtype), grown, not turned, tokens),
                outer(act.mul_(scale), error, grown, turned, tokens),
                outer(ones, arrived, grown, False)[:, 0] if biases else None,
                outer(ones * scale, error, grown, False, tokens)[:, 0] if biases else None,
            )
            found[6 : 6 + len(needs) // 2] = gradients[: len(needs) // 2]
        return tuple(found)


def _pairs(stacks: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    half = len(stacks) // 2
    return [stacks[place::half] for place in range(half)]


def _matrices(ends: Tensor, order: Tensor) -> Tensor:
    """The matrix of each sorted row, `[R]`."""
    return torch.searchsorted(ends, torch.arange(len(order), device=ends.device), right=True)


def _through_activation(base: ExpertsModule, pre: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """What is between the matrices, `[R, I]`, and the error at what it was made of, from the one at it."""
    if gates_by_silu(base):
        gate, up = pre.chunk(2, dim=-1)
        act, arrived = silu(gate), torch.empty_like(pre)
        of_gate, of_up = arrived.chunk(2, dim=-1)
        torch.mul(error, act, out=of_up)
        torch.ops.aten.silu_backward.grad_input(error * up, gate, grad_input=of_gate)
        return act.mul_(up), arrived
    with torch.enable_grad():
        pre = pre.detach().requires_grad_()
        act = _activated(base, pre)
        return act.detach(), *torch.autograd.grad(act, pre, error)


def _activated(base: ExpertsModule, pre: Tensor) -> Tensor:
    return base._apply_gate(pre) if base.has_gate else base.act_fn(pre)


def _differentiably(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
    """The backward, for one that is to be differentiated itself."""
    hidden, weight, _, _, _, *stacks, _ = ctx.saved_tensors
    given = [hidden, weight, *stacks[: len(stacks) // 2]]
    places = [place for place in (1, 2, *range(6, 6 + len(given) - 2)) if ctx.needs_input_grad[place]]
    # views: the routing weights may hang on the hidden states themselves
    given = [tensor.view_as(tensor) for tensor in given]
    wanted = [
        tensor for tensor, place in zip(given, (1, 2, *range(6, 6 + len(given) - 2)), strict=True) if place in places
    ]
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    made = torch.autograd.grad(ctx.settings[2](*given), wanted, error, create_graph=True, allow_unused=True)
    for place, gradient in zip(places, made, strict=True):
        found[place] = gradient
    return tuple(found)
