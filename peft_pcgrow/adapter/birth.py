"""What an adapter's nodes at one layer are, beside their weights, and which adapters can be active together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.adapter import dispatch
from peft_pcgrow.adapter.bank import Coding
from peft_pcgrow.architectures.slices import Pieces
from peft_pcgrow.gates.gate import Gate


@dataclass(frozen=True)
class Birth:
    """What an adapter's nodes at one layer are, beside their weights.

    Attributes:
        grown: the experts chosen, G of them. spawned: those of them that are newborns' donors.
        window: tokens of context that the gate looks at (see `gate.Gate`).
        gate: the gate, and its threshold at each of `gate.RATES` `[F]`; None: unknown until an adapter file is loaded.
        entry: the same of the gate that LoRA beside newborns is behind. lora: whether there is such LoRA.
        gate_fpr: the rate in use.
        directions: per stack, the protected directions of each piece, `[G, I, K]`.
        pieces: what the bank holds of the experts, by stack; None: all of them, whole.
        shrunk: how the bank is stored, by stack; None: in full width.
        identity: the adapter's fingerprint, "" if it has no newborns. elders: of the adapters whose newborns were
            active when it was grown, and which are asked for rows before it. parents: by donor, of the adapter whose
            newborn, rather than the donor, the newborn takes its rows from.
        facts: all that gives the bank's tensors their meaning, beside that (see `seal`).
    """

    grown: tuple[int, ...]
    spawned: tuple[int, ...] = ()
    window: int = 0
    gate: tuple[Gate, Tensor] | None = None
    entry: tuple[Gate, Tensor] | None = None
    lora: bool = False
    gate_fpr: float = 0.0
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    pieces: Mapping[str, Pieces] | None = None
    shrunk: Mapping[str, Coding] | None = None
    identity: str = ""
    elders: tuple[str, ...] = ()
    parents: Mapping[int, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def by_age(births: Mapping[str, Birth]) -> list[str]:
    """Adapters in the order in which their newborns are asked for rows: elders first, otherwise as listed."""
    waiting, asked = list(births), []
    while waiting:
        here = {births[name].identity for name in waiting}
        ready = [name for name in waiting if not here & {*births[name].elders, *births[name].parents.values()}]
        asked.append((ready or waiting)[0])
        waiting.remove(asked[-1])
    return asked


def parents_of(name: str, births: Mapping[str, Birth]) -> dict[int, str | None]:
    """By donor, which of these adapters has the newborn that one of `name` takes its rows from; None: none has."""
    return {
        donor: next((o for o, born in births.items() if born.identity == parent and donor in born.spawned), None)
        for donor, parent in births[name].parents.items()
    }


def slots_of(birth: Birth, total: int) -> dict[str | None, Tensor]:
    """Places in the bank (see `dispatch.Branch`) of newborns, by their parent ("" if it is an expert), and of what is
    deepened, under None.

    Args:
        total: experts of the base.
    """
    every = dispatch.slots(birth.grown, total)
    parents = {e: birth.parents.get(e, "") if e in birth.spawned else None for e in birth.grown}
    found: dict[str | None, Tensor] = {parent: torch.full_like(every, -1) for parent in parents.values()}
    for expert, parent in parents.items():
        found[parent][expert] = every[expert]
    return found


def asked(births: Mapping[str, Birth], total: int) -> list[tuple[str, Tensor, bool, tuple[int, ...]]]:
    """What computes rows, in the order in which it is asked: adapter, places in its bank, whether there is a gate, and
    the places of its parents among these (see `dispatch.Branch`).

    Newborns come first, elders before those that were grown beside them, otherwise as the adapters are listed. A
    newborn whose parent is a newborn takes rows of that one only, and any other only rows that its elders leave to the
    expert: so at birth nothing changes, however adapters are listed.

    Args:
        total: experts of the base.
    """
    newborns: list[tuple[str, Tensor, bool, tuple[int, ...]]] = []
    deepened: list[tuple[str, Tensor, bool, tuple[int, ...]]] = []
    for name in by_age(births):
        for parent, slot in slots_of(births[name], total).items():
            if parent is None:
                deepened.append((name, slot, False, ()))
                continue
            mine = {*parents_of(name, births).values()} if parent else set()
            of = [
                place for place, (other, *_) in enumerate(newborns)
                if other in mine and births[other].identity == parent
            ]  # fmt: skip
            if parent and not of:
                raise RuntimeError(f"the newborns that those of adapter {name!r} take their rows from are not active")
            newborns.append((name, slot, True, tuple(of)))
    return newborns + deepened


def check_disjoint(births: Mapping[str, Birth], layer: int) -> None:
    """Raise ValueError if two of these adapters deepen the same expert of a layer, one deepens what a newborn with
    parts takes the rest of its weights from, or the parent of a newborn is missing."""
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
        if missing := [donor for donor, parent in parents_of(name, births).items() if parent is None]:
            raise ValueError(
                f"adapter {name!r} has newborns of newborns (layer {layer}: {missing[:8]}), whose rows come from the "
                "adapter that it was grown on, which is not active here: load that one first, and activate both, as in "
                f"model.base_model.set_adapter([first, {name!r}])"
            )


def check_deletable(name: str, births: Mapping[str, Birth], layer: int) -> None:
    """Raise ValueError if newborns of another adapter take their rows from those of this one."""
    for other in births:
        if other != name and name in parents_of(other, births).values():
            raise ValueError(
                f"adapter {other!r} has newborns of newborns of {name!r} (layer {layer}) and cannot be without them: "
                f"delete {other!r} first"
            )


def check_donors(who: str, donors: Sequence[int], owner: Mapping[int, str], layer: int) -> None:
    """Raise ValueError if one of a newborn's donors is deepened by its `owner`."""
    for expert in donors:
        if expert in owner:
            raise ValueError(
                f"{who} spawns parts of expert {expert} of layer {layer}, whose other parts would change with adapter "
                f"{owner[expert]!r}, which deepens it: activate one of them, or spawn with resolution='expert'"
            )
