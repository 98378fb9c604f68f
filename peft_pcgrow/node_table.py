"""What error maps say node by node: the columns of a page and of a table, and a few numbers for a log.

`emap` is an ErrorMap throughout; this module stands below it and knows it by its properties.
"""

import math
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.gate import at_rate
from peft_pcgrow.lifecycle import CONVERGED, HEAVY, MOVED, STAGES, stages
from peft_pcgrow.locus import Locus
from peft_pcgrow.page import Column, Page

# false-positive rate of the gates whose recall is shown
RATE = 0.01
# nodes in the page's line of top nodes
TOP = 8
# share of the nodes whose share of the error goes to a log
FEW = 0.05
IN_LAYER = "in the layer"
MEANINGS = {
    "generic": "no row of this corpus, or a light node whose error stayed",
    "frontier": f"over {HEAVY:g} times the mean node's error, not located, error stayed",
    "growing": f"located, or error per row fell by over {MOVED:.0%}",
    "converged": f"error per row at most {CONVERGED:.0%} of the former, or covered",
}


def located(emap: Any, locus: Locus | None) -> Tensor:
    """The nodes of a locus, `[L, E]` bool; ValueError if the map has no such nodes."""
    mask = torch.zeros(emap.count.shape, dtype=torch.bool)
    if locus:
        locus = Locus(locus)
        locus.check(dict.fromkeys(emap.layers, mask.shape[1]))
        for layer, experts in locus.items():
            mask[emap.layers.index(layer), list(experts)] = True
    return mask


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.where(whole > 0, torch.ones_like(whole)), 0.0)


def contents(emap: Any, before: Any, locus: Locus | None) -> Page:
    """The page of a map; with `before`, also what changed since that map.

    A column with a hue is a panel: another panel is another `Column` here, and nothing else.
    """
    inside = located(emap, locus)
    share, frequency = ratio(emap.mass, emap.mass.sum()), ratio(emap.count, emap.count.sum(1, keepdim=True))
    columns = [
        Column("count", "rows routed here", emap.count),
        Column("weight", "routed weight", emap.weight),
        Column("error", "error", emap.mass),
        Column("per_row", "error per row", ratio(emap.mass, emap.count)),
        Column("share", "Share of error", share, "orange", "of the whole model", True, share.sum(1), IN_LAYER),
        # a layer's rows are as many as its neighbour's: their sum would say nothing
        Column("frequency", "Frequency", frequency, "blue", "of the layer's rows", True, frequency.amax(1), "busiest"),
    ]
    if emap.gradient:
        norm, what = emap.coherent, "norm of the summed weight gradient"
        columns.append(Column("coherent", "Coherent error", norm, "purple", what, False, norm.sum(1), IN_LAYER))
    if emap.has_parts:
        found, what = emap.removable(), "nats per token that a step of unit norm removes"
        gain = found.estimate.clamp_min(0)
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
        change = (emap.mass - before.mass) / before.mass.sum().clamp_min(torch.finfo(torch.float64).tiny)
        columns += [
            Column("before", "error per row before", ratio(before.mass, before.count)),
            Column("change", "Change of error", change, "change", what, True, change.sum(1), IN_LAYER),
            Column("lifecycle", "Lifecycle", stage, "stages", "what growing did to each node", bars_label="experts"),
        ]
        loss = f"{before.loss / max(before.labels, 1):.3f} → {loss}"
    layers, experts = emap.count.shape
    facts = [
        f"{layers} layers x {experts} experts, {emap.tokens:,} tokens, loss {loss}",
        f"Diagnosis: {emap.diagnosis}",
    ]
    notes, unrouted = [], int((emap.count == 0).sum())
    if inside.any():
        notes.append(f"outlined: the locus ({int(inside.sum())} nodes)")
    if unrouted:
        notes.append(f"grey: never routed ({unrouted} nodes)")
    if notes:
        facts.append("; ".join(notes).capitalize())
    top = emap.top(TOP)
    shares = ",  ".join(f"{node.layer}.{node.expert} {node.share:.2%}" for node in top)
    return Page(
        title=f"Error map of {emap.base.get('model_type') or 'a model'}",
        facts=facts,
        top=f"Most error (layer.expert):   {shares}",
        layers=emap.layers,
        columns=columns,
        present=emap.count > 0,
        located=inside,
        stages=[(name, MEANINGS[name]) for name in STAGES],
        top_nodes=[(emap.layers.index(node.layer), node.expert) for node in emap.top(3 * TOP)],
    )


def frame(emap: Any) -> Any:
    """A pandas DataFrame with one row per node (see `ErrorMap.to_pandas`)."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    layers, experts = emap.count.shape
    columns = {
        "layer": torch.tensor(emap.layers).repeat_interleave(experts),
        "expert": torch.arange(experts).repeat(layers),
        "count": emap.count.round().long(),
        "weight": emap.weight,
        "error": emap.mass,
        "share": ratio(emap.mass, emap.mass.sum()),
        "square": emap.square,
        "coherent": emap.coherent,
    }
    if emap.has_parts:
        found = emap.removable()
        columns |= {
            "removable": found.estimate,
            "removable_low": found.interval[0],
            "removable_high": found.interval[1],
        }
    if (separation := emap.separation) is not None:
        columns |= {
            "domain_rows": separation.domain_rows,
            "retain_rows": separation.retain_rows,
            "recall": at_rate(separation.recall, RATE),
            "false_positive": at_rate(separation.false_positive, RATE),
            "contested": separation.contested,
        }
    return pandas.DataFrame({name: values.flatten().numpy() for name, values in columns.items()})


def scalars(emap: Any, prefix: str) -> dict[str, float]:
    """A few finite numbers of a map, by name (see `ErrorMap.scalars`)."""
    labels, share = max(emap.labels, 1), ratio(emap.mass, emap.mass.sum())
    few = math.ceil(FEW * share.numel())
    found = {
        "loss": emap.loss / labels,
        "error_per_label": float(emap.mass.sum()) / labels,
        "top_5_percent_share": float(share.flatten().topk(few).values.sum()),
        "concentration": emap.diagnosis.concentration,
        "unrouted_nodes": int((emap.count == 0).sum()),
    }
    found |= {f"layer_{layer}_share": part for layer, part in zip(emap.layers, share.sum(1).tolist(), strict=True)}
    return {f"{prefix}{name}": float(value) for name, value in found.items() if math.isfinite(value)}
