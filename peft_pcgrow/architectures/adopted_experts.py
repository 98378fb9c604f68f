"""Experts modules for blocks that do not follow transformers' experts contract: they hold no weights of their own.

An adopted block keeps its parameters and their names, so checkpoints do not change. Its class becomes a subclass whose
forward goes through a child named `experts`, which follows the contract (see `experts`) and reads the block's weights
where they are. Shapes: T tokens, K experts per token, E experts, H hidden, I intermediate, O outputs of a matrix.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_pcgrow.architectures.host import EXPERTS_MARK, OLD_FORWARD, REPACKED, REPACKS, dequantize_bnb_weight
from peft_pcgrow.architectures.stack_view import StackView, ViewedExperts

# tokens that an adopted block is tried on
TRIED = 3


class AdoptedExperts(ViewedExperts, nn.Module):
    """The contract's flags, and stacks put together from a block's tensors.

    Attributes:
        kind: "routed", "shared" or "dense".
    """

    has_post_expert_norm = False
    is_concatenated = True
    # how `run` goes about it (see `rows`)
    implementation = "eager"

    def __init__(self, block: nn.Module, num_experts: int, act_fn: Any, config: Any, kind: str = "routed"):
        super().__init__()
        setattr(self, EXPERTS_MARK, False)
        # not registered as a child, which it is not
        self._held = (block,)
        self.num_experts, self.act_fn, self.config, self.kind = num_experts, act_fn, config, kind
        self.has_gate, self.has_bias, self.is_transposed = True, False, False

    @property
    def block(self) -> Any:
        return self._held[0]

    @abstractmethod
    def shape(self, stack: str) -> tuple[int, ...]:
        """Of a stack: `[E, O, I]`, `[E, I, O]` if transposed, `[E, O]` of biases."""

    @abstractmethod
    def views(self, stack: str) -> list[Tensor]:
        """Views of the block's weights, whose outputs one after another are the stack's."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor on the device of the weights, of their dtype."""

    @property
    def read_only(self) -> bool:
        """Whether the weights cannot be written to, because another library quantized them."""
        return False

    @abstractmethod
    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The contract, by the block's own code or to its bits."""

    @abstractmethod
    def one(self, x: Tensor, expert: int, stacks: Mapping[str, Tensor]) -> Tensor:
        """One expert's output `[R, H]` for rows `x [R, H]`, with `stacks` in the place of the block's own."""

    @property
    def names(self) -> tuple[str, ...]:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        return (first, f"{first}_bias", "down_proj", "down_proj_bias") if self.has_bias else (first, "down_proj")

    @property
    def stack_views(self) -> dict[str, Any]:
        return {name: (self.dense or {}).get(name, self._view(name)) for name in self.names}

    def _axis(self, stack: str) -> int:
        """Of one expert's slice: the axis that outputs lie along."""
        return 0 if stack.endswith("_bias") or not self.is_transposed else 1

    def _view(self, stack: str) -> StackView:
        return StackView(
            torch.Size(self.shape(stack)),
            self.like,
            partial(self._read, stack),
            None if self.read_only else partial(self._write, stack),
        )

    def _read(self, stack: str, expert: int) -> Tensor:
        return torch.cat([view[expert].detach() for view in self.views(stack)], dim=self._axis(stack))

    def _write(self, stack: str, expert: int, value: Tensor) -> None:
        views, axis = self.views(stack), self._axis(stack)
        shares = value.split([view.shape[axis + 1] for view in views], dim=axis)
        for view, share in zip(views, shares, strict=True):
            view[expert] = share.to(view.device, view.dtype)

    @contextmanager
    def composed_once(self) -> Iterator[None]:
        views = {name: [view.detach() for view in self.views(name)] for name in self.names}
        self.dense = {
            name: held[0] if len(held) == 1 else torch.cat(held, dim=self._axis(name) + 1)
            for name, held in views.items()
        }
        try:
            yield
        finally:
            self.dense = None

    def replaced(self, stacks: Mapping[str, Tensor]) -> Any:
        module = copy.copy(self)
        module.dense = dict(stacks)
        module.num_experts = len(next(iter(stacks.values())))
        return module

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.dense is None:
            return self.run(hidden_states, top_k_index, top_k_weights)
        return self.looped(hidden_states, top_k_index, top_k_weights, self.dense)

    def looped(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, stacks: Mapping[str, Tensor]
    ) -> Tensor:
        """The contract, as the architectures' own loops: first choices first, experts in ascending order."""
        total = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert < self.num_experts:
                choice, token = torch.where(top_k_index.mT == expert)
                y = self.one(hidden_states[token], expert, stacks)
                y = y * top_k_weights[token, choice, None]
                total = total.index_add(0, token, y.to(total.dtype))
        return total

    def let_go(self) -> None:
        """Take the block's weights away, except for biases, which become this module's own: it was packed."""
        biases = {name: view for name, view in self.stack_views.items() if name.endswith("_bias")}
        every = torch.arange(self.num_experts, device="cpu")
        for name in biases.keys() - self._parameters.keys():
            self.register_parameter(name, nn.Parameter(biases[name][every], requires_grad=False))
        for owner, name in self.places():
            owner[name] = None

    @abstractmethod
    def places(self) -> list[tuple[dict[str, Any], str]]:
        """The dicts and keys where the block keeps what holds its weights."""

    @abstractmethod
    def checkpoint(self, stack: str, values: Tensor) -> dict[str, Tensor]:
        """A whole stack `[E, ...]` as the block would save it, by name within the block."""


