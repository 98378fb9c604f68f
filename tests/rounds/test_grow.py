"""Rounds of growth, unattended: what they bring, that they go on after interruptions, and what they refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from short_runs import Interrupt, banks, corpora, run, text
from transformers import TrainerCallback

from peft_pcgrow import find_experts, load_grown, sample_text
from peft_pcgrow.gates.gate import RATES
from peft_pcgrow.rounds.decision import RoundDecision
from peft_pcgrow.rounds.one_round import losses_of
from peft_pcgrow.rounds.texts import read_texts
from tiny import DOMAIN_WORDS, RETAIN_WORDS, assert_same, build, snapshot


class Untrained(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise AssertionError("trained again")


def test_learns_spares_and_loads(tmp_path):
    base, given = build(), corpora()
    before = snapshot(base)
    result = run(tmp_path, base)
    texts = read_texts(given["train_on"], given["heldout"], given["retain"], None, 24, 8)
    assert result.before == losses_of(build(), texts, 8)
    assert result.gain > 0.3
    assert result.forgetting <= 0.02
    assert [done.kept for done in result.rounds] == [True]
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert losses_of(loaded, texts, 8) == result.after
    assert_same(before, snapshot(result.model.unload()))
    assert "gain" in str(result)
    assert json.loads(json.dumps(result.row()))["gain"] == result.gain
    # asked again it is as it was, without a step
    again = run(tmp_path, build(), callbacks=[Untrained()])
    assert (again.rounds, again.after, again.ended) == (result.rounds, result.after, result.ended)


@pytest.mark.slow
def test_second_round_grows_from_newborns(tmp_path):
    model = build()
    result = run(tmp_path, model, rounds=2, max_steps=6)
    assert [done.adapter for done in result.rounds if done.kept] == ["default", "round-2"]
    assert result.rounds[1].heldout < result.rounds[0].heldout
    given = corpora()
    texts = read_texts(given["train_on"], given["heldout"], given["retain"], None, 24, 8)
    loaded = load_grown(build(), tmp_path / "adapter")
    assert losses_of(loaded, texts, 8) == result.after
    assert not any(p.requires_grad for p in loaded.parameters())
    # the first round's adapter is as its own run leaves it
    alone = run(tmp_path / "alone", rounds=1, max_steps=6)
    mine = banks(result.model)
    assert_same({name: mine[name] for name in banks(alone.model)}, banks(alone.model))


@pytest.mark.slow
def test_without_retain_text_each_round_deepens_other_experts(tmp_path):
    result = run(tmp_path, retain=None, rounds=2, max_steps=6)
    assert result.forgetting is None
    assert [done.growth for done in result.rounds] == ["deepen", "deepen"]
    first, second = (RoundDecision.load(tmp_path / f"rounds/{number}/decision.json").locus for number in (1, 2))
    assert not any(set(second.get(layer, ())) & set(experts) for layer, experts in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [Interrupt(2), Interrupt(7), Interrupt(8, saving=True)])
def test_interrupted_training_goes_on_to_the_same_result(tmp_path, interrupt):
    whole = run(tmp_path / "whole")
    model = build()
    before, tree = snapshot(model), find_experts(model)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", model, callbacks=[interrupt])
    assert_same(before, snapshot(model))
    assert [site.name for site in find_experts(model).sites] == [site.name for site in tree.sites]
    result = run(tmp_path / "broken", model)
    assert_same(banks(whole.model), banks(result.model))
    assert [done.looks for done in whole.rounds] == [done.looks for done in result.rounds]


# on as many threads as this process: others round differently
SCRIPT = """
import sys
import torch
torch.set_num_threads({threads})
sys.path[:0] = {path!r}
from short_runs import run
run({folder!r}, rounds=2, max_steps=6)
"""


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    """A run that nothing broke off."""
    return run(tmp_path_factory.mktemp("whole"), rounds=2, max_steps=6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seen",
    ["rounds/1/map", "rounds/1/training/checkpoint-2", "adapter", "rounds/2/training/checkpoint-2/trainer_state.json"],
)
def test_killed_anywhere_goes_on_to_the_same_result(two_rounds, tmp_path, seen):
    folder, path = tmp_path / "broken", [str(Path(__file__).parent), *sys.path]
    code = SCRIPT.format(path=path, folder=str(folder), threads=torch.get_num_threads())
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (folder / seen).exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert (folder / seen).exists()
    result = run(folder, rounds=2, max_steps=6)
    assert_same(banks(two_rounds.model), banks(result.model))
    assert result.after == two_rounds.after


@pytest.mark.slow
def test_a_round_that_forgets_too_much_is_taken_back(tmp_path):
    model = build()
    before = snapshot(model)
    result = run(tmp_path, model, rounds=3, max_forgetting=-10.0, config=None)
    assert [(done.kept, done.protect) for done in result.rounds] == [(False, 0.8)]
    assert result.rounds[0].gate_fpr == RATES[-1]
    assert "forgot" in result.ended
    assert result.adapter is None
    assert result.after == result.before
    assert_same(before, snapshot(result.model))


@pytest.mark.slow
def test_gates_are_as_open_as_the_limit_allows(tmp_path):
    """The next more open rate of the table forgets more than allowed."""
    given = corpora()
    texts = read_texts(given["train_on"], given["heldout"], given["retain"], None, 24, 8)
    model = run(tmp_path / "any", max_forgetting=10.0).model

    def forgets(rate: float) -> float:
        model.set_gate_fpr(rate)
        return losses_of(model, texts, 8, ("retain",))["retain"] - before["retain"]

    before = losses_of(build(), texts, 8)
    limit = (forgets(0.1) + forgets(RATES[-1])) / 2
    result = run(tmp_path / "limited", max_forgetting=limit)
    rate = result.rounds[0].gate_fpr
    assert rate in RATES
    assert result.rounds[0].kept
    assert result.forgetting == forgets(rate) <= limit < forgets(RATES[RATES.index(rate) - 1])


def test_nothing_grows_where_the_domain_is_covered(tmp_path):
    model = build()
    written = torch.cat(sample_text(model, 128, 24, progress=False))
    result = run(tmp_path, model, train_on=written[:64], heldout=written[64:])
    assert result.ended == "the domain is covered"
    assert result.model is model
    assert not result.rounds


@pytest.mark.slow
def test_an_edited_decision_is_followed(tmp_path):
    run(tmp_path / "first")
    path = tmp_path / "second/rounds/1/decision.json"
    path.parent.mkdir(parents=True)
    decision = json.loads((tmp_path / "first/rounds/1/decision.json").read_text())
    path.write_text(json.dumps({**decision, "locus": {"1": [2, 5]}, "lr": 0.03, "max_steps": 4, "every": 2}))
    result = run(tmp_path / "second")
    assert (result.rounds[0].nodes, result.rounds[0].growth) == (2, "spawn")
    assert (result.rounds[0].lr, [look[0] for look in result.rounds[0].looks]) == (0.03, [2, 4])
    path.write_text(json.dumps({**decision, "lotus": {}}))
    (tmp_path / "second/journal.json").unlink()
    with pytest.raises(ValueError, match=r"decision.json: unknown lotus; a decision has growth"):
        run(tmp_path / "second")


@pytest.mark.slow
def test_model_writes_its_retain_text(tmp_path):
    result = run(tmp_path, retain="self", max_steps=4)
    assert result.forgetting is not None
    written = (tmp_path / "retain.safetensors").read_bytes()
    run(tmp_path, retain="self", max_steps=4)
    assert (tmp_path / "retain.safetensors").read_bytes() == written


@pytest.mark.slow
def test_curriculum_trains_in_the_order_of_surprisal(tmp_path):
    assert run(tmp_path / "ordered", curriculum=True).rounds[0].looks != run(tmp_path / "drawn").rounds[0].looks


def a_file(folder):
    folder.write_text("")


def a_stranger(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("")


def no_journal(folder):
    folder.mkdir()
    (folder / "journal.json").write_text("{")


REFUSED = {
    "one window": ({"train_on": text(DOMAIN_WORDS, 1, 1)}, ValueError, "the corpus has 1 windows of text, and 8"),
    "empty": ({"train_on": []}, ValueError, "the corpus has 0 windows"),
    "a path": ({"train_on": "corpus.jsonl"}, TypeError, "no corpus but a single string, or a path"),
    "strings": ({"train_on": ["some text"] * 9}, ValueError, "give tokenizer="),
    "little held out": ({"heldout": text(DOMAIN_WORDS, 2, 2)}, ValueError, "the held-out text has 2 windows"),
    "held out is trained on": ({"heldout": corpora()["train_on"]}, ValueError, "64 of the 64 held-out windows"),
    "retain is the domain": (
        {"retain": corpora()["train_on"]},
        ValueError,
        "windows of the retain text are the domain's own",
    ),
    "retain word": ({"retain": "wiki"}, ValueError, "retain='wiki' is a string"),
    "retain words": ({"retain": {"encyclopedia": "wiki"}}, ValueError, r"retain\['encyclopedia'\]='wiki' is a string"),
    "retain of nothing": ({"retain": {}}, ValueError, r"retain is a mapping of \[\]: give each text a name"),
    "retain without a name": ({"retain": {0: corpora()["retain"]}}, ValueError, r"a mapping of \[0\]: give each text"),
    "little of one retain text": (
        {"retain": {"much": corpora()["retain"], "little": text(RETAIN_WORDS, 9, 9)}},
        ValueError,
        "the retain text 'little' has 9 windows of text, and 16",
    ),
    "one retain text is the domain's": (
        {"retain": {"others": corpora()["retain"], "mine": corpora()["train_on"]}},
        ValueError,
        "windows of the retain text 'mine' are the domain's own",
    ),
    "forgetting of nothing": ({"retain": None, "max_forgetting": 0.1}, ValueError, "max_forgetting=0.1 is about"),
    "budget": ({"budget": 0}, ValueError, "budget must be a share"),
    "rate": ({"gate_fpr": 0.9}, ValueError, "gate_fpr"),
    "rounds": ({"rounds": 0}, ValueError, "rounds must be a whole number"),
    "held out is retain": ({"heldout": corpora()["retain"][:16]}, ValueError, "16 of the 16 held-out windows are also"),
    "retain again and again": ({"retain": corpora()["retain"][:15].repeat(4, 1)}, ValueError, "retain text has 15 win"),
    "nothing to predict": (
        {"train_on": [{"input_ids": text(DOMAIN_WORDS, 8, 1), "labels": torch.full((8, 24), -100)}]},
        ValueError,
        "the corpus has 0 windows",
    ),
    "config": ({"config": {"protect": 2}}, ValueError, "config: protect must be a share"),
    "batches": (
        {"train_on": [{"input_ids": text(DOMAIN_WORDS, 8, 1), "position_ids": torch.arange(24).expand(8, 24)}]},
        ValueError,
        "position_ids beside token ids",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(tmp_path, changes, error, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        run(tmp_path / "new", model, **changes)
    assert_same(before, snapshot(model))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (a_file, FileExistsError, "is a file"),
        (a_stranger, FileExistsError, "holds thesis.txt and no journal.json"),
        (no_journal, ValueError, "journal.json cannot be read"),
    ],
)
def test_refuses_folders(tmp_path, make, error, message):
    make(tmp_path / "run")
    with pytest.raises(error, match=message):
        run(tmp_path / "run")


@pytest.mark.slow
def test_refuses_to_go_on_with_another_run(tmp_path):
    run(tmp_path, max_steps=2)
    for changes, name in (
        ({"budget": 0.5}, "budget"),
        ({"train_on": text(DOMAIN_WORDS, 64, 9)}, "texts.train"),
        ({"model": build(seed=1)}, "weights"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with {name}="):
            run(tmp_path, **{"max_steps": 2, **changes})
