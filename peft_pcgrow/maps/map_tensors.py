"""What an error map's file holds: its tensors by name, those of held-out text among them, and all else as facts."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from peft_pcgrow.gates.separation import Separation
from peft_pcgrow.maps.newborns import SUMS, Newborns

# attributes of a map: tensors that it may do without, and plain numbers
OPTIONAL = ("hops", "words")
COUNTERS = ("loss", "labels", "tokens", "batches")
# what maps of version 0.1 hold beside: how far nodes' errors lie at the same tokens
UNREAD = ("shared",)
AnyMap = TypeVar("AnyMap")


def to_tensors(emap: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of an `ErrorMap`."""
    tensors = {name: getattr(emap, name) for name in (*SUMS, "fold_labels")}
    tensors |= {name: tensor for name in OPTIONAL if (tensor := getattr(emap, name)) is not None}
    tensors |= {f"gradient.{name}": gradient for name, gradient in emap.gradient.items()}
    if emap.newborns.nodes:
        tensors |= {f"newborns.{name}": tensor for name, tensor in emap.newborns.tensors().items()}
    if emap.separation is not None:
        tensors |= emap.separation.to_tensors()
    facts = {
        "layers": list(emap.layers),
        **{name: getattr(emap, name) for name in COUNTERS},
        "base": emap.base,
        "newborns": [list(node) for node in emap.newborns.nodes],
        "separation": emap.separation.facts if emap.separation else None,
        "run": emap.run,
    }
    if emap.heldout is not None:
        inner, facts["heldout"] = to_tensors(emap.heldout)
        tensors |= {f"heldout.{name}": tensor for name, tensor in inner.items()}
    return tensors, facts


def from_tensors(kind: Callable[..., AnyMap], tensors: dict[str, Tensor], facts: dict[str, Any]) -> AnyMap:
    """A map of class `kind` from what `to_tensors` gave, taken out of `tensors`.

    Raises:
        KeyError, TypeError: something is missing, or of another kind.
    """

    def taken(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}

    inner, born = taken("heldout."), taken("newborns.")
    separated = facts.get("separation")
    separation = Separation.from_tensors(tensors, separated) if separated else None
    for name in UNREAD:
        tensors.pop(name, None)
    return kind(
        layers=tuple(facts["layers"]),
        **{name: tensors.pop(name) for name in (*SUMS, "fold_labels")},
        **{name: tensors.pop(name, None) for name in OPTIONAL},
        gradient={name.removeprefix("gradient."): tensor for name, tensor in tensors.items()},
        **{name: facts[name] for name in (*COUNTERS, "base")},
        separation=separation,
        newborns=Newborns().changed(born, facts["newborns"]) if facts.get("newborns") else Newborns(),
        heldout=from_tensors(kind, inner, facts["heldout"]) if "heldout" in facts else None,
        run=facts.get("run", {}),
    )
