"""What error maps say node by node: the columns of a page and of a table, and a few numbers for a log.

`emap` is an ErrorMap throughout; this module stands below it and knows it by its properties.
"""

import math
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.gate import at_rate
from peft_pcgrow.lifecycle import CONVERGED, HEAVY, MOVED, STAGES, check_pair, stages
from peft_pcgrow.page import Column, Page

# false-positive rate of the gates whose recall is shown
RATE = 0.01
# nodes in the page's line of top nodes
TOP = 8
# share of the nodes whose share of the error goes to a log
FEW = 0.05
MEANINGS = {
    "generic": "no row of this corpus, or a light node whose error stayed",
    "frontier": f"over {HEAVY:g} times the mean node's error, not located, error stayed",
    "growing": f"located, or error per row fell by over {MOVED:.0%}",
    "converged": f"error per row at most {CONVERGED:.0%} of the former, or covered",
}


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.where(whole > 0, torch.ones_like(whole)), 0.0)


def contents(emap: Any, before: Any, located: Tensor) -> Page:
    """The page of a map; with `before`, also what changed since that map. `located [L, E]` bool: the locus."""
    rows = emap.count.sum(1, keepdim=True)
    frequency, share, coherent = ratio(emap.count, rows), ratio(emap.mass, emap.mass.sum()), emap.coherent
    busiest = "busiest expert"
    columns = [
        Column("count", "rows routed here", emap.count),
        Column("weight", "routed weight", emap.weight),
        Column("error", "error", emap.mass),
        Column("per_row", "error per row", ratio(emap.mass, emap.count)),
        Column("share", "Error", share, "orange", "share of the whole model's error", True, share.sum(1), "in the layer"),
        Column("frequency", "Frequency", frequency, "blue", "share of the layer's rows", True, frequency.amax(1), busiest),
    ]  # fmt: skip
    if emap.gradient:
        columns.append(Column("coherent", "Coherent error", coherent, "purple", "norm of the summed weight gradient",
                              bars=coherent.sum(1), bars_label="in the layer"))  # fmt: skip
    if emap.separation is not None:
        recall = at_rate(emap.separation.recall, RATE).double()
        columns.append(Column("separability", "Gate separability", recall, "green", 
                              f"domain rows let in at {RATE:.0%} of retain rows", True, recall.mean(1), "mean"))  # fmt: skip
    loss = f"loss {emap.loss / max(emap.labels, 1):.3f} nats per label token"
    if before is not None:
        check_pair(emap, before)
        former = max(float(before.mass.sum()), torch.finfo(torch.float64).tiny)
        # of one corpus: per token is by the same number of tokens
        change = (emap.mass - before.mass) / former
        columns += [
            Column("before", "error per row before", ratio(before.mass, before.count)),
            Column("change", "Change of error", change, "change", "per token, of all error before", True, change.sum(1),
                   "in the layer"),
            Column("lifecycle", "Lifecycle", stages(emap, before, located), "stages",
                   "what growing did to each node", bars_label="experts"),
        ]  # fmt: skip
        loss = f"loss {before.loss / max(before.labels, 1):.3f} → {loss.removeprefix('loss ')}"
    layers, experts = emap.count.shape
    facts = [
        f"{layers} layers × {experts} experts, {emap.tokens:,} tokens, {loss}",
        f"Diagnosis: {emap.diagnosis}",
    ]
    notes = []
    if located.any():
        notes.append(f"outlined: the locus ({int(located.sum())} nodes)")
    if (emap.count == 0).any():
        notes.append(f"grey: never routed ({int((emap.count == 0).sum())} nodes)")
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
        located=located,
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
        "half_mass_share": emap.diagnosis.half_mass_share,
        "unrouted_nodes": int((emap.count == 0).sum()),
    }
    found |= {f"layer_{layer}_share": part for layer, part in zip(emap.layers, share.sum(1).tolist(), strict=True)}
    return {f"{prefix}{name}": float(value) for name, value in found.items() if math.isfinite(value)}
