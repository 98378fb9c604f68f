"""Retain texts by name: gates see as many windows of each, and the limit on forgetting holds for each by itself."""

import json
import statistics

import pytest
import torch
from short_runs import Interrupt, corpora, run, text

from peft_pcgrow import GrowthResult
from peft_pcgrow.gates.gate import RATES
from peft_pcgrow.rounds.texts import by_name, drawn_alike, read_texts
from tiny import DOMAIN_WORDS, RETAIN_WORDS, assert_same, build, snapshot

FAR = text(RETAIN_WORDS, 128, 3)
# the second half of each window is the domain's language
NEAR = torch.cat([text(RETAIN_WORDS, 96, 21)[:, :12], text(DOMAIN_WORDS, 96, 22)[:, 12:]], 1)
NAMED = {"far": FAR, "near": NEAR}


def watched(retain) -> dict[str, torch.Tensor]:
    """By name, the windows that no gate is fitted on."""
    found = read_texts(corpora()["train_on"], corpora()["heldout"], retain, None, 24, 8).watch
    return {name: torch.stack([window["input_ids"] for window in text]) for name, text in found.items()}


@torch.no_grad()
def rises(model) -> dict[str, float]:
    """How much worse the windows of each text are predicted than by the base, by the model's own loss."""
    found = {}
    for name, ids in watched(NAMED).items():
        before, after = (each.eval()(input_ids=ids, labels=ids).loss.item() for each in (build(), model))
        found[name] = after - before
    return found


def test_a_text_without_a_name_is_as_it_was_with_one():
    assert by_name(None) == {}
    one, named = watched(FAR), watched({"far": FAR})
    assert torch.equal(one["retain"], named["far"])
    assert by_name({"input_ids": FAR}) == {"retain": {"input_ids": FAR}}


def test_windows_of_two_texts_count_for_the_first():
    texts = read_texts(
        corpora()["train_on"], corpora()["heldout"], {"a": FAR, "b": torch.cat([NEAR, FAR])}, None, 24, 8
    )
    assert {name: len(half) for name, half in texts.fit.items()} == {"a": 64, "b": 48}
    keys = [
        tuple(window["input_ids"].tolist()) for half in (*texts.fit.values(), *texts.watch.values()) for window in half
    ]
    assert len(keys) == len(set(keys)) == len(FAR) + len(NEAR)


def test_gates_see_as_many_windows_of_each():
    """However much text there is of one; of one that has fewer than its share, all."""
    texts = {"large": range(500), "small": range(1000, 1040), "tiny": range(2000, 2005)}
    windows = {name: [{"input_ids": torch.tensor([index])} for index in held] for name, held in texts.items()}
    some = [int(window["input_ids"]) for window in drawn_alike(windows, 90)]
    counts = {name: sum(index in held for index in some) for name, held in texts.items()}
    assert counts == {"large": 30, "small": 30, "tiny": 5}
    assert len(set(some)) == len(some)
    assert some != sorted(some)


def test_of_more_texts_than_windows_each_has_one():
    windows = {str(n): [{"input_ids": torch.tensor([10 * n + k])} for k in range(9)] for n in range(10)}
    assert sorted(int(window["input_ids"]) // 10 for window in drawn_alike(windows, 4)) == [*range(10)]


def test_the_order_of_the_names_says_nothing():
    """Who goes on need not remember it, and a window of two texts is the same one's."""
    domain = corpora()["train_on"], corpora()["heldout"]
    one, other = {"b": FAR, "a": torch.cat([NEAR, FAR[:20]])}, {"a": torch.cat([NEAR, FAR[:20]]), "b": FAR}
    found, again = (read_texts(*domain, named, None, 24, 8) for named in (one, other))
    assert [*found.digest().items()] == [*again.digest().items()]
    drawn = [[window["input_ids"].tolist() for window in drawn_alike(texts.fit, 40)] for texts in (found, again)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["", "two\nlines", "caf\udce9", 3])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="give"):
        by_name({"far": FAR, name: NEAR})


