"""A compression plan: which form every expert takes. Made by `survey`, carried out by `apply`."""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_pcgrow.architectures.same_base import WEIGHTS
from peft_pcgrow.compress.calibrate import Calibration
from peft_pcgrow.files import write_whole
from peft_pcgrow.packed.forms import Form
from peft_pcgrow.say import ends

PLAN_FORMAT = 1


@dataclass(frozen=True)
class NodePlan:
    """What becomes of one expert.

    Attributes:
        layer: its decoder layer.
        expert: its number there.
        form: how it will be stored.
        before: bytes of its matrices in 16 bit.
        after: bytes of them in that form.
        predicted: expected change of the mean loss of the texts, nats per token; see `CompressionPlan`.

    Example:
        >>> node = compress.plan(model, target=0.5, retain=retain, progress=False).nodes[0]
        >>> node.layer, node.expert, node.after < node.before
        (0, 0, True)
    """

    layer: int
    expert: int
    form: Form
    before: int
    after: int
    predicted: float

    def __str__(self) -> str:
        return (
            f"{f'{self.layer}.{self.expert}':<7} {self.form!s:<24} {self.before:>10,} -> {self.after:>10,} bytes   "
            f"predicted {self.predicted:+.5f}"
        )


@dataclass
class CompressionPlan:
    """Which form every expert takes; nothing has been touched yet.

    What is predicted ranks choices. Each expert is looked at alone, to second order, on the rows that it was tried on:
    the change that is measured, with all of them compressed at once, is a multiple of the sum. Hold it with
    `apply(max_loss_rise=)`.

    Attributes:
        nodes: of all experts that are left.
        skipped: decoder layers that are taken out.
        target: share of the experts' bytes in 16 bit that was asked for.
        total: those bytes.
        select: the statistic that forms were chosen by.
        names: the texts it was made on.
        losses: their mean losses, nats per token.
        base: what tells the model from another.
        skipping: predicted change of the loss by the layers that are taken out, nats per token.
        calibration: what those texts looked like at every node; None: the plan was read from a file.

    Example:
        >>> plan = compress.plan(model, target=0.5, retain=retain, progress=False)
        >>> plan.save(folder / "plan.json")
        >>> compress.CompressionPlan.load(folder / "plan.json").bytes <= 0.5 * plan.total
        True
    """

    nodes: list[NodePlan]
    skipped: list[int]
    target: float
    total: int
    select: str
    names: list[str]
    losses: list[float]
    base: dict[str, Any]
    skipping: float = 0.0
    # what it was made of, for `apply`; not saved
    calibration: Calibration | None = field(default=None, repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """Of all experts, afterwards."""
        return sum(node.after for node in self.nodes)

    @property
    def predicted(self) -> float:
        """Sum of the changes of the mean loss that are predicted, nats per token: a ranking, not a forecast."""
        return sum(node.predicted for node in self.nodes) + self.skipping

    def forms(self) -> dict[int, list[Form]]:
        """The forms of each layer's experts."""
        found: dict[int, list[Form]] = {}
        for node in self.nodes:
            found.setdefault(node.layer, []).append(node.form)
        return found

    def __str__(self) -> str:
        """Bytes, losses and forms, and the experts with the most and the least predicted harm; `nodes` has all."""
        ranked = sorted(self.nodes, key=lambda node: node.predicted, reverse=True)
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[str(node.form)] = counts.get(str(node.form), 0) + 1
        skipped = f"; layers skipped: {', '.join(map(str, self.skipped))}" if self.skipped else ""
        texts = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(self.names, self.losses, strict=True))
        return "\n".join(
            [
                f"Compression plan: {self.total:,} -> {self.bytes:,} bytes of experts ({self.bytes / self.total:.1%} "
                f"of 16 bit, {self.target:.0%} asked for){skipped}",
                f"  losses before: {texts or 'not measured'}; predicted change of their mean {self.predicted:+.4f} "
                f"nats/token by {self.select!r}",
                "  " + ", ".join(f"{count} x {form}" for form, count in sorted(counts.items())),
                *(f"  {line}" for line in ends(ranked)),
            ]
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write it as one JSON file, all or nothing; a file of that name is replaced."""
        held = {name: value for name, value in vars(self).items() if name not in ("calibration", "nodes")}
        held |= {"format": PLAN_FORMAT, "nodes": [asdict(node) for node in self.nodes]}
        write_whole(path, json.dumps(held).encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CompressionPlan":
        """Raises FileNotFoundError, or ValueError for a file that is no plan of this format."""
        try:
            return _read(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{os.fspath(path)} is not a compression plan ({what}): make it again") from error

    def check(self) -> None:
        """Raise ValueError or TypeError for values that no plan has."""
        for node in self.nodes:
            place = f"node {node.layer!r}.{node.expert!r}"
            for name in ("layer", "expert", "before", "after"):
                _count(getattr(node, name), f"{name} of {place}")
            _number(node.predicted, f"predicted of {place}")
            if not isinstance(node.form, Form):
                raise TypeError(f"form of {place} must be a Form, got {node.form!r}")
        places = [(node.layer, node.expert) for node in self.nodes]
        if len(set(places)) < len(places):
            raise ValueError("{}.{} has more than one form".format(*max(places, key=places.count)))
        for layer in self.skipped:
            _count(layer, "each of skipped")
        if len(set(self.skipped)) < len(self.skipped) or {layer for layer, _ in places} & set(self.skipped):
            raise ValueError(f"skipped={self.skipped} names a layer twice, or one whose experts have forms")
        if not 0 < _number(self.target, "target") <= 1:
            raise ValueError(f"target must be in (0, 1], got {self.target!r}")
        if not _count(self.total, "total"):
            raise ValueError("total must be more than 0 bytes")
        _number(self.skipping, "skipping")
        if len(self.names) != len(self.losses) or len(set(self.names)) < len(self.names):
            raise ValueError(f"names={self.names} and losses={self.losses} must be as many, each text once")
        for loss in self.losses:
            _number(loss, "each loss")
        if not all(isinstance(text, str) for text in (self.select, *self.names)):
            raise TypeError(f"select={self.select!r} and names={self.names} must be text")
        known = isinstance(self.base, dict) and [self.base.get(name) for name in WEIGHTS]
        if not known or not all(value is None or isinstance(value, str | dict) for value in known):
            raise TypeError("base must be what describes a model")


def _read(held: Any) -> CompressionPlan:
    if not isinstance(held, dict) or str(held.pop("format", None)) != str(PLAN_FORMAT):
        raise ValueError(f"this version reads format {PLAN_FORMAT}")
    _number(held["skipping"], "skipping")
    for name in ("nodes", "skipped", "names", "losses"):
        if not isinstance(held[name], list):
            raise TypeError(f"{name} must be a list, got {held[name]!r:.60}")
    nodes = []
    for node in held.pop("nodes"):
        # none of them by default: what is missing was there once
        held_form = {name: node["form"].pop(name) for name in ("width", "neurons", "sparsity")}
        form = Form(**held_form, **node["form"])
        nodes.append(NodePlan(**{**node, "form": form}))
    plan = CompressionPlan(nodes=nodes, **{name: value for name, value in held.items() if name != "calibration"})
    plan.check()
    return plan


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r:.60}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r:.60}")
    return value
