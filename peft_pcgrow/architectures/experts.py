"""The seam to transformers: how its mixture-of-experts modules look (those that differ: `adopted_moe`).

The contract (transformers 5, `integrations/moe.py`): an experts module is called as
`experts(hidden [T, H], index [T, K], weight [T, K]) -> [T, H]` and keeps its weights in stacks whose first axis is the
expert. `use_experts_implementation` marks such modules; they are found by that mark, never by their path.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.adopted_experts import AdoptedExperts
from peft_pcgrow.architectures.expert_parallel import Share, count_experts
from peft_pcgrow.architectures.host import LOADED_IN
from peft_pcgrow.architectures.layout import StackLayout
from peft_pcgrow.architectures.plain_weight import loaded_quantized
from peft_pcgrow.architectures.sharded import whole
from peft_pcgrow.architectures.slices import Pieces
from peft_pcgrow.architectures.stack_view import StackView, ViewedExperts


class ExpertsModule(Protocol):
    """The contract above: what transformers' own experts, adopted ones and packed ones all offer.

    Each is an nn.Module, of which this says what is asked of experts; their weights are asked for by the functions
    below, whichever they are. `_apply_gate` is there if there is a gate, `post_expert_norm` if that is said.

    Attributes:
        has_gate: whether gate and up are one stack, `gate_up_proj`, else there is `up_proj`.
        is_transposed: whether matrices are `[E, I, O]`. is_concatenated: whether all of gate comes before all of up.
    """

    num_experts: int
    config: Any
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    act_fn: Any
    post_expert_norm: Any
    _parameters: dict[str, Any]

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor: ...

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor: ...

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Tensor]]: ...


class GrownExperts:
    """What stands around an experts module some of whose experts have grown; no other tuner's layer is one."""

    @property
    @abstractmethod
    def newborns(self) -> list[tuple[str, int]]:
        """(adapter, donor) of each newborn in use."""

    @abstractmethod
    def parent_of(self, adapter_name: str, donor: int) -> str | None:
        """The adapter whose newborn one of these takes its rows from; None: it takes the donor's."""

    @abstractmethod
    def nodes_of(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Which node computes each row of `index [T, K]`: its expert, or E + n for newborn n of `newborns`, `[T, K]`;
        E + N for rows that no expert is assigned to.

        Asked by those who watch, within a call of the decoder layer; what a gate remembers of the text stays as it was.
        """

    @abstractmethod
    def weights_in_use(self) -> dict[str, list[tuple[Tensor, tuple[int, ...] | None]]]:
        """Which tensors hold the weights in use: per stack, (tensor, nodes of its slices, numbered as by `nodes_of`;
        None for all experts). Of those that are shared out, the slices in this process, the last of which may be of no
        node.

        Composed weights are in use only inside `composed_once`.
        """

    @abstractmethod
    def composed_once(self) -> AbstractContextManager[None]:
        """Inside, composed weights are the same tensors in every forward, and leaves: their gradients can be asked
        for."""


def expert_stacks(base: ExpertsModule) -> dict[str, nn.Parameter]:
    """The weights that have one slice per expert, by name (`gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`, ...).

    Of packed or adopted experts, views that give the experts they are indexed with (see `StackView`).
    """
    views, total = _views(base), count_experts(base)
    found = views | {
        name: parameter
        for name, parameter in base.named_parameters(recurse=False)
        if name not in views and parameter.dim() > 1 and parameter.shape[0] == total
    }
    # in the order from before packing, which an adapter's parameters and so an optimizer's state follow
    return {name: found[name] for name in getattr(base, "pcgrow_names", found)}


def part(base: ExpertsModule) -> ExpertsModule:
    """The experts of a module that are in this process."""
    share = Share.of(base)
    return base if share is None else share.part(base)


def nodes_here(base: ExpertsModule) -> tuple[int, ...] | None:
    """The experts whose slices of a stack are in this process; None: all."""
    share = Share.of(base)
    return None if share is None else tuple(range(share.first, share.first + share.here))


def _views(base: ExpertsModule) -> dict[str, Any]:
    """What stands for stacks that are no tensors."""
    return base.stack_views if isinstance(base, ViewedExperts) else {}


def neuron_places(base: ExpertsModule, stack: str, neurons: Tensor) -> tuple[int, Tensor] | None:
    """The axis of a stack that intermediate neurons lie along, and the places of `neurons [..., N]` there.

    Twice as many places as neurons where gate and up are one stack: gate first, then up, or in turns. None: what this
    stack holds belongs to no neuron (the bias of the down projection).
    """
    first = first_matrix(base)
    if stack == "down_proj":
        return (1 if base.is_transposed else 2), neurons
    if stack not in (first, f"{first}_bias"):
        return None
    axis = 2 if base.is_transposed and stack == first else 1
    if not base.has_gate:
        return axis, neurons
    if base.is_concatenated:
        return axis, torch.cat([neurons, neurons + intermediate_size(base)], dim=-1)
    return axis, torch.stack([2 * neurons, 2 * neurons + 1], dim=-1).flatten(-2)


def first_matrix(base: ExpertsModule) -> str:
    """Name of the stack that tokens enter."""
    return "gate_up_proj" if base.has_gate else "up_proj"


def matrices(base: ExpertsModule) -> dict[str, list[str]]:
    """The stacks of matrices, each with its own name and that of its bias, if it has one."""
    names = expert_stacks(base)
    return {name: [n for n in (name, f"{name}_bias") if n in names] for name in names if not name.endswith("_bias")}


def intermediate_size(base: ExpertsModule) -> int:
    """Intermediate neurons of an expert, I."""
    return input_width(base, "down_proj")


def read_experts(base: ExpertsModule, experts: Sequence[int]) -> dict[str, Tensor]:
    """Copies of the slices of `experts`, `[len(experts), ...]` each."""
    return {
        name: stack.detach()[torch.tensor(experts, device=stack.device)] for name, stack in expert_stacks(base).items()
    }


def read_pieces(base: ExpertsModule, pieces: Mapping[str, Pieces]) -> dict[str, Tensor]:
    """Copies of some pieces of each stack; where it is sharded, all processes must call."""
    stacks, found, share = expert_stacks(base), {}, Share.of(base)
    for name, held in pieces.items():
        stack = stacks[name].detach()
        if share is not None:
            found[name] = share.read(stack, held)
        elif isinstance(stack, Tensor):
            found[name] = held.read(whole(stack))
        else:
            # packed: decode the experts in question only
            chosen, places = torch.unique(held.experts, return_inverse=True)
            found[name] = held.to(stack.device, places).read(stack[chosen])
    return found


@torch.no_grad()
def write_pieces(base: ExpertsModule, pieces: Mapping[str, Pieces], values: Mapping[str, Tensor]) -> None:
    """Overwrite some pieces of each stack in place, cast to the base's dtype."""
    stacks = expert_stacks(base)
    for name, held in pieces.items():
        stack = stacks[name]
        if isinstance(stack, Tensor):
            held.write(stack, values[name])
        else:
            chosen, places = torch.unique(held.experts, return_inverse=True)
            slices = stack[chosen]
            held.to(stack.device, places).write(slices, values[name])
            stack.write(chosen, slices)


def stack_inputs(base: ExpertsModule, x: Tensor, expert: int) -> dict[str, Tensor]:
    """What enters each of an expert's matrices for tokens `x [R, H]`: `[R, H]` or `[R, I]`, by the stack's name."""
    first, views = first_matrix(base), _views(base)
    weight = (views[first] if first in views else getattr(base, first))[expert].to(x.dtype)
    projected = x @ weight if base.is_transposed else x @ weight.mT
    if base.has_bias:
        name = f"{first}_bias"
        projected = projected + (views[name] if name in views else getattr(base, name))[expert].to(x.dtype)
    inner = base._apply_gate(projected) if base.has_gate else base.act_fn(projected)
    return {first: x, "down_proj": inner}


def input_width(base: ExpertsModule, stack: str) -> int:
    """Width of what enters a stack's matrices."""
    return expert_stacks(base)[stack].shape[1 if base.is_transposed else 2]


def stack_layouts(base: ExpertsModule) -> dict[str, StackLayout]:
    """Where the intermediate neurons are in each of the stacks."""
    layouts = {}
    for name in expert_stacks(base):
        lying = neuron_places(base, name, torch.arange(2, device="cpu"))
        if lying is None:
            layouts[name] = StackLayout(None)
            continue
        axis, places = lying
        copies = len(places) // 2
        layouts[name] = StackLayout(axis - 1, copies, copies == 2 and int(places[2]) == 2)
    return layouts


def is_adopted(base: Any) -> TypeGuard[Any]:
    """Whether these experts stand for a block that does not follow the contract."""
    return isinstance(base, AdoptedExperts)


def weight_places(base: ExpertsModule) -> list[tuple[dict[str, Any], str]]:
    """Of adopted experts: the dicts and keys of what holds their weights outside of the module itself."""
    return base.places() if is_adopted(base) else []


def is_packed(base: Any) -> TypeGuard[Any]:
    """Whether `compress` has packed these experts."""
    return isinstance(base, ViewedExperts) and base.packed


def is_quantized(base: ExpertsModule) -> bool:
    """Whether the model was loaded quantized, or these stacks were quantized or packed afterwards."""
    if loaded_quantized(base.config) or hasattr(base, "parametrizations") or is_packed(base):
        return True
    return any(is_read_only(stack) for stack in expert_stacks(base).values())


def was_cast_up(base: ExpertsModule) -> bool:
    """Whether a model loaded quantized holds these stacks in fp32 (transformers loads them in 16 bit)."""
    if is_packed(base):
        return False
    return is_quantized(base) and all(stack.dtype == torch.float32 for stack in expert_stacks(base).values())


def loaded_in_bits(base: ExpertsModule) -> int | None:
    """Bits that bitsandbytes loaded the model's linear layers in; None: it did not."""
    found = getattr(base.config, "quantization_config", None) or {}
    read = found if isinstance(found, Mapping) else vars(found)
    return next((bits for bits, name in LOADED_IN.items() if read.get(name) or read.get(name.removeprefix("_"))), None)


def text_config(config: Any) -> Any:
    """The part of a config that is about the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_read_only(stack: Any) -> bool:
    """Whether a stack is quantized in a way that cannot be written to."""
    return stack.read_only if isinstance(stack, StackView) else not stack.is_floating_point()
