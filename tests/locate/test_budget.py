"""From scores and a budget to a locus: deterministic, monotone, and it takes the best."""

import pytest
import torch
from peft import get_peft_model

from peft_pcgrow import ErrorMap, Locus, PCGrowConfig, choose, measure_errors
from peft_pcgrow.locate.budget import located
from tiny import build, tokens

LAYERS = (1, 2, 5)


def a_map() -> ErrorMap:
    sums = {name: torch.rand(3, 8, dtype=torch.float64) for name in ("count", "weight", "mass", "square")}
    base = {"layouts": {"down_proj": [1, 1, False]}, "shapes": {"down_proj": [4, 4]}}
    labels = torch.full((4,), 10.0, dtype=torch.float64)
    gradient = torch.randn(3, 8, 4, 4) + torch.randn(4, 3, 8, 4, 4)
    return ErrorMap(LAYERS, **sums, gradient={"down_proj": gradient}, base=base, fold_labels=labels)


@pytest.mark.parametrize("select", ["error", "removable", "gate", "frequency"])
@pytest.mark.parametrize("budget", [0.01, 0.125, 0.5, 1.0])
def test_takes_the_best_nodes(select, budget):
    emap = a_map()
    locus = located(LAYERS, 8, budget, select, emap).locus
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
    small, large = (set(located(LAYERS, 8, budget, select, emap).locus.nodes) for budget in (0.2, 0.6))
    assert small < large


def test_random_follows_its_seed():
    first, again, other = (located(LAYERS, 8, 0.25, "random", seed=seed).locus for seed in (3, 3, 4))
    assert first == again
    assert first != other
    hits = torch.zeros(8)
    for seed in range(400):
        for _, expert in located(LAYERS, 8, 0.25, "random", seed=seed).locus.nodes:
            hits[expert] += 1
    # 400 draws of 6 of 24 nodes: 300 a column, standard deviation under 15
    assert (hits - 300).abs().max() < 75


def test_a_map_without_error_has_nothing_to_grow():
    emap = a_map()
    emap.mass.zero_()
    with pytest.raises(ValueError, match="no error anywhere"):
        located(LAYERS, 8, 0.5, "error", emap)


def test_a_ranking_needs_a_map():
    with pytest.raises(ValueError, match="give error_map="):
        located(LAYERS, 8, 0.5, "gate")


def test_locus_is_sorted_and_survives_json():
    locus = Locus({5: [3, 0, 3], "2": [7]})
    assert locus.nodes == [(2, 7), (5, 0), (5, 3)]
    assert Locus(locus.to_json()) == locus == {2: (7,), 5: (0, 3)}
    assert locus.describe() == "layer 2: 7 | layer 5: 0 3"


def parts_map(estimate) -> ErrorMap:
    """A map whose down projections have the given removable errors, `[3, 8]`, alike in every neuron."""
    count = torch.ones(3, 8, dtype=torch.float64)
    base = {"layouts": {"up_proj": [0, 1, False], "down_proj": [1, 1, False]}}
    base["shapes"] = {"up_proj": [4, 4], "down_proj": [4, 4]}
    signal = torch.eye(4, dtype=torch.float64) / 4
    down = torch.as_tensor(estimate, dtype=torch.float64)[None, :, :, None, None] * signal.expand(4, 3, 8, 4, 4)
    labels = torch.ones(4, dtype=torch.float64)
    gradient = {"up_proj": 0.25 * down, "down_proj": down}
    return ErrorMap(LAYERS, count, count, count, count, gradient, base=base, fold_labels=labels)


