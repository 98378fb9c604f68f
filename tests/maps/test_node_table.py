"""The lifecycle of nodes whose story is known; tables and scalars say what the map says."""

import builtins
import json
from dataclasses import replace

import pytest
import torch

from close import assert_close
from invented import made
from peft_pcgrow import Locus
from peft_pcgrow.gates.gate import at_rate
from peft_pcgrow.maps.lifecycle import STAGES

# per node: rows and error per row before, rows and error per row now, whether located, and its stage. The mean error
# per row before is near 1 and the mean error now near 10, so that above 20 is heavy
STORIES = [
    (10, 1.0, 10, 1.0, False, "generic"),  # stayed, light
    (10, 1.0, 10, 1.3, False, "generic"),  # rose, light
    (10, 1.0, 10, 0.9, False, "generic"),  # fell by less than counts
    (10, 1.0, 0, 0.0, False, "generic"),  # the domain went elsewhere
    (10, 1.0, 0, 0.0, True, "generic"),
    (0, 0.0, 0, 0.0, True, "generic"),
    (10, 0.01, 10, 0.01, False, "generic"),  # nothing to learn, and nothing did
    (90, 1.0, 90, 1.0, False, "frontier"),  # stayed, heavy
    (90, 1.0, 90, 1.4, False, "frontier"),
    (10, 1.0, 10, 0.8, False, "relieved"),  # others grew
    (10, 1.0, 10, 0.55, True, "growing"),
    (10, 1.0, 10, 1.2, True, "growing"),  # located, whatever its error did
    (90, 1.0, 90, 0.8, False, "frontier"),  # heavy still
    (0, 0.0, 10, 1.0, True, "growing"),  # nothing to compare with
    (10, 1.0, 10, 0.4, False, "relieved"),  # as far, but it did not grow
    (10, 1.0, 10, 0.4, True, "converged"),
    (90, 1.0, 90, 0.5, True, "converged"),
    (10, 0.05, 10, 0.05, True, "converged"),  # at the covered level all along
    (10, 0.1, 10, 0.08, False, "relieved"),
]
STAGE = torch.tensor([[STAGES.index(story[5]) for story in STORIES]] * 2, dtype=torch.int8)
TOLD = Locus({1: [i for i, story in enumerate(STORIES) if story[4]], 2: [i for i, s in enumerate(STORIES) if s[4]]})


def told():
    maps = []
    for at in (0, 2):
        count = torch.tensor([[float(story[at]) for story in STORIES]] * 2, dtype=torch.float64)
        mass = count * torch.tensor([[story[at + 1] for story in STORIES]] * 2, dtype=torch.float64)
        maps.append(
            made(2, len(STORIES), count=count, weight=count, mass=mass, square=mass, gradient={}, separation=None)
        )
    return maps


def test_lifecycle_of_known_stories():
    before, now = told()
    found = now.lifecycle(before, TOLD)
    assert found.dtype == torch.int8
    assert [STAGES[code] for code in found[0]] == [story[5] for story in STORIES]
    assert torch.equal(found, STAGE)
    # without the locus only its error tells that a node moved
    assert STAGES[now.lifecycle(before)[0, 11]] == "generic"
    # nothing has moved since itself; whether anything is heavy is its own business
    assert set(now.lifecycle(now).unique().tolist()) <= {STAGES.index("generic"), STAGES.index("frontier")}


def test_lifecycle_of_a_covered_node_with_most_rows():
    """Its rows make it heavy, but there is nothing to learn: the next locus is elsewhere."""
    count, error = torch.full((1, 40), 10.0, dtype=torch.float64), torch.ones(1, 40, dtype=torch.float64)
    count[0, 0], error[0, 0] = 2000, 0.015
    emap = made(1, 40, count=count, weight=count, mass=count * error, square=count, gradient={}, separation=None)
    assert emap.mass[0, 0] > 2 * emap.mass.mean()
    assert STAGES[emap.lifecycle(emap)[0, 0]] == "generic"
    error[0, 0] = 0.02
    emap.mass = count * error
    assert STAGES[emap.lifecycle(emap)[0, 0]] == "frontier"