def kind_of(experts: Any) -> str:
    """Which kind of nodes an experts module holds: "routed", "shared" or "dense"."""
    return experts.kind if isinstance(experts, AdoptedExperts) else "routed"


class AdoptedBlock:
    """Mixed into a block's class by `adopt_block`: runs its child `experts` in the place of its own code."""

    experts: Any


@cache
def _adopted_class(mixin: type, kind: type) -> type:
    held = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduced}
    return type(kind.__name__, (mixin, kind), held)


def _reduced(module: Any, protocol: Any) -> Any:
    """Pickle looks classes up by name, and finds the architecture's: say how this one is made."""
    made = type(module)
    if made.__dict__.get("__reduce_ex__") is not _reduced:  # packed: a class of that one
        return object.__reduce_ex__(module, protocol)
    return _empty, made.__bases__, module.__dict__


def _empty(mixin: type, kind: type) -> Any:
    made = _adopted_class(mixin, kind)
    return made.__new__(made)  # type: ignore[call-overload]


def adopt_block(block: nn.Module, mixin: type, experts: nn.Module | None = None) -> None:
    """Make a block an instance of a subclass whose forward is `mixin`'s; `experts` becomes its child of that name."""
    if experts is not None:
        block.add_module("experts", experts)
    change_class(block, _adopted_class(mixin, type(block)))


def change_class(module: Any, kind: type) -> None:
    """Make a module an instance of another class, for accelerate's hooks of a model on several devices too."""
    module.__class__ = kind
    if OLD_FORWARD in module.__dict__:
        setattr(module, OLD_FORWARD, type(module).forward.__get__(module))


def return_block(block: nn.Module) -> None:
    """Undo `adopt_block`, of its experts too."""
    held: Any = block._modules.get("experts")
    if isinstance(held, AdoptedExperts):
        if held.block is held:
            delattr(held, EXPERTS_MARK)
            return_block(held)
        else:
            del block._modules["experts"]
    change_class(block, type(block).__bases__[1])


@torch.no_grad()
def tried(block: nn.Module, width: int, like: Tensor) -> Any:
    """The block's output for some random tokens `[1, TRIED, width]`; None where there are no values to compute with."""
    if like.is_meta:
        return None
    x = torch.randn(1, TRIED, width, generator=torch.Generator().manual_seed(0), device="cpu").to(
        like.device, like.dtype
    )
    with _evaluating(block):
        try:
            return block(x)
        except TypeError:  # it takes more than tokens
            return ()


def differ(before: Any, after: Any) -> bool:
    """Whether two outputs of `tried` are known to be different, or no outputs of tokens."""
    if before is None:
        return False
    return not isinstance(before, Tensor) or not torch.equal(before.nan_to_num(), after.nan_to_num())


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """Without dropout and the like. bitsandbytes' layers pack their weights anew when they evaluate on some CPUs."""
    were = {m: m.training for m in block.modules() if not hasattr(m, REPACKS)}
    for module in were:
        module.training = False
    try:
        yield
    finally:
        for module, training in were.items():
            module.training = training


class LinearBlock(AdoptedBlock):
    """An MLP of linear layers: every token goes to its one expert."""

    # name of the module that is applied last, if there is one
    applied_last: str | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        index = torch.zeros(len(flat), 1, dtype=torch.long, device=flat.device)
        y = self.experts(flat, index, flat.new_ones(len(flat), 1)).view(hidden_states.shape)
        return y if self.applied_last is None else getattr(self, self.applied_last)(y)


