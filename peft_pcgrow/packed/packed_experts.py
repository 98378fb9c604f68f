"""Experts that are kept packed: each in a form of its own, read one at a time, never as a whole stack in 16 bits.

A packed experts module still is an instance of its architecture's class, follows the experts contract, and looks as if
it held stacks `[E, ...]` of full width (see `StackView`), so that it can be measured and grown like any other.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pcgrow_kernels import lowbit
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.adoption import change_class
from peft_pcgrow.architectures.experts import ExpertsModule
from peft_pcgrow.architectures.stack_view import StackView, ViewedExperts
from peft_pcgrow.atomic import all_or_nothing
from peft_pcgrow.packed.each_row import each_row
from peft_pcgrow.packed.forms import WHOLE, Form, first_neurons, full_matrix, matrix_shape
from peft_pcgrow.packed.grouped import grouped_product, joined

# not the adapters' prefix, by which loaders tell their tensors from the base's
PREFIX = "packed_"
# what packing changes within a module's attributes
CHANGED = ("_parameters", "_buffers", "_non_persistent_buffers_set")
# bytes of matrices that are decoded at a time, if it is more than one: on CPUs, what stays in the caches
DECODED, DECODED_ON_CPU = 64 * 2**20, 4 * 2**20
# devices whose answers the host need not wait for
AT_HAND = ("cpu",)


class _PackedLinear(torch.autograd.Function):
    """Rows `x [R, I]`, sorted by expert, times packed matrices, `[R, O]`; the backward decodes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: "PackedExperts", stack: str, ends: list[int]) -> Tensor:
        ctx.source = module, stack, ends
        return module.packed_product(x, stack, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        module, stack, ends = ctx.source
        return module.packed_product(gradients[0], stack, ends, back=True), None, None, None


class PackedExperts(ViewedExperts):
    """Mixed into an architecture's experts class by `pack`; see there."""

    pcgrow_like: Tensor
    # what is stored in 16 bits is of this type
    pcgrow_half: torch.dtype
    forms: tuple[Form, ...]
    packed = True

    @property
    def stack_views(self) -> dict[str, Any]:
        module: Any = self
        return {
            name: (self.dense or {}).get(name, StackView(shape, self.pcgrow_like, partial(self.full_matrix, name)))
            for name, shape in module.pcgrow_shapes.items()
        }

    def matrix(self, stack: str, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """One expert's matrix `[O, I]` without the neurons that are gone, as `lowbit.decode` reads it."""
        return self._matrices(stack, [expert], dtype)[0]

    def _matrices(self, stack: str, chosen: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        """The matrices of some experts of one form, `[G, O, I]`."""
        module: Any = self
        form, offsets, data = self.forms[chosen[0]], module.pcgrow_offsets[stack], module._buffers[PREFIX + stack]
        shape = self.shape_of(stack, form)
        size = lowbit.size(*shape, form.width, form.sparsity)
        # bytes that lie side by side are not copied
        spans = [
            data[offsets[first] : offsets[last - 1] + size] for first, last in joined([(e, e + 1) for e in chosen])
        ]
        found = spans[0] if len(spans) == 1 else torch.cat(spans)
        return lowbit.decode(found.view(len(chosen), size), *shape, form.width, form.sparsity, dtype, self.pcgrow_half)

    def _chunks(self, stack: str, ends: Sequence[int], dtype: torch.dtype) -> Iterator[list[int]]:
        """The experts that have rows and are not gone, some of one form at a time."""
        starts, by_form = (0, *ends), {}
        for expert, form in enumerate(self.forms):
            if starts[expert] < ends[expert] and form.neurons != 0:
                by_form.setdefault(form, []).append(expert)
        most = DECODED_ON_CPU if self.pcgrow_like.device.type == "cpu" else DECODED
        for form, hit in by_form.items():
            outputs, inputs = self.shape_of(stack, form)
            count = max(1, most // (outputs * inputs * dtype.itemsize))
            if Form(neurons=form.neurons) == form and dtype == self.pcgrow_half:
                # read where they are: as many as lie side by side
                for first, last in joined([(expert, expert + 1) for expert in hit]):
                    yield list(range(first, last))
            else:
                yield from (hit[i : i + count] for i in range(0, len(hit), count))

    def packed_product(self, x: Tensor, stack: str, ends: Sequence[int], back: bool = False) -> Tensor:
        """`x [R, I]` times each row's matrix, `[R, O]`, zeros for rows of experts that are gone and for what thinned
        experts lack; back: gradients `[R, O]` times the matrices, `[R, I]`.

        Args:
            ends: where the rows of each expert end, `[E]`. Rows beyond belong to no expert.
        """
        outputs, inputs = self.shape_of(stack, WHOLE)
        made = x.new_empty(len(x), inputs if back else outputs)
        starts = (0, *ends)
        made[ends[-1] :] = 0
        for expert, form in enumerate(self.forms):
            if form.neurons == 0:
                made[starts[expert] : ends[expert]] = 0
        for chunk in self._chunks(stack, ends, x.dtype):
            spans = [(starts[expert], ends[expert]) for expert in chunk]
            blocks = joined(spans)
            rows = torch.cat([x[start:end] for start, end in blocks]) if len(blocks) > 1 else x[slice(*blocks[0])]
            left = self.forms[chunk[0]].neurons
            columns = None if left is None else self.columns(stack, left)
            # neurons are what leaves the first matrix and what enters the second
            narrow = (stack == "down_proj") != back
            if columns is not None and narrow:
                rows = rows.index_select(1, columns)
            places = list(accumulate(end - start for start, end in spans))
            y = grouped_product(rows, self._matrices(stack, chunk, x.dtype), places, turned=not back)
            if columns is not None and not narrow:
                y = y.new_zeros(len(y), made.shape[1]).index_copy(1, columns, y)
            if len(rows) == len(made):
                return y
            for (start, end), piece in zip(blocks, y.split([end - start for start, end in blocks]), strict=True):
                made[start:end] = piece
        return made

    def shape_of(self, stack: str, form: Form) -> tuple[int, int]:
        """`matrix_shape`, looked up once."""
        found: dict[tuple[str, Form], tuple[int, int]] = self.__dict__.setdefault("_shapes", {})
        if (stack, form) not in found:
            module: Any = self
            found[stack, form] = matrix_shape(module, stack, form)
        return found[stack, form]

    def columns(self, stack: str, left: int) -> Tensor:
        """Where the first neurons lie on a matrix's own axis of neurons, looked up once."""
        found: dict[Any, Tensor] = self.__dict__.setdefault("_places", {})
        key = stack, left, self.pcgrow_like.device
        if key not in found:
            module: Any = self
            found[key] = first_neurons(module, stack, left)[1]
        return found[key]

    def full_matrix(self, stack: str, expert: int) -> Tensor:
        """The same in the stack's own layout and dtype, zeros where neurons are gone."""
        module: Any = self
        found = self.matrix(stack, expert, self.pcgrow_like.dtype) if self.forms[expert].neurons != 0 else None
        return full_matrix(module, stack, self.forms[expert], found)

    def packed_buffers(self) -> dict[str, Tensor]:
        """What is stored, by stack."""
        module: Any = self
        return {name: module._buffers[PREFIX + name] for name in module.pcgrow_shapes}

    def packed_bytes(self, stack: str) -> int:
        """Bytes that a stack takes in its experts' forms."""
        shapes = (self.shape_of(stack, form) for form in self.forms)
        return sum(lowbit.size(*s, form.width, form.sparsity) for s, form in zip(shapes, self.forms, strict=True))

    def replaced(self, stacks: Mapping[str, Tensor]) -> Any:
        module: Any = copy.copy(self)
        named = module.pcgrow_shapes
        module.__dict__["_parameters"] = {
            **module._parameters,
            **{name: stack for name, stack in stacks.items() if name not in named},
        }
        module.dense = {name: stack for name, stack in stacks.items() if name in named}
        module.num_experts = len(next(iter(stacks.values())))
        return module

    @contextmanager
    def composed_once(self) -> Iterator[None]:
        every = torch.arange(len(self.forms), device="cpu")
        self.dense = {name: stack[every] for name, stack in self.stack_views.items()}
        try:
            yield
        finally:
            self.dense = None

    def linear(self, x: Tensor, chosen: Tensor, stack: str, ends: list[int] | None = None) -> Tensor:
        """The product of rows with their experts' matrices, and the bias, `[R, O]`.

        Args:
            x: `[R, I]`. chosen: expert of each, `[R]`; from `num_experts` on: none, and what comes out means nothing.
            ends: see `ends_of`, of ascending `chosen`, whose rows of no expert are zeros. None: see `takes_each_row`.
        """
        module: Any = self
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if ends is None:
            y = each_row(module, x, chosen.clamp(0, module.num_experts - 1), stack)
        elif self.dense is not None:
            weights = self.dense[stack].to(x.dtype)
            # laid out as decoded ones are: few rows are multiplied in another order otherwise
            weights = weights.mT.contiguous() if module.is_transposed else weights
            # rows of no expert would be left as they are in memory
            y = grouped_product(x[: ends[-1]], weights, ends, turned=True)
            y = pad(y, (0, 0, 0, len(x) - ends[-1])) if ends[-1] < len(x) else y
        else:
            y = _PackedLinear.apply(x, self, stack, ends)
        if not module.has_bias:
            return y
        return y + getattr(module, f"{stack}_bias")[chosen.clamp(0, module.num_experts - 1)].to(y.dtype)

    def takes_each_row(self, index: Tensor) -> bool:
        """Whether rows `index [T, K]` are so few that each is multiplied by a matrix decoded for itself, no more of
        them than there are experts: a token that is decoded on a GPU never waits for the host to read where it goes.
        """
        few = index.numel() * len({*self.forms}) <= len(self.forms)
        return few and index.device.type not in AT_HAND and not torch.is_grad_enabled()

    def ends_of(self, chosen: Tensor) -> list[int]:
        """Where the rows of each expert end, of rows sorted by expert `chosen [R]`."""
        module: Any = self
        every = torch.arange(module.num_experts, device=chosen.device)
        return torch.searchsorted(chosen, every, right=True).tolist()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' `grouped_mm_experts_forward`, step by step: an adapter's rows are run in the same order."""
        module: Any = self
        tokens, choices = top_k_index.shape
        if self.takes_each_row(top_k_index):
            chosen, order, ends = top_k_index.reshape(-1), None, None
        else:
            chosen, order = torch.sort(top_k_index.reshape(-1))
            ends = self.ends_of(chosen)
        first = experts.first_matrix(module)
        given = hidden_states.repeat_interleave(choices, dim=0) if order is None else hidden_states[order // choices]
        inner = self.linear(given, chosen, first, ends)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        y = self.linear(inner, chosen, "down_proj", ends)
        y = module.post_expert_norm(y) if module.has_post_expert_norm else y
        weight = top_k_weights.reshape(-1)
        weighted = y * (weight if order is None else weight[order]).unsqueeze(-1)
        if ends is None or ends[-1] < len(chosen):
            # sentinels of expert parallelism
            weighted = weighted.masked_fill((chosen >= module.num_experts).unsqueeze(1), 0)
        weighted = weighted if order is None else weighted[torch.argsort(order)]
        return weighted.view(tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)


@cache
def packed_class(kind: type) -> type:
    return type(f"Packed{kind.__name__}", (PackedExperts, kind), {"__module__": kind.__module__})


def pack(
    base: Any,
    forms: Sequence[Form],
    data: Mapping[str, Sequence[Tensor]] | None = None,
    half: torch.dtype = torch.bfloat16,
) -> None:
    """Turn an experts module into a packed one, in place; it is as it was after an error or an interruption.

    Args:
        base: an experts module, not packed yet.
        forms: of each expert.
        data: per stack of matrices, what `lowbit.encode` made of each expert. None: buffers of the right sizes whose
            values are still to be loaded.
        half: that `data` was encoded with.

    Raises:
        ValueError: as many forms as experts are needed.
    """
    if len(forms) != base.num_experts:
        raise ValueError(f"{len(forms)} forms for {base.num_experts} experts")
    expert_stacks = experts.expert_stacks(base)
    stacks = {name: expert_stacks[name] for name in experts.matrices(base)}
    like = next(iter(stacks.values()))
    buffers, offsets = {}, {}
    for name in stacks:
        sizes = [lowbit.size(*matrix_shape(base, name, form), form.width, form.sparsity) for form in forms]
        offsets[name] = [sum(sizes[:expert]) for expert in range(len(sizes))]
        if data is None:
            buffers[name] = torch.zeros(sum(sizes), dtype=torch.uint8, device=like.device)
        else:
            assert [len(piece) for piece in data[name]] == sizes
            buffers[name] = torch.cat(list(data[name])).to(like.device)
    with all_or_nothing() as undo:
        undo.append(as_it_is(base))
        if experts.is_adopted(base):
            base.let_go()
        gone = [expert for expert, form in enumerate(forms) if form.neurons == 0]
        for name in expert_stacks.keys() - stacks.keys():
            if not (bias := getattr(base, name)).is_meta:
                bias.data[gone] = 0
        base.pcgrow_names = tuple(expert_stacks)
        base.pcgrow_shapes = {name: stack.shape for name, stack in stacks.items()}
        base.pcgrow_offsets, base.pcgrow_half = offsets, half
        base.forms, base.dense = tuple(forms), None
        for name, buffer in buffers.items():
            base._parameters.pop(name, None)
            base.register_buffer(PREFIX + name, buffer)
        # tells the dtype and device that the stacks would have
        base.register_buffer("pcgrow_like", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)
        change_class(base, packed_class(type(base)))


def as_it_is(base: ExpertsModule) -> Callable[[], None]:
    """What makes an experts module what it is now, with the same tensors, after it was packed."""
    weights = [owner[name] for owner, name in experts.weight_places(base)]
    return partial(_restore, base, type(base), _copied(base.__dict__), weights)


def _restore(base: ExpertsModule, kind: type, held: dict[str, Any], weights: list[Any]) -> None:
    for (owner, name), weight in zip(experts.weight_places(base), weights, strict=True):
        owner[name] = weight
    base.__class__ = kind
    base.__dict__.clear()
    base.__dict__.update(_copied(held))


def _copied(held: dict[str, Any]) -> dict[str, Any]:
    """With the containers that packing changes of its own; hooks stay where their handles look for them."""
    return {name: value.copy() if name in CHANGED else value for name, value in held.items()}
