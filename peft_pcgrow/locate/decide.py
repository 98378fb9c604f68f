"""Spawn: let a newborn take the domain's tokens from its donor, and leave the donor as it is.

A newborn starts as a clone of its donor in the grown bank and computes those of the donor's rows whose token passes the
layer's branch gate, at the donor's routing weight. The base's top-k is never disturbed: at birth the function is the
same bit for bit, and the donor keeps its weights and all other rows for good.

Grown again, on a map that shows newborns, a newborn has one parent: the donor, or an earlier newborn of it, whichever
its gate would take more error from. It is a clone of that parent and takes rows of that parent only: of those that an
earlier newborn computes, or of those that earlier newborns leave to the donor. So nothing changes at birth and no
earlier newborn loses its work to a clone of the donor, in whatever order adapters are listed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from peft_pcgrow.gates.gate import at_rate
from peft_pcgrow.locus import Locus
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.say import ends

GROWTHS = ("deepen", "spawn", "auto")
# a newborn that would get less than this share of its donor's domain rows is not worth its weights
LEAST_RECALL = 0.05
# of a node that retain text uses less than this share of what the domain does, nothing much is there to protect
BARELY_USED = 0.05
WORDS = {"spawn": "spawn", "deepen": "deepen", "leave": "leave out"}
NO_RETAIN = (
    "{} needs a map that knows which text must not change: measure_errors(model, batches, retain=retain_batches), or "
    "retain='self' to let the model write that text; then PCGrowConfig(error_map=that map, ...)"
)


@dataclass(frozen=True)
class Decision:
    """What becomes of one located node, and the numbers that it was decided on.

    Attributes:
        growth: "deepen", "spawn" or "leave". adapter: whose newborn at this expert the node is; "": it is the expert.
        recall, false_positive: share of held-out domain and retain rows that the gate lets through at this node.
        usage: the retain text's share of rows here over the domain's (1: both use the node alike).
        why: one line.
    """

    layer: int
    expert: int
    growth: str
    recall: float
    false_positive: float
    usage: float
    why: str
    adapter: str = ""

    def __str__(self) -> str:
        name = f"{self.layer}.{self.expert}" + (f" newborn of {self.adapter!r}" if self.adapter else "")
        return (
            f"{name:<7} {self.growth:<7} recall {self.recall:6.1%}  false positives "
            f"{self.false_positive:6.1%}  {self.why}"
        )


def decide(emap: ErrorMap, locus: Locus, grow: str, gate_fpr: float, lead: Tensor | None = None) -> list[Decision]:
    """Deepen or spawn, for each node of a locus.

    "spawn" spawns every node whose gate separates; "auto" also deepens experts that the retain text barely uses, and
    all of them where nothing separates is left out. A node is left out if no domain token reaches it, or if its gate
    cannot tell domain from retain at this rate.

    Args:
        gate_fpr: allowed share of retain tokens that pass, in (0, 1).
        lead: the node that stands for each expert (see `plan.leading`), `[L, E]`; None: the expert itself.

    Raises:
        ValueError: the map has no branch gates, the whole domain is covered already ("auto"), or no node is left.
    """
    separation = emap.separation
    if separation is None:
        raise ValueError(NO_RETAIN.format(f"grow={grow!r}"))
    diagnosis = emap.diagnosis
    if grow == "auto" and diagnosis.verdict in ("covered", "memorised"):
        raise ValueError(f"there is nothing to grow: {diagnosis}. Say grow='deepen' or 'spawn' to grow all the same")
    recalls, rates = (at_rate(separation.every(name), gate_fpr) for name in ("recall", "false_positive"))
    rows = {name: separation.every(f"{name}_rows") for name in ("domain", "retain")}
    total = emap.count.numel()
    layers = {
        name: emap.newborns.added_to(held[:total].view_as(emap.count), emap.layers, held[total:]).sum(1).clamp_min(1)
        for name, held in rows.items()
    }
    decisions = []
    for layer, expert in locus.nodes:
        row = emap.layers.index(layer)
        node = row * emap.count.shape[1] + expert if lead is None else int(lead[row, expert])
        adapter = emap.newborns.nodes[node - total][2] if node >= total else ""
        recall, rate = float(recalls[node]), float(rates[node])
        used, retained = (float(held[node] / layers[name][row]) for name, held in rows.items())
        usage = retained / used if used else float("inf")
        if not used:
            growth, why = "leave", "no domain token reaches it"
        elif grow == "auto" and not adapter and usage < BARELY_USED:
            growth, why = "deepen", f"retain text barely uses it ({usage:.2f} of what the domain does)"
        elif recall < LEAST_RECALL or (recall <= rate and not adapter):
            # rows of a newborn have been told from retain text already
            growth, why = "leave", "domain and retain text cannot be told apart here"
        else:
            growth, why = "spawn", f"retain text uses it {usage:.2f} times as much as the domain does"
        decisions.append(Decision(layer, expert, growth, recall, rate, usage, why, adapter))
    if all(decision.growth == "leave" for decision in decisions):
        shown = "\n  ".join(str(decision) for decision in decisions[:5])
        raise ValueError(
            f"none of the {len(decisions)} located nodes can grow at gate_fpr={gate_fpr}:\n  {shown}\nRaise gate_fpr, "
            "give retain text that differs from the domain, or use grow='deepen'"
        )
    return decisions


def kept(decisions: Sequence[Decision], *growths: str) -> dict[int, list[int]]:
    """The nodes of some growths, as layer -> experts."""
    chosen: dict[int, list[int]] = {}
    for decision in decisions:
        if decision.growth in growths:
            chosen.setdefault(decision.layer, []).append(decision.expert)
    return chosen


def report(decisions: Sequence[Decision], heading: str) -> str:
    """How many nodes take each way; the nodes whose gates tell domain from retain text best, and least."""
    counts = {growth: sum(d.growth == growth for d in decisions) for growth in WORDS}
    summary = ", ".join(f"{word} {counts[growth]}" for growth, word in WORDS.items() if counts[growth])
    ranked = sorted(decisions, key=lambda d: d.recall - d.false_positive, reverse=True)
    return "\n".join([f"{heading}: {summary}", *(f"  {line}" for line in ends(ranked))])
