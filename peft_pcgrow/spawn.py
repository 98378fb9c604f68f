"""Spawn: let a newborn take the domain's tokens from its donor, and leave the donor as it is.

A newborn starts as a clone of its donor in the grown bank and computes those of the donor's rows whose token passes the
layer's branch gate, at the donor's routing weight. The base's top-k is never disturbed: at birth the function is the
same bit for bit, and the donor keeps its weights and all other rows for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from peft_pcgrow.error_map import ErrorMap
from peft_pcgrow.gate import at_rate
from peft_pcgrow.locus import Locus

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
        growth: "deepen", "spawn" or "leave".
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

    def __str__(self) -> str:
        return (
            f"{f'{self.layer}.{self.expert}':<7} {self.growth:<7} recall {self.recall:6.1%}  false positives "
            f"{self.false_positive:6.1%}  {self.why}"
        )


def decide(emap: ErrorMap, locus: Locus, grow: str, gate_fpr: float) -> list[Decision]:
    """Deepen or spawn, for each node of a locus.

    "spawn" spawns every node whose gate separates; "auto" also deepens those that the retain text barely uses, and all
    of them where nothing separates is left out. A node is left out if no domain token reaches it, or if its gate cannot
    tell domain from retain at this rate.

    Args:
        gate_fpr: allowed share of retain tokens that pass, in (0, 1).

    Raises:
        ValueError: the map has no branch gates, the whole domain is covered already ("auto"), or no node is left.
    """
    separation = emap.separation
    if separation is None:
        raise ValueError(NO_RETAIN.format(f"grow={grow!r}"))
    diagnosis = emap.diagnosis
    if grow == "auto" and diagnosis.verdict in ("covered", "memorised"):
        raise ValueError(f"there is nothing to grow: {diagnosis}. Say grow='deepen' or 'spawn' to grow all the same")
    recalls, rates = (at_rate(table, gate_fpr) for table in (separation.recall, separation.false_positive))
    domain, retain = (
        rows / rows.sum(1, keepdim=True).clamp_min(1) for rows in (separation.domain_rows, separation.retain_rows)
    )
    decisions = []
    for layer, expert in locus.nodes:
        row = emap.layers.index(layer)
        recall, rate = float(recalls[row, expert]), float(rates[row, expert])
        used = float(domain[row, expert])
        usage = float(retain[row, expert]) / used if used else float("inf")
        if not used:
            growth, why = "leave", "no domain token reaches it"
        elif grow == "auto" and usage < BARELY_USED:
            growth, why = "deepen", f"retain text barely uses it ({usage:.2f} of what the domain does)"
        elif recall < LEAST_RECALL or recall <= rate:
            growth, why = "leave", "domain and retain text cannot be told apart here"
        else:
            growth, why = "spawn", f"retain text uses it {usage:.2f} times as much as the domain does"
        decisions.append(Decision(layer, expert, growth, recall, rate, usage, why))
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
    counts = {growth: sum(d.growth == growth for d in decisions) for growth in WORDS}
    summary = ", ".join(f"{word} {counts[growth]}" for growth, word in WORDS.items() if counts[growth])
    return "\n".join([f"{heading}: {summary}", *(f"  {decision}" for decision in decisions)])
