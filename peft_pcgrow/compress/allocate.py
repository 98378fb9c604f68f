"""Spend bytes where they save the most: a multiple-choice knapsack, relaxed to the convex hulls of its choices."""

from itertools import pairwise

import torch
from torch import Tensor


def allocate(damage: Tensor, sizes: Tensor, budget: float) -> Tensor | None:
    """One of F forms for each of `[..., F]` items, with the least total damage within the budget.

    From the best form of each item, steps down its lower convex hull are taken in the order of damage per byte saved
    (Sinha & Zoltners 1979): no other choice of the same bytes has less damage, and what is left over is less than one
    step. Then steps are taken back where they fit.

    Args:
        damage, sizes: of each item in each form, `[..., F]`; budget: for the sum of the sizes.

    Returns:
        Indices of forms, `[...]`; None if the smallest forms exceed the budget.
    """
    shape, forms = damage.shape[:-1], damage.shape[-1]
    damages, bytes_ = damage.reshape(-1, forms).tolist(), sizes.reshape(-1, forms).tolist()
    choice, steps, spent = [], [], 0.0
    for item, (harm, size) in enumerate(zip(damages, bytes_, strict=True)):
        hull = _hull(harm, size)
        choice.append(hull[0])
        spent += size[hull[0]]
        steepest = 0.0
        for place, (before, after) in enumerate(pairwise(hull)):
            # slopes rise along a hull, but their own rounding must not turn two around
            steepest = max(steepest, (harm[after] - harm[before]) / (size[before] - size[after]))
            steps.append((steepest, item, place, before, after))
    steps.sort()
    taken = []
    for *_, item, _, before, after in steps:
        if spent <= budget:
            break
        spent += bytes_[item][after] - bytes_[item][before]
        choice[item] = after
        taken.append((item, before, after))
    if spent > budget:
        return None
    last = set()
    for item, before, after in reversed(taken):
        more = bytes_[item][before] - bytes_[item][after]
        if item not in last and choice[item] == after and spent + more <= budget:
            choice[item] = before
            spent += more
        last.add(item)
    return torch.tensor(choice, device="cpu").view(shape)


def _hull(harm: list[float], size: list[float]) -> list[int]:
    """Forms on the lower convex hull of damage over size, the least harmful first."""
    # the larger of two that harm alike is never chosen
    order = sorted(range(len(harm)), key=lambda form: (size[form], harm[form]))
    hull: list[int] = []
    least = float("inf")
    for form in order:
        if harm[form] >= least:
            continue
        least = harm[form]
        while len(hull) > 1:
            one, two = hull[-2], hull[-1]
            if (harm[one] - harm[two]) * (size[form] - size[two]) <= (harm[two] - harm[form]) * (size[two] - size[one]):
                hull.pop()
            else:
                break
        hull.append(form)
    return hull[::-1]
