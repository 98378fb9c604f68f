"""Experts modules for blocks that do not follow transformers' experts contract: they hold no weights of their own.

An adopted block keeps its parameters and their names, so checkpoints do not change. Its class becomes a subclass whose
forward goes through a child named `experts`, which follows the contract (see `experts`) and reads the block's weights
where they are. Shapes: T tokens, K experts per token, E experts, H hidden, I intermediate, O outputs of a matrix.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.host import EXPERTS_MARK
from peft_pcgrow.architectures.stack_view import StackView, ViewedExperts


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
        # not registered as children, which they are not: activations may have parameters, the block's (Apertus)
        self._held = (block, act_fn)
        self.num_experts, self.config, self.kind = num_experts, config, kind
        self.has_gate, self.has_bias, self.is_transposed = True, False, False

    @property
    def block(self) -> Any:
        return self._held[0]

    @property
    def act_fn(self) -> Any:
        return self._held[1]

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
    """Mixed into a block's class when it is adopted: runs its child `experts` in the place of its own code."""

    experts: Any
