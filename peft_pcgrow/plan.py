"""From an error map and a budget to a locus. Touches no weight."""

import torch
from torch import Tensor

from peft_pcgrow.error_map import STATISTICS, ErrorMap
from peft_pcgrow.locus import Locus

SELECTIONS = (*STATISTICS, "random")


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
) -> Locus:
    """The nodes to grow: the best `round(budget * L * E)` by `select`, at least one.

    Args:
        layers: decoder layers with experts, L of them; experts: E.
        budget: share of the expert parameters in (0, 1] (all nodes of a model have the same size).
        select: a statistic of the map, or "random" (the control; drawn from `seed`).
        error_map: needed for everything but "random".

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
        score = error_map.score(select)
        if not float(score.sum()) > 0:
            raise ValueError(f"the error map has no {select} anywhere: there is nothing to grow on this corpus")
    nodes = max(1, round(budget * score.numel()))
    order = torch.argsort(score.flatten(), descending=True, stable=True)[:nodes].tolist()
    chosen: dict[int, list[int]] = {}
    for i in order:
        chosen.setdefault(layers[i // experts], []).append(i % experts)
    return Locus(chosen)
