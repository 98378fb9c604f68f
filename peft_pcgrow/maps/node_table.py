"""What error maps say node by node: the columns of a page and of a table, and a few numbers for a log.

`emap` is an ErrorMap throughout; this module stands below it and knows it by its properties.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.gates.gate import at_rate
from peft_pcgrow.locus import Locus
from peft_pcgrow.maps.corpus import whole_number
from peft_pcgrow.maps.draw import Column, Page
from peft_pcgrow.maps.lifecycle import CONVERGED, HEAVY, MOVED, STAGES, stages

# false-positive rate of the gates whose recall is shown
RATE = 0.01
# nodes in the page's line of top nodes
TOP = 8
# share of the nodes whose share of the error goes to a log
FEW = 0.05
IN_LAYER = "in the layer"
BLOCKS = " ▁▂▃▄▅▆▇█"
MEANINGS = {
    "generic": "no row of this corpus, or a light or covered node whose error stayed",
    "relieved": f"not grown itself: error per row fell by over {MOVED:.0%} because others grew",
    "frontier": f"not grown: over {HEAVY:g} times the mean node's error. The next locus is here",
    "growing": "grown: located, or the donor of a newborn",
    "converged": f"grown: error per row at most {CONVERGED:.0%} of the former, or covered",
}


@dataclass(frozen=True)
class NodeError:
    """One row of `ErrorMap.top`: sums over the corpus for one node, and its removable error (NaN if not measured).

    A newborn is named by its donor, `expert`, and its `adapter`, which is "" of experts.
    """

    layer: int
    expert: int
    count: int
    weight: float
    error: float
    share: float
    coherent: float
    removable: float = float("nan")
    adapter: str = ""

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.expert}" + (f" newborn of {self.adapter!r}" if self.adapter else "")


def located(emap: Any, locus: Locus | None) -> Tensor:
    """The nodes of a locus, `[L, E]` bool; ValueError if the map has no such nodes."""
    mask = torch.zeros(emap.count.shape, dtype=torch.bool, device="cpu")
    if locus:
        locus = Locus(locus)
        locus.check(dict.fromkeys(emap.layers, mask.shape[1]))
        for layer, experts in locus.items():
            mask[emap.layers.index(layer), list(experts)] = True
    return mask


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.where(whole > 0, torch.ones_like(whole)), 0.0)


def _bars(values: Sequence[float]) -> str:
    """One character per value in 0..1."""
    return "".join(BLOCKS[min(len(BLOCKS) - 1, round(max(0.0, v) * (len(BLOCKS) - 1)))] for v in values)


def picture(emap: Any, by: str, locus: Locus | None) -> Page:
    """One panel of a map: each node's share of a statistic, newborns' with their donors."""
    score = emap.with_newborns(by)
    share = ratio(score, score.sum())
    panel = Column(by, f"Share of {by}", share, "orange", "of the whole model", True, share.sum(1), IN_LAYER)
    present, inside = emap.with_newborns("frequency") > 0, located(emap, locus)
    facts = [str(emap.diagnosis)]
    return Page(f"{by} per node".capitalize(), facts, "", emap.layers, [panel], present, inside, (), ())


def contents(emap: Any, before: Any, locus: Locus | None) -> Page:
    """The page of a map; with `before`, also what changed since that map.

    A column with a hue is a panel: another panel is another `Column` here, and nothing else.
    """
    inside = located(emap, locus)
    # rows are shown where they are routed, whoever computes them
    count, weight, mass = (emap.with_newborns(name) for name in ("frequency", "gate", "error"))
    share, frequency = ratio(mass, mass.sum()), ratio(count, count.sum(1, keepdim=True))
    columns = [
        Column("count", "rows routed here", count),
        Column("weight", "routed weight", weight),
        Column("error", "error", mass),
        Column("per_row", "error per row", ratio(mass, count)),
        Column("share", "Share of error", share, "orange", "of the whole model", True, share.sum(1), IN_LAYER),
        # a layer's rows are as many as its neighbour's: their sum would say nothing
        Column("frequency", "Frequency", frequency, "blue", "of the layer's rows", True, frequency.amax(1), "busiest"),
    ]
    if emap.newborns.nodes:
        taken, what = ratio(count - emap.count, count), "of the rows routed here, computed by newborns"
        columns.append(Column("newborns", "Newborns", taken, "green", what, True, taken.mean(1), "mean"))
    if emap.gradient:
        norm, what = emap.coherent, "norm of the summed weight gradient"
        if emap.newborns.nodes:
            theirs = emap.born.coherent.square().flatten()
            norm = emap.newborns.added_to(norm.square(), emap.layers, theirs).sqrt()
        columns.append(Column("coherent", "Coherent error", norm, "purple", what, False, norm.sum(1), IN_LAYER))
    if emap.has_parts:
        found, what = emap.removable(), "nats per token that a step of unit norm removes"
        gain = emap.with_newborns("removable").clamp_min(0)
        columns.append(Column("removable", "Removable error", gain, "orange", what, False, gain.sum(1), IN_LAYER))
        columns.append(Column("removable_error", "its standard error", found.error))
    if emap.separation is not None:
        recall = at_rate(emap.separation.recall, RATE).double()
        what = f"domain rows let in, with {RATE:.0%} of the retain rows"
        columns.append(Column("separability", "Gate separability", recall, "green", what, True, recall.mean(1), "mean"))
    loss = f"{emap.loss / max(emap.labels, 1):.3f} nats per label token"
    if before is not None:
        stage, what = stages(emap, before, inside), "per token, of all error before"
        # both maps hold as many tokens
        former = before.with_newborns()
        change = (mass - former) / former.sum().clamp_min(torch.finfo(torch.float64).tiny)
        columns += [
            Column("before", "error per row before", ratio(former, before.with_newborns("frequency"))),
            Column("change", "Change of error", change, "change", what, True, change.sum(1), IN_LAYER),
            Column("lifecycle", "Lifecycle", stage, "stages", "what growing did to each node", bars_label="experts"),
        ]
        loss = f"{before.loss / max(before.labels, 1):.3f} → {loss}"
    layers, experts = emap.count.shape
    facts = [
        f"{layers} layers x {experts} experts, {emap.tokens:,} tokens, loss {loss}",
        f"Diagnosis: {emap.diagnosis}",
    ]
    notes, unrouted = [], int((count == 0).sum())
    if inside.any():
        notes.append(f"outlined: the locus ({int(inside.sum())} nodes)")
    if unrouted:
        notes.append(f"grey: never routed ({unrouted} nodes)")
    if notes:
        facts.append("; ".join(notes).capitalize())
    shares = ",  ".join(f"{node.name} {node.share:.2%}" for node in emap.top(TOP))
    # a row of the table is an expert with its newborns
    ranked = dict.fromkeys((emap.layers.index(node.layer), node.expert) for node in emap.top(3 * TOP))
    return Page(
        title=f"Error map of {emap.base.get('model_type') or 'a model'}",
        facts=facts,
        top=f"Most error (layer.expert):   {shares}",
        layers=emap.layers,
        columns=columns,
        present=count > 0,
        located=inside,
        stages=[(name, MEANINGS[name]) for name in STAGES],
        top_nodes=list(ranked),
    )


def top(emap: Any, n: int, by: str) -> list[NodeError]:
    """The `n` nodes with the highest score, highest first; ValueError unless `n` is a whole number, 0 or more."""
    n = whole_number("n", n, "nodes", 0)
    experts, nothing = emap.count.shape[1], float("nan")
    sums = [emap.scores(name) for name in ("frequency", "gate", "error", "coherent")]
    sums.append(emap.scores("removable") if emap.has_parts else torch.full_like(sums[0], nothing))
    total, found = float(sums[2].sum()), []
    for i in torch.argsort(emap.scores(by), descending=True, stable=True)[:n].tolist():
        born = i - emap.count.numel()
        layer, expert, adapter = (
            emap.newborns.nodes[born] if born >= 0 else (emap.layers[i // experts], i % experts, "")
        )
        count, weight, error, coherent, removable = (float(held[i]) for held in sums)
        share = error / total if total else 0.0
        found.append(NodeError(layer, expert, int(count), weight, error, share, coherent, removable, adapter))
    return found


def text(emap: Any) -> str:
    """A map as some lines: verdict, a bar for every expert with its newborns, the top nodes."""
    mass, experts = emap.with_newborns(), emap.count.shape[1]
    total, largest = float(mass.sum()), float(mass.max()) or 1.0
    lines = [
        f"Error map of {emap.base.get('model_type', 'a model')}: {len(emap.layers)} layers x {experts} experts, "
        f"{emap.tokens:,} tokens, loss {emap.loss / max(emap.labels, 1):.3f} nats/token",
        str(emap.diagnosis),
        "",
        f"layer  share  error of experts 0..{experts - 1} (height: share of the largest node)",
    ]
    for layer, row in zip(emap.layers, mass, strict=True):
        share = float(row.sum()) / total if total else 0.0
        lines.append(f"{layer:5d}  {share:5.1%}  {_bars((row / largest).tolist())}")
    if emap.newborns.nodes:
        held = [float(getattr(emap.newborns, name).sum()) for name in ("count", "mass")]
        rows, error = held[0] / float(emap.with_newborns("frequency").sum() or 1), held[1] / (total or 1)
        lines += ["", f"Newborns: {emap.newborns} compute {rows:.1%} of the rows and hold {error:.1%} of the error"]
    if emap.separation is not None:
        lines += ["", str(emap.separation)]
    lines += ["", "  node (layer.expert)          rows    routed weight   share of error   removable error"]
    for node in emap.top(TOP):
        lines.append(
            f"  {node.name:<24} {node.count:>8,} {node.weight:>16,.1f} {node.share:>16.2%} {node.removable:>17.4g}"
        )
    return "\n".join(lines)


def frame(emap: Any) -> Any:
    """A pandas DataFrame with one row per node (see `ErrorMap.to_pandas`)."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    experts, born = emap.count.shape[1], emap.newborns.nodes
    nodes = [(layer, expert, "") for layer in emap.layers for expert in range(experts)] + list(born)
    columns = {
        "count": emap.scores("frequency").round().long(),
        "weight": emap.scores("gate"),
        "error": (error := emap.scores("error")),
        "share": ratio(error, error.sum()),
        "square": emap.scores("square"),
        "coherent": emap.scores("coherent"),
    }
    if emap.has_parts:
        found = [held.removable() for held in ((emap, emap.born) if born else (emap,))]
        columns["removable"] = torch.cat([part.estimate.flatten() for part in found])
        for i, name in enumerate(("removable_low", "removable_high")):
            columns[name] = torch.cat([part.interval[i].flatten() for part in found])
    if emap.heldout is not None:
        columns["heldout_error"] = emap.heldout.scores("error")
    if (separation := emap.separation) is not None:
        columns |= {name: separation.every(name) for name in ("domain_rows", "retain_rows")}
        columns |= {name: at_rate(separation.every(name), RATE) for name in ("recall", "false_positive")}
        unknown = torch.full((len(born),), float("nan"), device="cpu")
        columns["contested"] = torch.cat([separation.contested.flatten(), unknown])
    names = dict(zip(("layer", "expert", "adapter"), zip(*nodes, strict=True), strict=True))
    numbers = {name: values.flatten().numpy() for name, values in columns.items()}
    return pandas.DataFrame(
        {"layer": names["layer"], "expert": names["expert"], **numbers, "adapter": names["adapter"]}
    )


def scalars(emap: Any, prefix: str) -> dict[str, float]:
    """A few finite numbers of a map, by name (see `ErrorMap.scalars`)."""
    mass = emap.with_newborns()
    labels, share = max(emap.labels, 1), ratio(mass, mass.sum())
    few = math.ceil(FEW * share.numel())
    found = {
        "loss": emap.loss / labels,
        "error_per_label": float(mass.sum()) / labels,
        "top_5_percent_share": float(share.flatten().topk(few).values.sum()),
        "concentration": emap.diagnosis.concentration,
        "unrouted_nodes": int((emap.with_newborns("frequency") == 0).sum()),
    }
    if emap.heldout is not None:
        found["heldout_loss"] = emap.heldout.loss / max(emap.heldout.labels, 1)
    found |= {f"layer_{layer}_share": part for layer, part in zip(emap.layers, share.sum(1).tolist(), strict=True)}
    return {f"{prefix}{name}": float(value) for name, value in found.items() if math.isfinite(value)}
