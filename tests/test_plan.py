"""From a map and a budget to a locus: deterministic, monotone, and it takes the best."""

import pytest
import torch

from peft_pcgrow import ErrorMap, Locus
from peft_pcgrow.plan import choose

LAYERS = (1, 2, 5)


def a_map() -> ErrorMap:
    sums = {name: torch.rand(3, 8, dtype=torch.float64) for name in ("count", "weight", "mass", "square")}
    base = {"layouts": {"down_proj": [1, 1, False]}, "shapes": {"down_proj": [4, 4]}}
    labels = torch.full((4,), 10.0, dtype=torch.float64)
    gradient = torch.randn(3, 8, 4, 4) + torch.randn(4, 3, 8, 4, 4)
    return ErrorMap(LAYERS, **sums, gradient={"down_proj": gradient}, base=base, fold_labels=labels)


@pytest.mark.parametrize("select", ["error", "square", "coherent", "removable", "gate", "frequency"])
@pytest.mark.parametrize("budget", [0.01, 0.125, 0.5, 1.0])
def test_takes_the_best_nodes(select, budget):
    emap = a_map()
    locus = choose(LAYERS, 8, budget, select, emap).locus
    assert len(locus.nodes) == max(1, round(budget * 24))
    score = emap.score(select)
    inside = torch.zeros(3, 8, dtype=torch.bool)
    for layer, expert in locus.nodes:
        inside[LAYERS.index(layer), expert] = True
    if not inside.all():
        assert score[inside].min() >= score[~inside].max()


@pytest.mark.parametrize("select", ["error", "random"])
def test_a_larger_budget_keeps_the_smaller_one(select):
    emap = a_map()
    small, large = (set(choose(LAYERS, 8, budget, select, emap).locus.nodes) for budget in (0.2, 0.6))
    assert small < large


def test_random_follows_its_seed():
    first, again, other = (choose(LAYERS, 8, 0.25, "random", seed=seed).locus for seed in (3, 3, 4))
    assert first == again
    assert first != other
    hits = torch.zeros(8)
    for seed in range(400):
        for _, expert in choose(LAYERS, 8, 0.25, "random", seed=seed).locus.nodes:
            hits[expert] += 1
    # 400 draws of 6 of 24 nodes: 300 a column, standard deviation under 15
    assert (hits - 300).abs().max() < 75


def test_a_map_without_error_has_nothing_to_grow():
    emap = a_map()
    emap.mass.zero_()
    with pytest.raises(ValueError, match="no error anywhere"):
        choose(LAYERS, 8, 0.5, "error", emap)


def test_a_ranking_needs_a_map():
    with pytest.raises(ValueError, match="give error_map="):
        choose(LAYERS, 8, 0.5, "gate")


def test_locus_is_sorted_and_survives_json():
    locus = Locus({5: [3, 0, 3], "2": [7]})
    assert locus.nodes == [(2, 7), (5, 0), (5, 3)]
    assert Locus(locus.to_json()) == locus == {2: (7,), 5: (0, 3)}
    assert locus.describe() == "layer 2: 7 | layer 5: 0 3"
