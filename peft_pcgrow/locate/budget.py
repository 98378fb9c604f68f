"""From scores and a budget to a locus. Touches no weight. Shapes: L layers with experts, E experts, P parts of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_pcgrow.gates.gate import at_rate
from peft_pcgrow.locus import RESOLUTIONS, Locus
from peft_pcgrow.maps.error_map import ErrorMap

# what a config can rank nodes by; of these, what tells the parts of one expert apart
SELECTIONS = ("removable", "error", "gate", "frequency", "random")
PART_SELECTIONS = ("removable", "random")


@dataclass(frozen=True)
class Choice:
    """What to grow: the nodes, and if not all of them as a whole, which parts.

    Attributes:
        locus: the nodes.
        parts: layer -> expert -> names of matrices, layers and experts as in a config file; None: whole experts.
    """

    locus: Locus
    parts: dict[str, dict[str, list]] | None = None


def check_budget(budget: float) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(f"budget must be a share of the expert parameters in (0, 1], got {budget!r}")


def choose(scores: Tensor, budget: float, layers: Sequence[int] | None = None) -> Locus:
    """The nodes that score highest, by any rule, as many as the budget allows, at least one: for PCGrowConfig(locus=).

    Args:
        scores (Tensor): `[L, E]`, the higher the better; -inf: never chosen. Of equal ones, the first in reading order.
        budget (float): share of the nodes, and so of the expert parameters, in (0, 1].
        layers (sequence of int): decoder layers of the L rows, `emap.layers` for what a map gave; None: 0 to L - 1.

    Raises:
        ValueError: scores that are no `[L, E]` numbers, NaN, or -inf everywhere; a budget outside (0, 1]; layers that
            are not L different ones.

    Example:
        >>> choose(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), budget=0.5, layers=(1, 3))
        Locus({1: (1,), 3: (0,)})
    """
    check_budget(budget)
    scores = torch.as_tensor(scores, dtype=torch.float64, device="cpu").detach()
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"scores must be [layers, experts], got shape {list(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError("scores hold NaN, which has no rank: give -inf where a node must not be chosen")
    named = range(len(scores)) if layers is None else [int(layer) for layer in layers]
    if len(named) != len(scores) or len(set(named)) < len(named):
        raise ValueError(f"layers must name the {len(scores)} rows of scores, each once, got {list(named)}")
    count = max(1, round(budget * scores.numel()))
    best = [place for place in _ranked(scores)[:count] if scores.flatten()[place] > float("-inf")]
    if not best:
        raise ValueError("scores are -inf everywhere: there is nothing to choose from")
    return _locus(best, scores.shape[1], named)


def located(
    layers: tuple[int, ...],
    experts: int,
    budget: float,
    select: str,
    error_map: ErrorMap | None = None,
    seed: int = 0,
    uniform: bool = False,
    resolution: str = "expert",
    lead: Tensor | None = None,
) -> Choice:
    """The nodes to grow, or parts of them: the best by `select` that fit into `budget`, at least one.

    Args:
        layers: decoder layers with experts, L of them; experts: E.
        budget: share of the expert parameters in (0, 1].
        select: a statistic of the map (see `ErrorMap.score`), or "random" (the control; drawn from `seed`).
        uniform: take the best `round(budget * E)` of each layer instead, at least one.
        error_map: needed for everything but "random" of whole experts; measured with weight gradients for "removable"
            and for matrices.
        resolution: "expert", or "matrix", which ranks by what a parameter brings.
        lead: the node that stands for each expert, of it and its newborns (see `leading`); None: the expert itself.

    Raises:
        ValueError: budget outside (0, 1], unknown `select` or `resolution`, no map, a map without any error or without
            what `select` needs, or a budget smaller than the smallest part.
    """
    check_budget(budget)
    if select not in SELECTIONS:
        raise ValueError(f"unknown select={select!r}; choose from {', '.join(SELECTIONS)}")
    if resolution not in RESOLUTIONS:
        raise ValueError(f"unknown resolution={resolution!r}; choose from {', '.join(RESOLUTIONS)}")
    if resolution != "expert" and select not in PART_SELECTIONS:
        raise ValueError(
            f"select={select!r} knows whole experts only; at resolution={resolution!r} choose from "
            f"{', '.join(PART_SELECTIONS)}"
        )
    if error_map is None and (select != "random" or resolution != "expert"):
        raise ValueError(f"select={select!r} ranks nodes by an error map: give error_map=, or locus= by hand")
    parts = error_map.removable(resolution) if error_map is not None and resolution != "expert" else None
    shape = (len(layers), experts) if parts is None else tuple(parts.estimate.shape)
    if select == "random":
        score = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    else:
        assert error_map is not None
        if parts is not None:
            score = parts.density
        else:
            score = error_map.score(select) if lead is None else error_map.scores(select)[lead]
        if not float(score.clamp_min(0).sum()) > 0:
            raise ValueError(f"the error map has no {select} anywhere: there is nothing to grow on this corpus")
    width = score[0].numel()
    if uniform:
        each = max(1, round(budget * experts))
        best = [row * width + place for row, held in enumerate(score) for place in _ranked(held)[:each]]
    elif parts is None:
        return Choice(choose(score, budget, layers))
    else:
        best = _fitting(score, parts.parameters.expand(shape), budget)
    if parts is None:
        return Choice(_locus(best, width, layers))
    chosen: dict[str, dict[str, list]] = {}
    for place in sorted(best):
        node, part = divmod(place, len(parts.names))
        here = chosen.setdefault(str(layers[node // experts]), {})
        here.setdefault(str(node % experts), []).append(parts.names[part])
    return Choice(_locus(sorted({place // len(parts.names) for place in best}), experts, layers), chosen)


def leading(emap: ErrorMap, gate_fpr: float) -> Tensor:
    """Of each expert and its newborns, the node that a new newborn would take its rows from, `[L, E]`: that of which a
    gate at this rate would take the most error. Places among `emap.scores`."""
    experts, total = emap.count.shape[1], emap.count.numel()
    taken, lead = emap.scores("error"), torch.arange(total, device="cpu")
    if emap.separation is not None:
        taken = taken * at_rate(emap.separation.every("recall"), gate_fpr)
    for place, (layer, donor, _) in enumerate(emap.newborns.nodes, start=total):
        expert = emap.layers.index(layer) * experts + donor
        if taken[place] > taken[lead[expert]]:
            lead[expert] = place
    return lead.view_as(emap.count)


def _ranked(scores: Tensor) -> list[int]:
    """Places in reading order, highest first."""
    return torch.argsort(scores.flatten(), descending=True, stable=True).tolist()


def _fitting(scores: Tensor, sizes: Tensor, budget: float) -> list[int]:
    """The best that fit into the budget, smaller ones in the gap that a larger one leaves."""
    wanted, total = sizes.flatten().tolist(), float(sizes.sum())
    best, left = [], budget * total + 1e-9
    for place in _ranked(scores):
        if wanted[place] <= left:
            best.append(place)
            left -= wanted[place]
    if not best:
        raise ValueError(
            f"budget={budget} is less than the smallest part, {min(wanted) / total:.2g} of the expert parameters"
        )
    return best


def _locus(places: Sequence[int], experts: int, layers: Sequence[int]) -> Locus:
    """The nodes at some places, in reading order, of `[L, E]`."""
    nodes: dict[int, list[int]] = {}
    for place in places:
        nodes.setdefault(layers[place // experts], []).append(place % experts)
    return Locus(nodes)
