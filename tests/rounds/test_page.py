"""The page of a run and the picture of its nodes' lives say what the run's folder says."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from short_runs import corpora, run

from html_pages import HOSTILE, Parsed, assert_runs, data_of, needs_node, stands_alone
from peft_pcgrow import ErrorMap, GrowthResult, load_grown
from peft_pcgrow.maps.lifecycle import STAGES
from peft_pcgrow.rounds.page import _chart, _ticks
from peft_pcgrow.rounds.pictures import GIVEN, WRITTEN
from tiny import build, logits


class Words:
    """A tokenizer whose words would be the page's own, if it let them."""

    def __call__(self, texts):
        raise AssertionError("there are no strings")

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids)) + f" {HOSTILE}"


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run whose maps are measured after it, too, and its page."""
    folder = tmp_path_factory.mktemp("runs")
    result = run(folder / "run", build(), max_steps=4, lr=0.1, map_after=True, tokenizer=Words())
    result.page(folder / "growth.html", domain=HOSTILE)
    return result, folder


@pytest.mark.slow
def test_page_stands_alone_and_is_escaped(grown):
    result, folder = grown
    page = stands_alone((folder / "growth.html").read_text())
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert f"{HOSTILE}: what growing did" in page.text
    for said in (
        "What was asked", "What grew", "The way there", "What it writes", "What it took", "Where it grew",
        "Round 1, kept", f"{result.before['heldout']:.3f} before", f"{result.after['heldout']:.3f} after",
        f"{result.gain:+.3f}", f"{result.forgetting:+.3f}", result.rounds[0].why, "max_steps: steps of a round",
        "finding the rate",
    ):  # fmt: skip
        assert said in page.text, said
    assert sum(tag == "circle" for tag, _ in page.tags) == 2
    assert result.journal.asked["weights"] not in page.text


@pytest.mark.slow
def test_page_shows_both_maps_and_the_lives(grown):
    folder = grown[1]
    before, after = (ErrorMap.load(folder / f"run/rounds/{number}/map") for number in (1, 2))
    data = data_of(folder / "growth.html")
    columns = {each["name"]: torch.tensor(each["values"], dtype=torch.float64) for each in data["columns"]}
    for name, emap in (("share before", before), ("share", after)):
        mass = emap.with_newborns()
        torch.testing.assert_close(columns[name], (mass / mass.sum()).flatten(), rtol=1e-5, atol=0)
    assert (after.newborns.nodes, before.newborns.nodes) != ((), ())
    lives = {name: column for name, column in columns.items() if name.startswith("lifecycle")}
    assert list(lives) == ["lifecycle before", "lifecycle after round 1"]
    # what is one of STAGES, and not compressible, is as two maps tell it
    stage, told = lives["lifecycle after round 1"], after.lifecycle(before).flatten()
    assert torch.equal(stage[stage < len(STAGES)], told[stage < len(STAGES)].double())
    assert int((told == STAGES.index("growing")).sum()) == int((stage == STAGES.index("growing")).sum()) > 0
    assert [each["name"] for each in data["stages"]] == [*STAGES, "compressible"]


@pytest.mark.slow
def test_texts_are_what_both_models_write(grown):
    result, folder = grown
    (texts, windows) = json.loads((folder / "run/texts.json").read_text()), result.windows
    assert [list(window) in corpora()["heldout"].tolist() for window in windows] == [True] * 3
    models = {"before": build(), "after": load_grown(build(), folder / "run/adapter")}
    cut = min(GIVEN, len(windows[0]) // 2)
    assert len(texts) == 3
    for text, window in list(zip(texts, windows, strict=True))[:1]:
        assert text["given"] == Words().decode(window[:cut], True)
        for name, model in models.items():
            ids = torch.tensor([window[:cut]])
            # by a loop: the likeliest word, until the text ends
            for _ in range(WRITTEN):
                ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
                if int(ids[0, -1]) == 2:
                    break
            assert text[name] == Words().decode(ids[0, cut:].tolist(), True)


@pytest.mark.slow
def test_model_is_as_it_was_after_a_page(grown):
    result, folder = grown
    model = result.model
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(load_grown(build(), folder / "run/adapter")))


@pytest.mark.slow
def test_a_result_that_was_read_has_the_same_page(grown, tmp_path):
    result, folder = grown
    read = GrowthResult.read(folder / "run")
    read.page(tmp_path / "again.html", domain=HOSTILE)
    assert (tmp_path / "again.html").read_bytes() == (folder / "growth.html").read_bytes()
    assert str(read) == str(result)
    with pytest.raises(FileNotFoundError, match=r"has no journal.json: give the output_dir of a run"):
        GrowthResult.read(tmp_path)


@pytest.mark.slow
@needs_node
def test_script_of_the_page(grown):
    assert_runs(grown[1] / "growth.html")


@pytest.mark.slow
def test_pictures_of_the_lives(grown, tmp_path):
    result, _ = grown
    for suffix, start in ((".PNG", b"\x89PNG"), (".svg", b"<?xml")):
        # named like the folder, where nothing else is said
        result.plot(tmp_path / f"lives{suffix}")
        assert (tmp_path / f"lives{suffix}").read_bytes().startswith(start)
    text = " ".join(each.get_text() for each in result.plot(domain="$\\frac{").texts)
    for said in ("$\\frac{: lifecycle of the nodes", "compressible: ", "Bystanders", "relieved: "):
        assert said in text


@pytest.mark.slow
def test_other_suffixes_are_refused(grown, tmp_path):
    for name in ("lives.gif", "lives.html", "lives"):
        with pytest.raises(ValueError, match=r"a picture ends in \.png, \.pdf, \.svg, not"):
            grown[0].plot(tmp_path / name)
    with pytest.raises(ValueError, match=r"ends in \.html, not .*growth.png"):
        grown[0].page(tmp_path / "growth.png")
    assert not [*tmp_path.iterdir()]


def edited(folder, tmp_path, change):
    """The result of a copy of a run whose journal was changed."""
    shutil.copytree(folder / "run", tmp_path / "copy")
    path = tmp_path / "copy/journal.json"
    journal = json.loads(path.read_text())
    change(journal)
    path.write_text(json.dumps(journal))
    return GrowthResult.read(tmp_path / "copy")


@pytest.mark.slow
def test_page_of_a_round_that_was_taken_back(grown, tmp_path):
    def change(journal):
        second = {**journal["rounds"][0], "number": 2, "kept": False, "outcome": HOSTILE, "retain": None}
        journal["rounds"].append(second)

    edited(grown[1], tmp_path, change).page(tmp_path / "growth.html")
    page = stands_alone((tmp_path / "growth.html").read_text())
    assert f"Round 2, taken back: {HOSTILE}" in page.text
    assert [attrs["class"] for tag, attrs in page.tags if tag == "circle"] == ["kept", "kept", "back"]


@pytest.mark.slow
def test_page_where_nothing_grew_and_nothing_was_counted(grown, tmp_path):
    def change(journal):
        journal.update(rounds=[], ended="the domain is covered")
        del journal["spent"]

    result = edited(grown[1], tmp_path, change)
    (tmp_path / "copy/texts.json").unlink()
    result.page(tmp_path / "growth.html")
    page = stands_alone((tmp_path / "growth.html").read_text())
    assert "Nothing: the first look ended the run." in page.text
    assert "What it writes" not in page.text
    assert "operation" not in page.text + str(result)
    (tmp_path / "copy/texts.json").write_text('[{"given": 3}]')
    with pytest.raises(ValueError, match=r"texts.json cannot be read .*: delete it"):
        result.page(tmp_path / "growth.html")


def test_labels_lie_on_nothing():
    """Of points that lie in a heap."""
    points = [(0.0, 0.0, "base", True)]
    points += [(0.01 + 1e-4 * n, 0.4 - 1e-3 * n, f"round {n}", n % 2 == 0) for n in range(1, 6)]
    tags = Parsed(_chart(points, [0.0, 0.03], 0.02, "forgetting")).tags
    dots = [(float(attrs["cx"]), float(attrs["cy"])) for tag, attrs in tags if tag == "circle"]
    labels = [(float(at["x"]), float(at["y"])) for tag, at in tags if tag == "text" and at.get("class") == "label"]
    assert len(dots) == len(labels) == len(points)
    # a letter is some 6 wide and 8 high, and stands on its line
    boxes = [(x, x + 6 * len(name), y - 8, y) for (x, y), (_, _, name, _) in zip(labels, points, strict=True)]
    for number, (left, right, top, bottom) in enumerate(boxes):
        assert not [dot for dot in dots if left - 5 < dot[0] < right + 5 and top - 4 < dot[1] < bottom + 4]
        assert all(left > b or right < a or top > d or bottom < c for a, b, c, d in boxes[:number])


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.6), (0.0, 3.2), (-1e-4, 2e-5), (-12.0, 400.0)])
def test_ticks_are_round_and_inside(low, high):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 5
    assert all(low <= tick <= high for tick in ticks)
    (step,) = {f"{after - before:.6g}" for before, after in pairwise(ticks)}
    assert f"{float(step):e}"[0] in "125"