def test_lifecycle_knows_neither_units_nor_names():
    before, now = told()
    # powers of two round nothing
    for scale in (2.0**-40, 8.0):
        scaled = [replace(emap, mass=scale * emap.mass) for emap in (before, now)]
        assert torch.equal(scaled[1].lifecycle(scaled[0], TOLD), STAGE)
    order = torch.randperm(len(STORIES))
    moved = [replace(emap, **{n: getattr(emap, n)[:, order] for n in ("count", "mass")}) for emap in (before, now)]
    at = torch.argsort(order)
    locus = Locus({layer: [int(at[e]) for e in experts] for layer, experts in TOLD.items()})
    assert torch.equal(moved[1].lifecycle(moved[0], locus), STAGE[:, order])


def test_maps_that_cannot_be_compared(tmp_path):
    now = made()
    with pytest.raises(ValueError, match="different base models"):
        now.lifecycle(made(base={**now.base, "routers": "b2"}))
    with pytest.raises(ValueError, match="different base models"):
        now.page(tmp_path / "map.html", before=made(layers=3))
    with pytest.raises(ValueError, match="same batches"):
        now.lifecycle(made(tokens=2020))
    with pytest.raises(TypeError, match="must be an ErrorMap"):
        now.lifecycle("map")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no experts in this model"):
        now.page(tmp_path / "map.png", locus=Locus({0: [0]}))
    with pytest.raises(ValueError, match="only 6 experts"):
        now.lifecycle(now, Locus({1: [6]}))
    # how gradients were sketched makes no other model
    now.lifecycle(made(base={**now.base, "sketch": None}, gradient={}))
    assert not [*tmp_path.iterdir()]


def test_table(tmp_path):
    emap = made()
    table = emap.to_pandas()
    assert len(table) == 24
    assert list(table.columns[:8]) == ["layer", "expert", "count", "weight", "error", "share", "square", "coherent"]
    assert list(table.columns[8:11]) == ["removable", "removable_low", "removable_high"]
    assert list(table.columns[11:-1]) == ["domain_rows", "retain_rows", "recall", "false_positive", "contested"]
    assert table.columns[-1] == "adapter"
    assert not table.adapter.any()
    for name, want in {"count": emap.count, "weight": emap.weight, "error": emap.mass, "square": emap.square}.items():
        sums = table.groupby("layer")[name].sum()
        assert tuple(sums.index) == emap.layers
        assert_close(name, torch.tensor(sums.to_numpy()), want.sum(1), "fp64")
    assert table["share"].sum() == pytest.approx(1)
    node = table[(table.layer == 3) & (table.expert == 4)].iloc[0]
    assert node["coherent"] == float(emap.coherent[2, 4])
    assert node["recall"] == float(at_rate(emap.separation.recall, 0.01)[2, 4])
    assert list(made(separation=None).to_pandas().columns) == [*table.columns[:11], "adapter"]


def test_table_without_pandas(monkeypatch):
    found = builtins.__import__

    def missing(name, *args, **options):
        if name == "pandas":
            raise ImportError("No module named 'pandas'")
        return found(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install pandas"):
        made().to_pandas()


def test_scalars():
    emap = made()
    found = emap.scalars()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(type(value) is float for value in found.values())
    share = (emap.mass / emap.mass.sum()).flatten().tolist()
    assert found == pytest.approx(
        {
            "pcgrow/loss": 2.4,
            "pcgrow/error_per_label": float(emap.mass.sum()) / 1000,
            # 5 % of 24 nodes: the two highest
            "pcgrow/top_5_percent_share": sum(sorted(share)[-2:]),
            "pcgrow/concentration": emap.diagnosis.concentration,
            "pcgrow/unrouted_nodes": 1.0,
            **{f"pcgrow/layer_{layer}_share": sum(share[6 * i : 6 * i + 6]) for i, layer in enumerate(emap.layers)},
        }
    )
    assert set(made().scalars(prefix="grow_")) == {name.replace("pcgrow/", "grow_") for name in found}
