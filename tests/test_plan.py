"""From a map and a budget to a locus: deterministic, monotone, and it takes the best."""

import pytest
import torch
from peft import get_peft_model

from peft_pcgrow import ErrorMap, Locus, PCGrowConfig, measure_errors
from peft_pcgrow.plan import choose
from tiny import build, tokens

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


def parts_map(estimate, overlap=None) -> ErrorMap:
    """A map whose down projections have the given removable errors, `[3, 8]`, alike in every neuron."""
    count = torch.ones(3, 8, dtype=torch.float64)
    base = {"layouts": {"up_proj": [0, 1, False], "down_proj": [1, 1, False]}}
    base["shapes"] = {"up_proj": [4, 4], "down_proj": [4, 4]}
    signal = torch.eye(4, dtype=torch.float64) / 4
    down = torch.as_tensor(estimate, dtype=torch.float64)[None, :, :, None, None] * signal.expand(4, 3, 8, 4, 4)
    labels = torch.ones(4, dtype=torch.float64)
    gradient = {"up_proj": 0.25 * down, "down_proj": down}
    emap = ErrorMap(LAYERS, count, count, count, count, gradient, base=base, fold_labels=labels)
    emap.shared = None if overlap is None else overlap
    return emap


def test_matrices_are_chosen_by_what_a_parameter_buys():
    strength = torch.linspace(1, 2, 24).view(3, 8)
    choice = choose(LAYERS, 8, 0.25, "removable", parts_map(strength), resolution="matrix")
    # half of the parameters of the best experts are in their down projections: 12 of 48 matrices
    assert choice.parts is not None
    experts = [(layer, *item) for layer, chosen in choice.parts.items() for item in chosen.items()]
    listed = [(layer, expert, part) for layer, expert, parts in experts for part in parts]
    assert len(listed) == 12
    assert {part for *_, part in listed} == {"down_proj"}
    assert {(int(layer), int(expert)) for layer, expert, _ in listed} == set(choice.locus.nodes)
    best = strength.flatten().argsort(descending=True)[:12].tolist()
    assert {(LAYERS[i // 8], i % 8) for i in best} == set(choice.locus.nodes)


@pytest.mark.parametrize("resolution", ["matrix", "neurons"])
@pytest.mark.parametrize("select", ["removable", "joint", "coherent", "random"])
def test_parts_spend_the_budget(resolution, select):
    emap = parts_map(torch.rand(3, 8), torch.eye(24))
    each = 1 / 96 if resolution == "neurons" else 1 / 48
    for budget in (0.03, 0.1, 0.5, 1.0):
        choice = choose(LAYERS, 8, budget, select, emap, resolution=resolution, block=1)
        count = sum(len(parts) for experts in choice.parts.values() for parts in experts.values())
        assert count == int(budget / each + 1e-9)
    with pytest.raises(ValueError, match="is less than the smallest part"):
        choose(LAYERS, 8, 0.005, select, emap, resolution=resolution, block=1)


def test_of_two_nodes_that_would_fix_the_same_tokens_one_is_chosen():
    strength = torch.zeros(3, 8)
    strength[0, 0], strength[1, 1], strength[2, 2] = 3.0, 2.9, 2.0
    overlap = torch.eye(24)
    apart = parts_map(strength, overlap.clone())
    overlap[0, 9] = overlap[9, 0] = 0.999
    twins = parts_map(strength, overlap)
    for emap, want in ((apart, {(1, 0), (2, 1)}), (twins, {(1, 0), (5, 2)})):
        assert set(choose(LAYERS, 8, 2 / 24, "joint", emap).locus.nodes) == want
        assert set(choose(LAYERS, 8, 2 / 24, "removable", emap).locus.nodes) == {(1, 0), (2, 1)}
    assert len(choose(LAYERS, 8, 3 / 24, "joint", twins).locus.nodes) == 3


@pytest.mark.parametrize("select", ["removable", "joint"])
def test_at_most_so_many_in_a_layer(select):
    strength = torch.ones(3, 8)
    strength[1] = 5.0
    emap = parts_map(strength, torch.eye(24))
    assert {layer for layer, _ in choose(LAYERS, 8, 0.25, select, emap).locus.nodes} == {2}
    capped = choose(LAYERS, 8, 0.25, select, emap, max_per_layer=2).locus
    assert {layer: len(experts) for layer, experts in capped.items()} == {1: 2, 2: 2, 5: 2}


def test_a_step_that_ends_higher_costs_less():
    strength = torch.ones(3, 8)
    strength[0], strength[2] = 1.1, 1.05
    emap = parts_map(strength)
    assert {layer for layer, _ in choose(LAYERS, 8, 0.125, "removable", emap).locus.nodes} == {1}
    priced = choose(LAYERS, 8, 0.125, "removable", emap, cost_weight=1.0).locus
    assert {layer for layer, _ in priced.nodes} == {5}


def test_what_cannot_tell_parts_apart():
    emap = parts_map(torch.ones(3, 8))
    with pytest.raises(ValueError, match="select='gate' knows whole experts only"):
        choose(LAYERS, 8, 0.5, "gate", emap, resolution="matrix")
    with pytest.raises(ValueError, match="unknown resolution='layer'"):
        choose(LAYERS, 8, 0.5, "removable", emap, resolution="layer")
    emap.gradient = {}
    with pytest.raises(ValueError, match="holds no weight gradients"):
        choose(LAYERS, 8, 0.5, "joint", emap)


@pytest.mark.parametrize(("settle", "select"), [("sweep", "removable"), ("direct", "error")])
def test_default_is_the_best_that_the_map_can_tell(settle, select):
    """What a step would remove, if the map has the gradients to tell; else the error. The config says which."""
    emap = measure_errors(build(), [tokens()], settle=settle, progress=False)
    found, asked = (
        get_peft_model(build(), PCGrowConfig(error_map=emap, **given)) for given in ({}, {"select": select})
    )
    assert found.peft_config["default"].select == select
    assert found.peft_config["default"].locus == asked.peft_config["default"].locus
