"""From an error map and a budget to a locus. Touches no weight."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_pcgrow.gates.gate import at_rate
from peft_pcgrow.locus import RESOLUTIONS, Locus
from peft_pcgrow.maps.error_map import STATISTICS, ErrorMap

# rules for the donors of newborns, beside the map's own statistics
DONORS = ("lowest", "contested", "separable")
SELECTIONS = (*STATISTICS, "joint", *DONORS, "random")
# what tells the parts of one expert apart
PART_SELECTIONS = ("removable", "joint", "coherent", "random")
# one layer's recomputation and vector-Jacobian product, in units of its forward pass
SETTLING_COST = 2.0


@dataclass(frozen=True)
class Choice:
    """What to grow: the nodes, and if not all of them as a whole, which parts.

    Attributes:
        locus: the nodes.
        parts: layer -> expert -> names of matrices or indices of blocks of neurons, layers and experts as in a config
            file; None: whole experts.
    """

    locus: Locus
    parts: dict[str, dict[str, list]] | None = None


@dataclass(frozen=True)
class Candidates:
    """Everything that could be chosen, P parts of nodes; tensors are `[P]` but `weight`.

    Attributes:
        score: what they are ranked by. size: parameters of each. layer, expert: where each is, rows of the map.
        part: which part of its expert each is; -1: all of it.
        names: of the parts, if they have names.
        overlap: cosine between nodes of the tokens' errors there, `[L * E, L * E]`; None: as if none overlapped.
    """

    score: Tensor
    size: Tensor
    layer: Tensor
    expert: Tensor
    part: Tensor
    names: tuple[str, ...] = ()
    overlap: Tensor | None = None
    total: float = field(default=0.0)


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
    resolution: str = "expert",
    block: int = 16,
    max_per_layer: int | None = None,
    cost_weight: float = 0.0,
    lead: Tensor | None = None,
) -> Choice:
    """The nodes to grow, or parts of them: the best by `select` that fit into `budget`, at least one.

    Args:
        layers: decoder layers with experts, L of them; experts: E.
        budget: share of the expert parameters in (0, 1].
        select: a statistic of the map; "joint" (greedy by what each candidate could remove that those chosen before it
            could not: `removable` times the part of the candidate's token errors that is orthogonal to theirs);
            "lowest" (least error among the nodes that the domain reaches); "contested" (the smaller of the domain's and
            the retain text's share of the layer's rows); "separable" (the error that a gate would let through at
            `gate_fpr`); or "random" (the control; drawn from `seed`).
        uniform: take the best `round(budget * E)` of each layer instead, at least one.
        error_map: needed for everything but "random" of whole experts; measured with retain= for "contested" and
            "separable", with weight gradients for "removable" and "joint".
        resolution: "expert", "matrix" or "neurons"; the finer ones rank by "removable", "joint", "coherent" or
            "random".
        block: neurons a block, at resolution "neurons".
        max_per_layer: candidates chosen in one layer at most.
        cost_weight: in [0, 1], how much the cost of a step counts: errors are carried down to the lowest chosen layer
            only, so layers above some bound are chosen from, the bound with the most score / cost^cost_weight.
        lead: the node that stands for each expert, of it and its newborns (see `leading`); None: the expert itself.

    Raises:
        ValueError: budget outside (0, 1], unknown `select` or `resolution`, no map, a map without any error or without
            what `select` needs, a budget smaller than the smallest part, or a cap that leaves it unspent.
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
    found = _candidates(len(layers), experts, select, error_map, seed, gate_fpr, resolution, block, lead)
    if select != "random" and not float(found.score.clamp_min(0).sum()) > 0:
        raise ValueError(f"the error map has no {select} anywhere: there is nothing to grow on this corpus")
    if uniform:
        per_layer = max(1, round(budget * experts))
        chosen = [i for row in range(len(layers)) for i in _best(found, per_layer, found.layer == row)]
    else:
        chosen = _within(found, budget, len(layers), max_per_layer, cost_weight)
    return _choice(found, chosen, layers)


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


def _candidates(
    rows: int,
    experts: int,
    select: str,
    emap: ErrorMap | None,
    seed: int,
    gate_fpr: float,
    resolution: str,
    block: int,
    lead: Tensor | None,
) -> Candidates:
    """Score and size of every expert, or of every part."""
    names: tuple[str, ...] = ()
    if resolution == "expert":
        sizes = torch.ones((), dtype=torch.float64, device="cpu")
        shape = (rows, experts, 1)
    else:
        assert emap is not None
        parts = emap.removable(resolution, block)
        names, sizes, shape = parts.names, parts.parameters, parts.estimate.shape
    if select == "random":
        score = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    else:
        assert emap is not None
        score = _score(emap, select, gate_fpr, resolution, block, lead).reshape(shape)
    layer, expert, part = torch.meshgrid(*(torch.arange(n, device="cpu") for n in shape), indexing="ij")
    size = sizes.expand(shape)
    if resolution != "expert" and select != "random":
        score = score / size
    overlap = emap.overlap if emap is not None and select == "joint" else None
    if overlap is not None:
        nodes = torch.arange(rows * experts, device="cpu") if lead is None else lead.flatten()
        overlap = overlap[nodes][:, nodes]
    return Candidates(
        score.flatten(),
        size.flatten(),
        layer.flatten(),
        expert.flatten(),
        part.flatten() if resolution != "expert" else torch.full_like(part, -1).flatten(),
        names,
        overlap,
        float(size.sum()),
    )


def _score(emap: ErrorMap, select: str, gate_fpr: float, resolution: str, block: int, lead: Tensor | None) -> Tensor:
    if select in DONORS:
        return _donors(emap, select, gate_fpr, lead)
    if lead is not None:
        return emap.scores("removable" if select == "joint" else select)[lead]
    if select == "joint" or resolution != "expert":
        if select == "coherent":
            return emap.pull(resolution, block)
        return emap.removable(resolution, block).estimate
    return emap.score(select)


def _within(found: Candidates, budget: float, rows: int, max_per_layer: int | None, cost_weight: float) -> list[int]:
    """The best that fit into the budget, above the bound that pays best."""
    share = budget * found.total
    if bool((found.part < 0).all()):
        # of experts, so many that the budget is met to half of one
        share = max(1.0, float(round(share)))
    bounds = range(rows) if cost_weight else (0,)
    best: tuple[float, list[int]] | None = None
    for bound in bounds:
        chosen = _greedy(found, share, found.layer >= bound, max_per_layer)
        lowest = min((int(found.layer[i]) for i in chosen), default=bound)
        cost = 1 + SETTLING_COST * (rows - lowest) / rows
        value = float((found.score * found.size)[chosen].sum()) / cost**cost_weight
        if chosen and (best is None or value > best[0]):
            best = value, chosen
    if best is None:
        smallest = float(found.size.min()) / found.total
        raise ValueError(f"budget={budget} is less than the smallest part, {smallest:.2g} of the expert parameters")
    return best[1]


def _greedy(found: Candidates, share: float, allowed: Tensor, max_per_layer: int | None) -> list[int]:
    """One after another the candidate with the highest score, discounted by what those before it explain."""
    score = torch.where(allowed, found.score, float("-inf"))
    if found.overlap is None:
        order = torch.argsort(score, descending=True, stable=True).tolist()
        return _fitting(found, order, score, share, max_per_layer)
    experts = int(found.expert.max()) + 1
    node = found.layer * experts + found.expert
    # Gram-Schmidt on the nodes' token errors, by pivoted Cholesky of their cosines
    residual = torch.ones(len(found.overlap), dtype=torch.float64, device="cpu")
    columns: list[Tensor] = []
    taken = torch.zeros(int(found.layer.max()) + 1, dtype=torch.long, device="cpu")
    chosen: list[int] = []
    spent, explained = 0.0, set()
    open_ = score > float("-inf")
    while True:
        fits = open_ & (found.size <= share - spent + 1e-9)
        if max_per_layer is not None:
            fits &= taken[found.layer] < max_per_layer
        if not bool(fits.any()):
            return chosen
        # a node that was chosen from already is not discounted by itself
        own = torch.tensor([n in explained for n in range(len(residual))], device="cpu")
        discount = torch.where(own, 1.0, residual.clamp_min(0).sqrt())
        best = int(torch.where(fits, score * discount[node], float("-inf")).argmax())
        chosen.append(best)
        open_[best] = False
        spent += float(found.size[best])
        taken[found.layer[best]] += 1
        pivot = int(node[best])
        if pivot not in explained and float(residual[pivot]) > 1e-12:
            explained.add(pivot)
            column = found.overlap[:, pivot].double()
            for earlier in columns:
                column = column - earlier * earlier[pivot]
            column = column / residual[pivot].sqrt()
            columns.append(column)
            residual = residual - column.square()


def _fitting(
    found: Candidates, order: Sequence[int], score: Tensor, share: float, max_per_layer: int | None
) -> list[int]:
    """The first of `order` that fit into the share, smaller ones in the gap that a larger one leaves."""
    sizes, layers, scores = found.size.tolist(), found.layer.tolist(), score.tolist()
    chosen, spent = [], 0.0
    taken: dict[int, int] = {}
    for i in order:
        if scores[i] == float("-inf"):
            break
        full = max_per_layer is not None and taken.get(layers[i], 0) >= max_per_layer
        if not full and spent + sizes[i] <= share + 1e-9:
            chosen.append(i)
            spent += sizes[i]
            taken[layers[i]] = taken.get(layers[i], 0) + 1
    return chosen


def _best(found: Candidates, count: int, allowed: Tensor) -> list[int]:
    score = torch.where(allowed, found.score, float("-inf"))
    return torch.argsort(score, descending=True, stable=True)[:count].tolist()


def _choice(found: Candidates, chosen: Sequence[int], layers: tuple[int, ...]) -> Choice:
    nodes: dict[int, list[int]] = {}
    parts: dict[str, dict[str, list]] = {}
    for i in sorted(chosen):
        layer, expert, part = layers[int(found.layer[i])], int(found.expert[i]), int(found.part[i])
        if expert not in nodes.setdefault(layer, []):
            nodes[layer].append(expert)
        if part >= 0:
            named = found.names[part] if found.names else part
            parts.setdefault(str(layer), {}).setdefault(str(expert), []).append(named)
    return Choice(Locus(nodes), parts or None)


def _donors(error_map: ErrorMap, rule: str, gate_fpr: float, lead: Tensor | None) -> Tensor:
    """Score `[L, E]` of every node as a donor, 0 where no domain token comes."""
    if lead is None:
        lead = torch.arange(error_map.count.numel(), device="cpu").view_as(error_map.count)
    mass, count = error_map.scores("error")[lead], error_map.scores("frequency")[lead]
    if rule == "lowest":
        least = mass.masked_fill(count == 0, float("inf"))
        # the ranks, upside down: a score that is highest for the least error
        rank = torch.argsort(torch.argsort(least.flatten(), stable=True), stable=True).view_as(least)
        return torch.where(count > 0, float(rank.numel()) - rank, 0.0)
    separation = error_map.separation
    if separation is None:
        raise ValueError(f"select={rule!r} compares with retain text: measure_errors(model, batches, retain=...)")
    if rule == "contested":
        return separation.contested
    return mass * at_rate(separation.every("recall"), gate_fpr)[lead]
