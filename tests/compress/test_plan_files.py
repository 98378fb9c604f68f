"""Files of compression plans that were edited: the plan that they say, or one clear error."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peft_pcgrow import compress
from peft_pcgrow.compress import CompressionPlan
from tiny import assert_same, build, snapshot, tokens

STRANGE: list[Any] = [
    None,
    True,
    -1,
    3,
    2.5,
    10**12,
    float("nan"),
    float("inf"),
    "",
    "2:4",
    "0.5",
    [],
    [1],
    {},
    {"a": 1},
]


@pytest.fixture(scope="module")
def plan() -> CompressionPlan:
    return compress.plan(
        build(), target=0.3, methods=("quantize", "thin", "skip"), retain=[tokens(2, 8)], progress=False
    )


def places(held: Any, at: tuple = ()) -> list[tuple]:
    """Where all values of a JSON object are."""
    found = [at] if at else []
    entries = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
    return found + [place for key, value in entries for place in places(value, (*at, key))]


def edited(held: Any, drawn: random.Random) -> Any:
    held = copy.deepcopy(held)
    every = places(held)
    # as often at the top as inside of nodes, which are most of it
    *path, last = drawn.choice([place for place in every if len(place) < 3] if drawn.random() < 0.5 else every)
    owner = held
    for key in path:
        owner = owner[key]
    act = drawn.randrange(4)
    if act == 0 and isinstance(owner, dict):
        del owner[last]
    elif act == 1 and isinstance(owner, list):
        owner.insert(last, copy.deepcopy(owner[last]))
    elif act == 2 and isinstance(owner, dict):
        owner[f"{last}_"] = owner.pop(last)
    else:
        owner[last] = drawn.choice(STRANGE)
    return held


def outcome(act: Callable[[], Any]) -> Any:
    """What comes of it, or the text of a ValueError."""
    try:
        return act()
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_random_edits(plan, tmp_path):
    """Read, and applied if that passes: an error in our words that leaves the model as it is, or what the file says."""
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan
    held, drawn = json.loads((tmp_path / "plan.json").read_text()), random.Random(0)
    model = build()
    before, applied, refused = snapshot(model), 0, 0
    for _ in range(400):
        changed = edited(held, drawn)
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        found = outcome(lambda: CompressionPlan.load(tmp_path / "plan.json"))
        if isinstance(found, str):
            assert "is not a compression plan (" in found
            assert len(found) < 500
            refused += 1
            continue
        again = {**vars(found), "nodes": [{**vars(n), "form": vars(n.form)} for n in found.nodes], "format": 1}
        del again["calibration"]
        # as text, in which NaN is NaN
        assert json.dumps(again, sort_keys=True) == json.dumps(changed, sort_keys=True)
        copied = copy.deepcopy(model)
        error = outcome(lambda: compress.apply(copied, found, progress=False))  # noqa: B023
        if isinstance(error, str):
            assert "this plan was" in error or "cannot be skipped" in error, error
            assert_same(before, snapshot(copied))
            refused += 1
        else:
            applied += 1
    assert applied > 10
    assert refused > 200


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda held: held["nodes"].append(held["nodes"][0]), "has more than one form"),
        (lambda held: held["nodes"].pop(), "must give each expert that is left one form"),
        (lambda held: held["nodes"][0].update(after=5), "where that form takes"),
        (lambda held: held["nodes"][0].update(predicted=float("nan")), "must be a finite number, got nan"),
        (lambda held: held["nodes"][0]["form"].update(width=5), "experts are stored in"),
        (lambda held: held["nodes"][0]["form"].update(neurons=8 * 10**12), r"this plan was altered|more than"),
        (lambda held: held.update(target="half"), "target must be a finite number, got 'half'"),
        (lambda held: held.update(skipped=[99]), "skips layers"),
        (lambda held: held["base"].update(layers=[0, 1]), "made for another model .layers"),
        (lambda held: held.update(losses=[]), "must be as many"),
        (lambda held: held.update(format=[2]), "this version reads format 1"),
    ],
)
def test_says_what_is_wrong(plan, change, match, tmp_path):
    plan.save(tmp_path / "plan.json")
    held = json.loads((tmp_path / "plan.json").read_text())
    change(held)
    (tmp_path / "plan.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=match):
        compress.apply(build(), CompressionPlan.load(tmp_path / "plan.json"), progress=False)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"plan"', "[" * 5000, "\udcff"])
def test_no_plan_at_all(text, tmp_path):
    (tmp_path / "plan.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="is not a compression plan"):
        CompressionPlan.load(tmp_path / "plan.json")


def test_another_models_plan(plan):
    other = build("olmoe")
    with pytest.raises(ValueError, match="this plan was made for another model"):
        compress.apply(other, plan)
    with torch.no_grad():
        changed = build(seed=1)
    with pytest.raises(ValueError, match="this plan was made for another model"):
        compress.apply(changed, plan)
