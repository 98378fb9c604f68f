"""What an adapter's nodes at one layer are, beside their weights, and which adapters can be active together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from peft_pcgrow.bank import Coding
from peft_pcgrow.gate import Gate
from peft_pcgrow.pieces import Pieces


@dataclass(frozen=True)
class Birth:
    """What an adapter's nodes at one layer are, beside their weights.

    Attributes:
        grown: the experts chosen, G of them. spawned: those of them that are newborns' donors.
        window: tokens of context that the gate looks at (see `gate.Gate`).
        gate: the gate, and its threshold at each of `gate.RATES` `[F]`; None: unknown until an adapter file is loaded.
        gate_fpr: the rate in use.
        directions: per stack, what updates are kept off, `[G, I, K]`, or by `parts.protected_inputs`.
        pieces: what the bank holds of the experts, by stack; None: all of them, whole.
        shrunk: how the bank is stored, by stack; None: in full width.
    """

    grown: tuple[int, ...]
    spawned: tuple[int, ...] = ()
    window: int = 0
    gate: tuple[Gate, Tensor] | None = None
    gate_fpr: float = 0.0
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    pieces: Mapping[str, Pieces] | None = None
    shrunk: Mapping[str, Coding] | None = None


def check_disjoint(births: Mapping[str, Birth], layer: int) -> None:
    """Raise ValueError if two of these adapters deepen the same expert of a layer, or one deepens what a newborn with
    parts takes the rest of its weights from."""
    owner: dict[int, str] = {}
    for name, birth in births.items():
        for expert in sorted(set(birth.grown) - set(birth.spawned)):
            if expert in owner:
                raise ValueError(
                    f"adapters {owner[expert]!r} and {name!r} both grow expert {expert} of layer {layer} and cannot be "
                    "active together: activate one of them, or merge both, which adds up what they change"
                )
            owner[expert] = name
    for name, birth in births.items():
        if birth.pieces is not None:
            check_donors(f"adapter {name!r}", birth.spawned, owner, layer)


def check_donors(who: str, donors: Sequence[int], owner: Mapping[int, str], layer: int) -> None:
    """Raise ValueError if one of a newborn's donors is deepened by its `owner`."""
    for expert in donors:
        if expert in owner:
            raise ValueError(
                f"{who} spawns parts of expert {expert} of layer {layer}, whose other parts would change with adapter "
                f"{owner[expert]!r}, which deepens it: activate one of them, or spawn with resolution='expert'"
            )