class LinearExperts(AdoptedExperts):
    """One expert, which an MLP's linear layers are.

    Args:
        block: the MLP. entering: names of its linear layers that tokens enter: gate and up, both in one, or up alone.
        leaving: of the one that they leave by. gated: whether there is a gate.
        transposed: whether weights are `[I, O]`.
        act_fn, config, kind: see `AdoptedExperts`.
    """

    # tokens always go to expert 0, at weight 1
    def __init__(
        self,
        block: nn.Module,
        entering: Sequence[str],
        leaving: str,
        gated: bool,
        transposed: bool,
        act_fn: Any,
        config: Any,
        kind: str,
    ):
        super().__init__(block, 1, act_fn, config, kind)
        self.entering, self.leaving = tuple(entering), leaving
        self.has_gate, self.is_transposed = gated, transposed
        self.has_bias = getattr(block.get_submodule(leaving), "bias", None) is not None

    def _layers(self, stack: str) -> list[Any]:
        return [getattr(self.block, name) for name in ((self.leaving,) if stack == "down_proj" else self.entering)]

    def shape(self, stack: str) -> tuple[int, ...]:
        layers = self._layers(stack.removesuffix("_bias"))
        outputs = sum(linear_sizes(layer)[0] for layer in layers)
        if stack.endswith("_bias"):
            return 1, outputs
        inputs = linear_sizes(layers[0])[1]
        return (1, inputs, outputs) if self.is_transposed else (1, outputs, inputs)

    def views(self, stack: str) -> list[Tensor]:
        layers = self._layers(stack.removesuffix("_bias"))
        if stack.endswith("_bias"):
            return [layer.bias.unsqueeze(0) for layer in layers]
        return [_full_weight(layer, self.like).unsqueeze(0) for layer in layers]

    @property
    def like(self) -> Tensor:
        weight = self._layers("down_proj")[0].weight
        if not self.read_only:
            return weight
        # not the quantizer's own, which evaluation on some CPUs changes
        known = getattr(self.config, "dtype", None) or torch.get_default_dtype()
        return torch.empty(0, dtype=known, device=weight.device)

    @property
    def read_only(self) -> bool:
        return not self._layers("down_proj")[0].weight.is_floating_point()

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first, (last,) = self._layers("up_proj"), self._layers("down_proj")
        return last(self._activated([layer(hidden_states) for layer in first]))

    def _activated(self, entered: list[Tensor]) -> Tensor:
        if len(entered) == 2:
            return self.act_fn(entered[0]) * entered[1]
        return self._apply_gate(entered[0]) if self.has_gate else self.act_fn(entered[0])

    def one(self, x: Tensor, expert: int, stacks: Mapping[str, Tensor]) -> Tensor:
        first = self.names[0]
        weight, bias = stacks[first][expert], stacks[f"{first}_bias"][expert] if self.has_bias else None
        # one product for each of the block's layers, as it does them
        weights = weight.chunk(len(self.entering), dim=self._axis(first))
        biases = [None] * len(weights) if bias is None else bias.chunk(len(weights))
        inner = self._activated([self._linear(x, w, b) for w, b in zip(weights, biases, strict=True)])
        return self._linear(
            inner, stacks["down_proj"][expert], stacks["down_proj_bias"][expert] if self.has_bias else None
        )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.is_transposed:
            return linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def places(self) -> list[tuple[dict[str, Any], str]]:
        return [(self.block._modules, name) for name in (*self.entering, self.leaving)]

    def checkpoint(self, stack: str, values: Tensor) -> dict[str, Tensor]:
        matrix = stack.removesuffix("_bias")
        names = (self.leaving,) if matrix == "down_proj" else self.entering
        kind = "weight" if matrix == stack else "bias"
        parts = values[0].chunk(len(names), dim=self._axis(stack))
        return {f"{name}.{kind}": part.contiguous() for name, part in zip(names, parts, strict=True)}


def linear_sizes(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, or of transformers' Conv1D, also if it is quantized."""
    return (layer.nf, layer.nx) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)


def _full_weight(layer: Any, like: Tensor) -> Tensor:
    """A linear layer's weight, decoded if bitsandbytes quantized it."""
    if layer.weight.is_floating_point():
        return layer.weight
    if getattr(getattr(layer.weight, "quant_state", None), REPACKED, False):
        # evaluation on some CPUs has packed it in another order, which only its own kernel reads
        with torch.no_grad():
            columns = layer(torch.eye(layer.in_features, dtype=like.dtype, device="cpu"))
            return (columns if layer.bias is None else columns - layer.bias).mT.to(like.dtype)
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).to(like.dtype)