def test_an_error_in_one_text_says_in_which(tmp_path):
    for wrong, error in ((None, TypeError), (["a string"] * 40, ValueError)):
        with pytest.raises(error, match="the retain text 'b': "):
            run(tmp_path, retain={"a": FAR, "b": wrong})
    with pytest.raises(ValueError, match="'self' of 'a' and 'c', which would be one text"):
        run(tmp_path, retain={"a": "self", "b": FAR, "c": "self"})


@pytest.mark.slow
def test_one_text_keeps_its_name(tmp_path):
    result = run(tmp_path, retain={"far": FAR}, max_steps=4, max_forgetting=10.0, lr=0.1)
    assert result.forgetting_by_text == {"far": result.forgetting}
    path = tmp_path / "journal.json"
    written = json.loads(path.read_text())
    for change in ({"retained": {"retain[near]": 1.0}}, {"retain": None}):
        path.write_text(json.dumps({**written, "rounds": [{**written["rounds"][0], **change}]}))
        with pytest.raises(ValueError, match=r"cannot be read .*round 1 has losses of other texts"):
            GrowthResult.read(tmp_path)


@pytest.mark.slow
def test_the_limit_holds_for_each_text(tmp_path):
    """Gates end stricter than the mean of the texts asks for, at the most open rate at which every text is spared."""
    model = run(tmp_path / "any", retain=NAMED, max_forgetting=10.0).model

    def at(rate: float) -> dict[str, float]:
        model.set_gate_fpr(rate)
        return rises(model)

    limit = (max(at(0.1).values()) + max(at(RATES[-1]).values())) / 2
    result = run(tmp_path / "limited", retain=NAMED, max_forgetting=limit)
    rate = result.rounds[0].gate_fpr
    found = at(rate)
    assert result.rounds[0].kept
    assert result.forgetting_by_text == pytest.approx(found, abs=1e-6)
    assert result.forgetting == pytest.approx(statistics.mean(found.values()), abs=1e-6)
    assert max(found.values()) <= limit < max(at(RATES[RATES.index(rate) - 1]).values())
    assert all(f"{name} {rise:+.3f}" in str(result) for name, rise in result.forgetting_by_text.items())
    again = GrowthResult.read(tmp_path / "limited")
    assert json.loads(json.dumps(again.row()))["forgetting_by_text"] == result.forgetting_by_text
    card = (tmp_path / "limited/adapter/README.md").read_text()
    assert all(f"| {name} | " in card and f"| {rise:+.4f} |" in card for name, rise in again.forgetting_by_text.items())
    result.page(tmp_path / "page.html")
    assert f"near {result.forgetting_by_text['near']:+.3f}" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_one_text_that_is_forgotten_takes_a_round_back(tmp_path):
    model = build()
    before = snapshot(model)
    result = run(tmp_path, model, retain=NAMED, max_forgetting=-10.0, max_steps=4)
    assert not result.rounds[0].kept
    worst = max(result.rounds[0].retained, key=lambda key: result.rounds[0].retained[key] - result.before[key])
    assert f"the loss of the retain text {worst[len('retain[') : -1]!r} rose" in result.ended
    assert result.forgetting_by_text == {"far": 0.0, "near": 0.0}
    assert_same(before, snapshot(result.model))


@pytest.mark.slow
def test_goes_on_with_the_same_texts_and_refuses_others(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", retain=NAMED, callbacks=[Interrupt(4)])
    with pytest.raises(ValueError, match="holds a run with texts"):
        run(tmp_path / "run", retain={"far": NEAR, "near": FAR})
    result, whole = run(tmp_path / "run", retain=NAMED), run(tmp_path / "whole", retain=NAMED)
    assert (result.after, result.rounds[0].looks) == (whole.after, whole.rounds[0].looks)


@pytest.mark.slow
def test_the_model_writes_one_of_the_texts(tmp_path):
    result = run(tmp_path, retain={"own": "self", "far": FAR}, max_steps=4)
    assert set(result.forgetting_by_text) == {"own", "far"}
    assert (tmp_path / "retain.safetensors").exists()
