"""Pages, tables and scalars of an error map say what the map says; the lifecycle of nodes whose story is known."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from close import assert_close
from html_pages import HOSTILE, Parsed, assert_runs, data_of, needs_node, stands_alone
from invented import LOCUS, PARTS, made
from peft_pcgrow import ErrorMap, Locus, measure_errors
from peft_pcgrow.gates.gate import RATES, at_rate
from peft_pcgrow.maps.draw import Column, limits, outline
from peft_pcgrow.maps.lifecycle import STAGES
from tiny import build, domain, retain


def column(data, name, like):
    (found,) = [each["values"] for each in data["columns"] if each["name"] == name]
    return torch.tensor(found, dtype=torch.float64).view(like.shape)


def test_numbers_of_the_html_are_those_of_the_map(tmp_path):
    before, now = made(seed=1), made(gradient={"up_proj": torch.randn(4, 4, 6, 2, 3)})
    now.page(tmp_path / "deep" / "map.html", before=before, locus=LOCUS)
    data = data_of(tmp_path / "deep" / "map.html")
    total, rows = float(now.mass.sum()), now.count.clamp_min(1)
    expected = {
        "count": now.count,
        "weight": now.weight,
        "error": now.mass,
        "per_row": now.mass / rows,
        "share": now.mass / total,
        "frequency": now.count / now.count.sum(1, keepdim=True),
        "coherent": now.coherent,
        "removable": now.removable().estimate.clamp_min(0),
        "removable_error": now.removable().error,
        "separability": now.separation.recall[..., RATES.index(min(RATES, key=lambda rate: abs(rate - 0.01)))],
        "before": before.mass / before.count.clamp_min(1),
        "change": (now.mass - before.mass) / before.mass.sum(),
        "lifecycle": now.lifecycle(before, LOCUS),
    }
    assert [each["name"] for each in data["columns"]] == list(expected)
    for name, want in expected.items():
        assert_close(name, column(data, name, want), want, "fp32")
    assert data["layers"] == list(now.layers)
    located = torch.tensor(data["located"]).view(4, 6).nonzero().tolist()
    assert located == [[1, 1], [1, 3], [2, 0]]
    assert (torch.tensor(data["present"]).view(4, 6) == 0).nonzero().tolist() == [[0, 2]]
    panels = [each["name"] for each in data["columns"] if each["hue"]]
    assert panels == ["share", "frequency", "coherent", "removable", "separability", "change", "lifecycle"]
    bars = {each["name"]: torch.tensor(each["bars"]).double() for each in data["columns"] if each["bars"]}
    assert_close("bars", bars["share"], now.mass.sum(1) / total, "fp32")
    assert_close("bars", bars["change"], (now.mass - before.mass).sum(1) / before.mass.sum(), "fp32")


def test_only_what_was_measured_has_a_panel(tmp_path):
    made(gradient={}, separation=None).page(tmp_path / "map.html")
    assert [each["name"] for each in data_of(tmp_path / "map.html")["columns"] if each["hue"]] == ["share", "frequency"]


def test_html_stands_alone_and_reads_without_scripts(tmp_path):
    emap = made()
    emap.page(tmp_path / "map.html", before=made(seed=1), locus=LOCUS)
    page = stands_alone((tmp_path / "map.html").read_text())
    best = emap.top(1)[0]
    for said in (f"{best.layer}.{best.expert}", str(emap.diagnosis), "qwen3_moe", "1,010 tokens", *STAGES[:1]):
        assert said in page.text
    assert sum(tag == "table" for tag, _ in page.tags) == 2
    for tag, attrs in page.tags:
        assert tag != "table" or attrs["aria-label"]


@pytest.mark.slow
def test_text_of_a_map_is_escaped(tmp_path):
    # whoever made it
    emap = replace(made(base={"model_type": HOSTILE, "vocabulary": 10, **PARTS}), layers=(HOSTILE, 1, 2, 3))
    emap.page(tmp_path / "map.html")
    emap.page(tmp_path / "map.png")
    text = (tmp_path / "map.html").read_text()
    page = Parsed(text)
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert "img" not in {tag for tag, _ in page.tags}
    assert f"Error map of {HOSTILE}" in page.text
    assert len(re.findall('"columns":', text)) == 1
    assert data_of(tmp_path / "map.html")["layers"][0] == HOSTILE
    # a dollar sign is no formula to matplotlib either
    made(base={"model_type": "$\\frac{", "vocabulary": 10, **PARTS}).page(tmp_path / "map.svg")


def large(seed):
    return made(48, 128, seed, first=0)


@pytest.mark.slow
def test_size_of_a_large_page(tmp_path):
    before, now = large(0), large(1)
    locus = Locus({layer: range(0, 128, 8) for layer in range(48)})
    now.page(tmp_path / "map.html", before=before, locus=locus)
    now.page(tmp_path / "map.png", before=before, locus=locus)
    assert (tmp_path / "map.html").stat().st_size < 1_500_000


@needs_node
def test_the_script_is_javascript(tmp_path):
    made().page(tmp_path / "map.html")
    assert_runs(tmp_path / "map.html")


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".SVG", b"<?xml")])
def test_pictures(tmp_path, suffix, start):
    made().page(tmp_path / f"map{suffix}", before=made(seed=1), locus=LOCUS)
    assert (tmp_path / f"map{suffix}").read_bytes().startswith(start)


@pytest.mark.slow
def test_picture_shows_the_map(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: kept.append(figure))
    before, now = made(seed=1), made()
    now.page(tmp_path / "map.png", before=before, locus=LOCUS)
    axes = kept[0].axes
    shown = {each.get_title(loc="left"): each for each in axes if each.images}
    assert list(shown) == [
        "Share of error", "Frequency", "Coherent error", "Removable error", "Gate separability", "Change of error",
        "Lifecycle",
    ]  # fmt: skip
    error = shown["Share of error"].images[0].get_array()
    assert error.mask.sum() == 1
    assert error.mask[0, 2]
    assert_close("error", torch.tensor(error.filled(0.0)), 100 * now.mass / now.mass.sum(), "fp64")
    change = shown["Change of error"].images[0]
    assert change.norm.vmin == -change.norm.vmax
    assert all(each.get_ylim() == (-0.5, 3.5) for each in shown.values()), "the lowest layer is at the bottom"
    # panels stand in line
    boxes = [each.get_position() for each in shown.values()]
    assert len({(round(box.width, 9), round(box.height, 9)) for box in boxes}) == 1
    assert len({round(box.y0, 9) for box in boxes[:3]}) == len({round(box.x0, 9) for box in boxes[::3]}) == 1
    assert [text.get_text() for text in shown["Lifecycle"].get_yticklabels()] == ["1", "2", "3", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_nothing_is_left_half_written(tmp_path, monkeypatch, suffix):
    """A drawing that fails, and a disk that fails, leave the file that was there, and nothing beside it."""
    target, emap = tmp_path / f"map{suffix}", made()
    emap.page(target)
    held = target.read_bytes()
    with monkeypatch.context() as patch:

        def broken(*args, **options):
            raise RuntimeError("drawing failed")

        patch.setattr(Figure, "savefig", broken)
        patch.setattr(json, "dumps", broken)
        with pytest.raises(RuntimeError, match="drawing failed"):
            emap.page(target, locus=LOCUS)
    with monkeypatch.context() as patch:

        def full(path, target):
            raise OSError("disk full")

        patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(OSError, match="disk full"):
            emap.page(target, locus=LOCUS)
    assert target.read_bytes() == held
    assert [*tmp_path.iterdir()] == [target]


def test_outline_of_a_shape():
    """An L of three nodes: eight edges around it, none within."""
    located = torch.zeros(3, 4, dtype=torch.bool)
    located[0, 3] = located[1, 3] = located[1, 2] = True
    segments = outline(located)
    assert len(segments) == len(set(segments)) == 8
    assert all(math.dist(*segment) == 1 for segment in segments)
    assert ((2.5, 0.5), (3.5, 0.5)) not in segments
    assert ((2.5, -0.5), (2.5, 0.5)) in segments
    assert outline(torch.zeros(3, 4, dtype=torch.bool)) == []


def test_colours_of_few_extremes():
    values = torch.ones(40, 100)
    values[0, :4] = 1000.0
    assert limits(Column("x", "x", values, "blue")) == (0.0, 1.0)
    assert limits(Column("x", "x", -values, "change")) == (-1.0, 1.0)
    # where all others are 0, the few must show
    assert limits(Column("x", "x", torch.where(values > 1, values, 0.0), "blue")) == (0.0, 1000.0)
    assert limits(Column("x", "x", torch.full((2, 2), float("nan")), "blue")) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["map", "map.jpeg", "map.htm", ".png"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.html, \.png, \.pdf, \.svg"):
        made().page(tmp_path / name)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_scalars_and_pages_of_an_empty_map(tmp_path):
    """Nothing routed and nothing lost: no division by zero anywhere."""
    zero = torch.zeros(4, 6, dtype=torch.float64)
    empty = made(count=zero, weight=zero, mass=zero, square=zero, loss=0.0, labels=0, tokens=0)
    assert all(math.isfinite(value) for value in empty.scalars().values())
    assert "pcgrow/loss" not in made(loss=float("nan")).scalars()
    empty.page(tmp_path / "map.html", before=empty)
    empty.page(tmp_path / "map.png", before=empty)
    assert not column(data_of(tmp_path / "map.html"), "lifecycle", zero).any()


@pytest.mark.slow
def test_page_of_a_measured_map(tmp_path):
    """From a model, saved and loaded, with dense layers below: rows are named by decoder layer."""
    emap = measure_errors(build("deepseek_v3"), [domain()], retain=[retain()], progress=False)
    emap.save(tmp_path / "map")
    ErrorMap.load(tmp_path / "map").page(tmp_path / "map.html", locus=Locus({2: [1]}))
    data = data_of(tmp_path / "map.html")
    assert data["layers"] == [1, 2, 3]
    assert_close("error", column(data, "error", emap.mass), emap.mass, "fp32")
    assert_close("recall", column(data, "separability", emap.mass), at_rate(emap.separation.recall, 0.01), "fp32")
