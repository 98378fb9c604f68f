"""What tells a domain's text from the retain text, layer by layer, and how well it does so at every node.

Measured beside an error map on text that the gates were not fitted on. As there, a row belongs to the node that
computes it. Shapes: L layers with experts, E experts, N newborns, F false-positive rates, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.gates.directions import MomentSketch, main_directions
from peft_pcgrow.gates.gate import Gate, at_rate

# false-positive rate that a printed map speaks of
SHOWN = 0.01


@dataclass(eq=False)
class Separation:
    """Branch gates of every layer, and what they let through.

    Attributes:
        direction: of each layer's gate, `[L, H]`. law: its other numbers, `[L, 4]` (see `gate.Gate`).
        threshold: evidence above which a token passes at each of `gate.RATES`, `[L, F]` nats.
        recall: share of held-out domain rows above the threshold at each node, `[L, E, F]`.
        false_positive: the same of held-out retain rows, `[L, E, F]`.
        domain_rows, retain_rows: rows routed to each node, `[L, E]`.
        moment: per expert stack, sketch of the retain rows' second moment where they enter it, `[L, E, I, D]`.
        trace: per expert stack, their summed squared norm, `[L, E]`.
        facts: window, sketch (longest side kept whole), domain_tokens, retain_tokens.
        newborns: recall, false_positive `[N, F]`, domain_rows and retain_rows `[N]` of newborns that were active.
        entry: direction, law and threshold of gates that read what enters the attention (LoRA there is behind them);
            zeros and infinite thresholds in layers where that could not be told.
    """

    direction: Tensor
    law: Tensor
    threshold: Tensor
    recall: Tensor
    false_positive: Tensor
    domain_rows: Tensor
    retain_rows: Tensor
    moment: dict[str, Tensor] = field(default_factory=dict)
    trace: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    newborns: dict[str, Tensor] = field(default_factory=dict)
    entry: dict[str, Tensor] = field(default_factory=dict)

    def gate(self, row: int) -> tuple[Gate, Tensor]:
        """A layer's gate and its thresholds, `[F]`."""
        return Gate(self.direction[row], self.law[row], int(self.facts["window"])), self.threshold[row]

    def entry_gate(self, row: int) -> tuple[Gate, Tensor] | None:
        """The same of what enters a layer's attention; None: that could not be told there."""
        threshold = self.entry["threshold"][row]
        if not bool(torch.isfinite(threshold).all()):
            return None
        return Gate(self.entry["direction"][row], self.entry["law"][row], int(self.facts["window"])), threshold

    @property
    def contested(self) -> Tensor:
        """How far domain and retain text share a node, `[L, E]`: the smaller of their shares of the layer's rows."""
        shares = [rows / rows.sum(1, keepdim=True).clamp_min(1) for rows in (self.domain_rows, self.retain_rows)]
        return torch.minimum(*shares)

    def every(self, table: str) -> Tensor:
        """A table of all nodes, experts and then newborns: recall and false_positive `[L * E + N, F]`, or
        domain_rows and retain_rows `[L * E + N]`."""
        own = getattr(self, table).flatten(0, 1)
        return torch.cat([own, self.newborns[table]]) if self.newborns else own

    def directions(self, row: int, stack: str, experts: list[int], share: float) -> Tensor:
        """Main input directions of the retain text at some experts of a layer, `[N, I, K]`; zeros fill up to one K."""
        sketch = MomentSketch(int(self.facts["sketch"]))
        found = [
            main_directions(self.moment[stack][row, e], float(self.trace[stack][row, e]), share, sketch)
            for e in experts
        ]
        widest = max((v.shape[1] for v in found), default=0)
        return torch.stack([torch.nn.functional.pad(v, (0, widest - v.shape[1])) for v in found])

    def __str__(self) -> str:
        passing = at_rate(self.recall, SHOWN).mean(dim=1).tolist()
        return (
            f"Against {self.facts['retain_tokens']:,} retain tokens: gates that take {SHOWN:.0%} of them take "
            f"{min(passing):.0%} to {max(passing):.0%} of the domain's, by layer (held-out text)"
        )

    def restrict(self, rows: list[int], newborns: Sequence[int] = ()) -> "Separation":
        """The same of some layers, and of some newborns."""
        changed: dict[str, Any] = {}
        for name, value in self._tensors().items():
            key, _, stack = name.partition(".")
            if stack:
                changed.setdefault(key, {})[stack] = value[list(newborns) if key == "newborns" else rows]
            else:
                changed[key] = value[rows]
        return replace(self, **changed)

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                found[item.name] = value
            elif item.name != "facts":
                found |= {f"{item.name}.{stack}": tensor for stack, tensor in value.items()}
        return found

    def to_tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for saving."""
        return {f"separation.{name}": tensor.cpu().contiguous() for name, tensor in self._tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "Separation":
        """Take what `to_tensors` gave out of `tensors`."""
        given: dict[str, Any] = {"moment": {}, "trace": {}, "newborns": {}, "entry": {}}
        for name in [name for name in tensors if name.startswith("separation.")]:
            key, _, stack = name.removeprefix("separation.").partition(".")
            if stack:
                given[key][stack] = tensors.pop(name)
            else:
                given[key] = tensors.pop(name)
        return cls(**given, facts=facts)
