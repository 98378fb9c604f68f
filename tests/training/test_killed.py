"""Processes that are killed: the others end too, and training goes on from the last whole checkpoint, bit for bit."""

import json
from pathlib import Path

import pytest
import torch

import fresh
import killed_script
from peft_pcgrow.training.checkpoints import last_checkpoint
from tiny import assert_same


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("killed")
    done = fresh.run(Path(killed_script.__file__), folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "found.pt")


@pytest.mark.slow
@pytest.mark.cpu("processes meet over gloo")
@pytest.mark.parametrize("case", killed_script.CASES)
def test_goes_on(found, case):
    """One after another is killed in a step, and while a checkpoint is written: no step is lost that was saved. What
    was not interrupted has also measured maps, the same on both."""
    *attempts, last = found[case]["killed"]
    saved = 0
    for death, each in zip(killed_script.CASES[case], attempts, strict=True):
        assert each["ended"] == ([-9, 1] if death.rank == 0 else [1, -9]), each["said"]
        assert each["seconds"] < killed_script.SECONDS
        # what the first process says of its steps: they begin behind the last whole checkpoint
        assert each["said"][0].count("'loss'") == death.step - saved - (not death.writing)
        written = death.step - 1
        assert each["left"] == [f"checkpoint-{step + 1}" for step in range(written + death.writing)]
        saved = written
    want = found[case]["whole"]["at the end"]
    assert last["ended"] == found[case]["whole"]["ended"] == [0, 0], last["said"]
    for got, whole in zip(last["at the end"], want, strict=True):
        assert got["losses"] == whole["losses"]
        assert_same(got["held"], whole["held"])
    assert_same(last["at the end"][0]["held"], last["at the end"][1]["held"])
    (one, two) = (whole["maps"] for whole in want)
    assert [step for step, _ in one] == [2, 4]
    assert all(bool(mine.any()) and torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(one, two, strict=True))


PARTS = {
    "one": ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    "two": ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"),
    "sharded": ("trainer_state.json", "optimizer_0", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"),
}


def checkpoint(folder: Path, step: int, processes: str) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir()
    for part in PARTS[processes]:
        (place / part).mkdir() if part == "optimizer_0" else (place / part).write_text("")
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return place


@pytest.mark.parametrize(("processes", "part"), [(n, part) for n, parts in PARTS.items() for part in parts])
def test_falls_back_to_a_checkpoint_that_is_whole(tmp_path, processes, part):
    assert last_checkpoint(tmp_path / "none") is None
    kept, newest = (checkpoint(tmp_path, step, processes) for step in (8, 12))
    (tmp_path / "checkpoint-14").write_text("")
    assert last_checkpoint(tmp_path) == str(newest)
    (newest / part).rmdir() if part == "optimizer_0" else (newest / part).unlink()
    assert last_checkpoint(tmp_path) == str(kept)
    # without a state it was cut short; others may be what somebody wanted
    assert newest.exists() == (part != "trainer_state.json")
    assert (tmp_path / "cut-short-checkpoint-12").is_dir() == (part == "trainer_state.json")
    assert (tmp_path / "checkpoint-14").is_file()


def test_state_that_was_cut_short(tmp_path):
    kept, newest = (checkpoint(tmp_path, step, "one") for step in (8, 12))
    (newest / "trainer_state.json").write_text('{"global_step": 1')
    assert last_checkpoint(tmp_path) == str(kept)


def test_checkpoints_of_others_stay(tmp_path):
    kept = checkpoint(tmp_path, 8, "one")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "checkpoint-best", target_is_directory=True)
    weights = tmp_path / "checkpoint-10"  # save_only_model=True
    weights.mkdir()
    (weights / "trainer_state.json").write_text('{"global_step": 10}')
    before = sorted(tmp_path.rglob("*"))
    assert last_checkpoint(tmp_path) == str(kept)
    deepspeed = checkpoint(tmp_path, 12, "two")
    for part in ("optimizer.pt", "scheduler.pt"):
        (deepspeed / part).unlink()
    (deepspeed / "global_step12").mkdir()
    (deepspeed / "latest").write_text("global_step12")
    (deepspeed / "rng_state.pth").write_text("")  # of one process, before
    assert last_checkpoint(tmp_path) == str(deepspeed)
    assert set(before) < set(tmp_path.rglob("*"))
