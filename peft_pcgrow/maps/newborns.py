"""The newborns in an error map: nodes beside the base's experts, with sums of their own.

A row that a newborn computes is the newborn's, whatever expert it was routed to. Shapes: L layers with E experts, N
newborns, F folds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.architectures.experts import GrownExperts

SUMS = ("count", "weight", "mass", "square")


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.float64, device="cpu")


@dataclass(eq=False)
class Newborns:
    """Sums over a corpus, one per newborn.

    Attributes:
        nodes: (decoder layer, donor, adapter) of each.
        count, weight, mass, square: as in `ErrorMap`, `[N]`. gradient: as there, by stack `[F, N, a, b]`.
    """

    nodes: tuple[tuple[int, int, str], ...] = ()
    count: Tensor = field(default_factory=_none)
    weight: Tensor = field(default_factory=_none)
    mass: Tensor = field(default_factory=_none)
    square: Tensor = field(default_factory=_none)
    gradient: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.nodes)

    def __add__(self, other: "Newborns") -> "Newborns":
        if self.nodes != other.nodes:
            raise ValueError(
                f"these maps cannot be added: they were measured with other newborns ({self} against {other}), which "
                "took their rows from the experts"
            )
        tensors = other.tensors()
        return self.changed({name: tensor + tensors[name] for name, tensor in self.tensors().items()})

    def __str__(self) -> str:
        adapters = dict.fromkeys(adapter for *_, adapter in self.nodes)
        return f"{len(self)} of {', '.join(map(repr, adapters))}" if adapters else "none"

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for saving and for adding up."""
        return {name: getattr(self, name) for name in SUMS} | {f"gradient.{n}": g for n, g in self.gradient.items()}

    def changed(self, tensors: Mapping[str, Tensor], nodes: Sequence[Any] | None = None) -> "Newborns":
        """With other tensors, by the names that `tensors` gives, and other nodes if they are given."""
        gradient = {n.removeprefix("gradient."): g for n, g in tensors.items() if n not in SUMS}
        chosen = self.nodes if nodes is None else tuple((int(layer), int(e), str(name)) for layer, e, name in nodes)
        return replace(self, nodes=chosen, gradient=gradient, **{name: tensors[name] for name in SUMS})

    def of_layers(self, layers: Sequence[int]) -> list[int]:
        """Places of the newborns in these layers."""
        return [place for place, (layer, *_) in enumerate(self.nodes) if layer in layers]

    def restrict(self, places: list[int]) -> "Newborns":
        """Some of them."""
        chosen = {n: t[places] if t.dim() == 1 else t[:, places] for n, t in self.tensors().items()}
        return self.changed(chosen, [self.nodes[place] for place in places])

    def added_to(self, experts: Tensor, layers: Sequence[int], values: Tensor) -> Tensor:
        """`experts [L, E]` plus `values [N]` at the donors, `[L, E]`."""
        if not self.nodes:
            return experts
        places = [layers.index(layer) * experts.shape[1] + donor for layer, donor, _ in self.nodes]
        return (
            experts.flatten()
            .index_add(0, torch.tensor(places, device="cpu"), values.to(experts.dtype))
            .view_as(experts)
        )


def nodes_of(module: Any, args: tuple) -> Tensor:
    """Who computes each row of a call of an experts module: its expert, or E + n for newborn n there, `[T, K]`."""
    return module.nodes_of(args[0].detach(), args[1]) if isinstance(module, GrownExperts) else args[1].detach()
