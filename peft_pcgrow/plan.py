"""From an error map and a budget to a locus. Touches no weight."""

import torch
from torch import Tensor

from peft_pcgrow.error_map import STATISTICS, ErrorMap
from peft_pcgrow.gate import at_rate
from peft_pcgrow.locus import Locus

# rules for the donors of newborns, beside the map's own statistics
DONORS = ("lowest", "contested", "separable")
SELECTIONS = (*STATISTICS, *DONORS, "random")


def check_budget(budget: float) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(f"budget must be a share of the expert parameters in (0, 1], got {budget!r}")


def choose(
    layers: tuple[int, ...],
    experts: int,
    budget: float,
    select: str = "error",
    error_map: ErrorMap | None = None,
    seed: int = 0,
    gate_fpr: float = 0.01,
    uniform: bool = False,
) -> Locus:
    """The nodes to grow: the best `round(budget * L * E)` by `select`, at least one.

    Args:
        layers: decoder layers with experts, L of them; experts: E.
        budget: share of the expert parameters in (0, 1] (all nodes of a model have the same size).
        select: a statistic of the map; "lowest" (least error among the nodes that the domain reaches); "contested" (the
            smaller of the domain's and the retain text's share of the layer's rows); "separable" (the error that a gate
            would let through at `gate_fpr`); or "random" (the control; drawn from `seed`).
        uniform: take the best `round(budget * E)` of each layer instead, at least one.
        error_map: needed for everything but "random"; measured with retain= for "contested" and "separable".

    Raises:
        ValueError: budget outside (0, 1], unknown `select`, no map, or a map without any error.
    """
    check_budget(budget)
    if select not in SELECTIONS:
        raise ValueError(f"unknown select={select!r}; choose from {', '.join(SELECTIONS)}")
    score: Tensor
    if select == "random":
        score = torch.rand(len(layers), experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    elif error_map is None:
        raise ValueError(f"select={select!r} ranks nodes by an error map: give error_map=, or locus= by hand")
    else:
        score = _donors(error_map, select, gate_fpr) if select in DONORS else error_map.score(select)
        if not float(score.sum()) > 0:
            raise ValueError(f"the error map has no {select} anywhere: there is nothing to grow on this corpus")
    chosen: dict[int, list[int]] = {}
    if uniform:
        for layer, row in zip(layers, score, strict=True):
            best = torch.argsort(row, descending=True, stable=True)[: max(1, round(budget * experts))]
            chosen[layer] = best.tolist()
        return Locus(chosen)
    nodes = max(1, round(budget * score.numel()))
    order = torch.argsort(score.flatten(), descending=True, stable=True)[:nodes].tolist()
    for i in order:
        chosen.setdefault(layers[i // experts], []).append(i % experts)
    return Locus(chosen)


def _donors(error_map: ErrorMap, rule: str, gate_fpr: float) -> Tensor:
    """Score `[L, E]` of every node as a donor, 0 where no domain token comes."""
    if rule == "lowest":
        least = error_map.mass.clone()
        least[error_map.count == 0] = float("inf")
        # the ranks, upside down: a score that is highest for the least error
        rank = torch.argsort(torch.argsort(least.flatten(), stable=True), stable=True).view_as(least)
        return torch.where(error_map.count > 0, float(rank.numel()) - rank, 0.0)
    separation = error_map.separation
    if separation is None:
        raise ValueError(f"select={rule!r} compares with retain text: measure_errors(model, batches, retain=...)")
    if rule == "contested":
        return separation.contested
    return error_map.mass * at_rate(separation.recall, gate_fpr)
