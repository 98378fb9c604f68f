"""Adapters that would train on nothing, because no row comes to any of their nodes."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures.sharded import largest
from peft_pcgrow.say import ends

# optimizer steps without any gradient after which an adapter without rows is refused; rows are counted from the second
PATIENCE = 3


class RowsMet:
    """Notices, in an adapter's first steps, that no row comes to any of its nodes. Costs a look at one gradient where
    some do."""

    def __init__(self) -> None:
        self.met: set[str] = set()
        self.steps: Counter[str] = Counter()
        # by adapter, rows: "routed" to the experts of its nodes, "passed" by gates, "computed" by it, "by" others
        self.rows: dict[str, Counter[str]] = {}
        self.handles: dict[str, list[Any]] = {}
        # layers that have come to a step without a gradient
        self.still: dict[str, list[PCGrowExperts]] = {}

    def forget(self) -> None:
        """Start afresh."""
        for adapter in list(self.handles):
            self._leave(adapter)
        self.__init__()

    def before_step(
        self,
        graded: Iterable[tuple[PCGrowExperts, str, nn.Parameter, Tensor]],
        whole: bool = True,
        sharded: bool = False,
    ) -> None:
        """Called with all banks that an optimizer is about to step, and their gradients; with some of them first where
        the step is not a `whole` one.

        Args:
            sharded: whether these are parts of what several processes hold, who are all asked.

        Raises:
            RuntimeError: an adapter's nodes get no rows, or, if sharded, no gradient; it names them, and who takes
                their rows.
        """
        banks: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        for layer, adapter, weight, gradient in graded:
            if adapter not in self.met:
                self.still.setdefault(adapter, []).append(layer)
                banks.setdefault(adapter, []).append((weight, gradient))
        for adapter, held in banks.items():
            met = torch.tensor(any(bool(gradient.any()) for _, gradient in held), dtype=torch.uint8, device="cpu")
            if sharded:
                met = largest(met, held[0][0])
            if met or (not sharded and self.rows.get(adapter, {}).get("computed")):
                self.met.add(adapter)
                self._leave(adapter)
        if not whole:
            return
        still, self.still = self.still, {}
        for adapter, layers in still.items():
            if adapter in self.met:
                continue
            self.steps[adapter] += 1
            layers = list(dict.fromkeys(layers))
            if self.steps[adapter] == 1:
                counted = self.rows[adapter] = Counter()
                look = partial(_count, adapter, counted)
                self.handles[adapter] = [layer.register_forward_pre_hook(look) for layer in layers]
            elif self.steps[adapter] >= PATIENCE and "forwards" in self.rows[adapter]:
                self._leave(adapter)
                raise RuntimeError(_why(adapter, layers, self.rows[adapter]))

    def _leave(self, adapter: str) -> None:
        for handle in self.handles.pop(adapter, []):
            handle.remove()


@torch.no_grad()
def _count(adapter: str, counted: Counter[str], layer: PCGrowExperts, args: tuple) -> None:
    if not layer.training or adapter not in layer.active_banks():
        return
    hidden, index = args[0].detach(), args[1]
    birth, experts = layer.births[adapter], layer.total
    nodes = layer.nodes_of(hidden, index)
    routed = torch.isin(index, torch.tensor(birth.grown, device=index.device))
    passed = routed.clone()
    if birth.spawned:
        gated = torch.isin(index, torch.tensor(birth.spawned, device=index.device))
        passed &= ~gated | (layer.margin(adapter, hidden, remember=False) > 0).unsqueeze(1)
    counted["forwards"] += 1
    counted["routed"] += int(routed.sum())
    counted["passed"] += int(passed.sum())
    mine = [experts + n for n, (owner, _) in enumerate(layer.newborns) if owner == adapter]
    mine += [expert for expert in birth.grown if expert not in birth.spawned]
    counted["computed"] += int(torch.isin(nodes, torch.tensor(mine, device=nodes.device)).sum())
    for n, (owner, _) in enumerate(layer.newborns):
        if owner != adapter:
            counted[f"by {owner}"] += int((passed & (nodes == experts + n)).sum())


def _why(adapter: str, layers: list[PCGrowExperts], rows: Counter[str]) -> str:
    names = [f"{layer.layer_index}.{expert}" for layer in layers for expert in layer.grown[adapter]]
    others = [key.removeprefix("by ") for key, count in rows.most_common() if key.startswith("by ") and count]
    if rows["computed"]:
        why = f"they computed {rows['computed']:,}, and no gradient came back to any of them, in no process"
    elif not rows["routed"]:
        why = "no token is routed to their experts: grow nodes that this text reaches (error_map=)"
    elif not rows["passed"]:
        why = (
            f"their gates let none of {rows['routed']:,} rows pass: train on text that the gates were fitted on, "
            "or raise the rate with set_gate_fpr"
        )
    else:
        by = f"newborns of {', '.join(map(repr, others))}" if others else "other nodes"
        why = (
            f"all of {rows['passed']:,} rows that they would take are computed by {by}, asked first: grow from a map "
            f"of the model as it is, with those active, list {adapter!r} before them, or activate it alone"
        )
    what = "gradient" if rows["computed"] else "row"
    return (
        f"adapter {adapter!r} trains on nothing: in its first {PATIENCE} steps not one {what} came to any of its "
        f"{len(names)} nodes ({', '.join(ends(names))}); {why}"
    )
