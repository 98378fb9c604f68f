"""Files of a run that are damaged, edited or half written; and two processes in one folder."""

import json

import pytest
from short_runs import run

from peft_pcgrow import load_grown
from peft_pcgrow.rounds.decision import RoundDecision, note_decision
from peft_pcgrow.rounds.journal import alone, open_journal
from peft_pcgrow.rounds.train import share_of_rate, steps_of
from tiny import build, grown

DECISION = {"growth": "spawn", "why": "so", "locus": {"1": [2]}, "max_steps": 4, "every": 2}
ROUND = {
    "number": 1, "adapter": "default", "growth": "spawn", "why": "so", "nodes": 1, "kept": True, "outcome": "fell",
    "lr": 0.1, "steps": 2, "looks": [[2, 1.0]], "gate_fpr": None, "protect": 0.0, "heldout": 1.0, "retain": None,
    "parameters": 8, "seconds": {"training": 1.0},
}  # fmt: skip
JOURNAL = {"asked": {}, "before": {"heldout": 2.0}, "rounds": [ROUND], "ended": "", "format": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "0.1"}, "lr='0.1' is a text: give a number"),
        ({"lr": 0}, "lr must be above 0, got 0"),
        ({"gate_fpr": "a"}, "gate_fpr must be"),
        ({"protect": 1.5}, "protect must be"),
        ({"numbers": [1]}, "numbers=.* must be a mapping"),
        ({"verdict": 3}, "verdict=3 must be a text"),
        ({"locus": [1]}, "locus=.* must be a mapping"),
        ({"locus": {}}, "the locus is empty"),
        ({"every": 1.5}, "every=1.5 must be a whole number"),
        ({"max_steps": None}, "max_steps=None must be a whole number"),
        ({"growth": "grow"}, "growth='grow'"),
    ],
)
def test_decision_of_wrong_kinds_is_refused(tmp_path, changes, message):
    path = tmp_path / "decision.json"
    path.write_text(json.dumps(DECISION))
    assert RoundDecision.load(path).locus == {"1": [2]}
    path.write_text(json.dumps({**DECISION, **changes}))
    with pytest.raises(ValueError, match=rf"decision.json: {message}"):
        RoundDecision.load(path)


def test_decision_that_changed_since_its_training_began_is_refused(tmp_path):
    decision = RoundDecision(**DECISION)
    note_decision(decision, tmp_path)
    note_decision(decision, tmp_path)
    with pytest.raises(ValueError, match=r"decision.json changed since its training began: delete .*training"):
        note_decision(RoundDecision(**{**DECISION, "every": 1}), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"asked": []},
        {"before": {"heldout": "much"}},
        {"rounds": 3},
        {"ended": None},
        {"rounds": [{**ROUND, "lr": "0.1"}]},
        {"rounds": [{**ROUND, "looks": [["a", 1.0]]}]},
        {"rounds": [{**ROUND, "kept": 1}]},
        {"rounds": [{**ROUND, "seconds": 3.0}]},
        {"rounds": [{}]},
    ],
)
def test_journal_of_wrong_kinds_cannot_be_read(tmp_path, changes):
    path = tmp_path / "journal.json"
    path.write_text(json.dumps(JOURNAL))
    assert open_journal(tmp_path, {}).rounds[0].seconds == {"training": 1.0}
    path.write_text(json.dumps({**JOURNAL, **changes}))
    with pytest.raises(ValueError, match=r"journal.json cannot be read"):
        open_journal(tmp_path, {})


def test_every_step_has_a_rate():
    assert share_of_rate(0, 1) == 0.5
    for total in (1, 2, 8, 90):
        rates = [share_of_rate(step, total) for step in range(total)]
        assert all(0 < rate <= 1 for rate in rates)
        assert share_of_rate(total, total) == 0
    assert rates.index(1.0) == 3
    assert rates[:3] == [1 / 4, 2 / 4, 3 / 4]
    assert rates[-1] == pytest.approx(1 / 87)


def test_as_many_steps_as_asked():
    assert steps_of(64, 8, 4.0, 4, 8) == (8, 2)
    assert steps_of(96, 8, 4.0, 4, 8) == (8, 3)  # looks at 3, 6 and, last, 8
    assert steps_of(96, 8, 1.0, 4, None) == (12, 3)
    assert steps_of(8, 8, 0.1, 4, None) == (1, 1)


def test_a_second_process_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    with alone(tmp_path / "run"), pytest.raises(RuntimeError, match=r"another process is running here, in .*run"):
        run(tmp_path / "run")
    with alone(tmp_path / "run"):
        pass


def test_load_grown_says_what_is_wrong(tmp_path):
    for names, error, message in (
        (None, FileNotFoundError, "has no adapter_config.json"),
        ([], ValueError, r"names=\[\] names no adapter"),
        (["default", "round-2"], FileNotFoundError, f"{tmp_path} has no adapter_config.json"),
    ):
        with pytest.raises(error, match=message):
            load_grown(build(), tmp_path, names)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json, so there is no adapter 'round-2'"):
        load_grown(build(), tmp_path, ["default", "round-2"])
    with pytest.raises(ValueError, match="has an adapter 'default' already: give the base"):
        load_grown(grown(), tmp_path)