def test_matrices_are_chosen_by_what_a_parameter_buys():
    strength = torch.linspace(1, 2, 24).view(3, 8)
    choice = located(LAYERS, 8, 0.25, "removable", parts_map(strength), resolution="matrix")
    # half of the parameters of the best experts are in their down projections: 12 of 48 matrices
    assert choice.parts is not None
    experts = [(layer, *item) for layer, chosen in choice.parts.items() for item in chosen.items()]
    listed = [(layer, expert, part) for layer, expert, parts in experts for part in parts]
    assert len(listed) == 12
    assert {part for *_, part in listed} == {"down_proj"}
    assert {(int(layer), int(expert)) for layer, expert, _ in listed} == set(choice.locus.nodes)
    best = strength.flatten().argsort(descending=True)[:12].tolist()
    assert {(LAYERS[i // 8], i % 8) for i in best} == set(choice.locus.nodes)


@pytest.mark.parametrize("select", ["removable", "random"])
def test_parts_spend_the_budget(select):
    emap = parts_map(torch.rand(3, 8))
    for budget in (0.03, 0.1, 0.5, 1.0):
        choice = located(LAYERS, 8, budget, select, emap, resolution="matrix")
        count = sum(len(parts) for experts in choice.parts.values() for parts in experts.values())
        assert count == int(48 * budget + 1e-9)
    with pytest.raises(ValueError, match="is less than the smallest part"):
        located(LAYERS, 8, 0.005, select, emap, resolution="matrix")


def test_a_smaller_matrix_fills_the_gap():
    """The best that fit: what does not is passed over, not the end."""
    emap = parts_map(torch.linspace(2, 1, 24).view(3, 8))
    emap.base["shapes"]["down_proj"] = [4, 5]
    # of 24 times 36 parameters 36: the best down projection takes 20, no other fits, and an up projection takes 16
    choice = located(LAYERS, 8, 1 / 24, "removable", emap, resolution="matrix")
    assert choice.parts == {"1": {"0": ["up_proj", "down_proj"]}}


def test_uniform_takes_as_many_of_each_layer():
    emap = a_map()
    choice = located(LAYERS, 8, 0.25, "error", emap, uniform=True)
    best = emap.mass.argsort(dim=1, descending=True)[:, :2].sort(dim=1).values
    assert choice.locus == {layer: tuple(best[row].tolist()) for row, layer in enumerate(LAYERS)}


def test_what_cannot_tell_parts_apart():
    emap = parts_map(torch.ones(3, 8))
    with pytest.raises(ValueError, match="select='gate' knows whole experts only"):
        located(LAYERS, 8, 0.5, "gate", emap, resolution="matrix")
    with pytest.raises(ValueError, match="unknown resolution='layer'"):
        located(LAYERS, 8, 0.5, "removable", emap, resolution="layer")
    emap.gradient = {}
    with pytest.raises(ValueError, match="holds no weight gradients"):
        located(LAYERS, 8, 0.5, "removable", emap, resolution="matrix")


# ---- any rule


@pytest.mark.parametrize("budget", [0.01, 0.125, 0.5, 1.0])
def test_choose_takes_what_scores_highest(budget):
    scores = torch.randn(3, 8)
    locus = choose(scores, budget, layers=LAYERS)
    best = scores.flatten().argsort(descending=True)[: max(1, round(24 * budget))].tolist()
    assert set(locus.nodes) == {(LAYERS[i // 8], i % 8) for i in best}
    assert choose(scores, budget) == {LAYERS.index(layer): chosen for layer, chosen in locus.items()}


def test_choose_is_what_a_config_does():
    emap = a_map()
    for select in ("error", "removable", "gate"):
        want = located(LAYERS, 8, 0.3, select, emap).locus
        assert choose(emap.score(select), 0.3, emap.layers) == want


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_choose_takes_numbers_of_any_kind(kind):
    scores = torch.zeros(2, 3)
    scores[1, 2] = 1
    assert choose(scores.to(kind).requires_grad_(kind.is_floating_point), 0.1) == Locus({1: [2]})
    assert choose(scores.to(kind).tolist(), 0.1) == Locus({1: [2]})


def test_choose_takes_the_first_of_equals_and_never_what_is_ruled_out():
    scores = torch.zeros(2, 3)
    assert choose(scores, 0.5) == Locus({0: [0, 1, 2]})
    scores[0] = float("-inf")
    assert choose(scores, 1.0) == Locus({1: [0, 1, 2]})
    scores[1, 1] = float("inf")
    assert choose(scores, 0.01) == Locus({1: [1]})
    assert choose(-torch.arange(6.0).view(2, 3), 0.3) == Locus({0: [0, 1]})  # all below zero


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"scores": torch.zeros(8)}, r"scores must be \[layers, experts\], got shape \[8\]"),
        ({"scores": torch.zeros(0, 8)}, r"got shape \[0, 8\]"),
        ({"scores": torch.full((2, 3), float("nan"))}, "scores hold NaN"),
        ({"scores": torch.full((2, 3), float("-inf"))}, "-inf everywhere"),
        ({"budget": 0}, "budget must be a share"),
        ({"budget": 1.5}, "budget must be a share"),
        ({"budget": True}, "budget must be a share"),
        ({"layers": [1]}, "layers must name the 2 rows of scores, each once"),
        ({"layers": [1, 1]}, "layers must name the 2 rows of scores, each once"),
        ({"layers": [-1, 1], "budget": 1.0}, "layer -1 in the locus is not a whole number"),
    ],
)
def test_what_choose_refuses(given, text):
    with pytest.raises(ValueError, match=text):
        choose(**{"scores": torch.rand(2, 3), "budget": 0.5, **given})


@pytest.mark.slow
@pytest.mark.parametrize(("settle", "select"), [("sweep", "removable"), ("direct", "error")])
def test_default_is_the_best_that_the_map_can_tell(settle, select):
    """What a step would remove, if the map has the gradients to tell; else the error. The config says which."""
    emap = measure_errors(build(), [tokens()], settle=settle, progress=False)
    found, asked = (
        get_peft_model(build(), PCGrowConfig(error_map=emap, **given)) for given in ({}, {"select": select})
    )
    assert found.peft_config["default"].select == select
    assert found.peft_config["default"].locus == asked.peft_config["default"].locus
