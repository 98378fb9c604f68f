"""What the command is given (options, settings, folders, devices, scripts), and what it refuses before it loads."""

import errno
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from peft_pcgrow.command.doctor import check_up
from peft_pcgrow.command.fail import exit_codes
from peft_pcgrow.command.load import load_config
from peft_pcgrow.command.main import app
from peft_pcgrow.command.settings_file import read_settings
from peft_pcgrow.rounds.arguments import check_arguments

MODEL = Path(__file__).parents[2] / "examples/embedded-moe"


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def words(tmp_path) -> list[object]:
    """`grow` on a model whose weights are missing, so that whatever comes to load them is told something else."""
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "text.txt").write_text("one\n\ntwo\n\nthree\n")
    return ["grow", tmp_path / "model", "--data", tmp_path / "text.txt", "--out", tmp_path / "run"]


def test_the_command_line_goes_before_the_file(words, tmp_path):
    """Also where what was typed is the default."""
    (tmp_path / "grow.yaml").write_text("budget: 0.5\nrounds: 2\nlr: 1e-3\n")
    done = call(*words, "--budget", 0.2, "--config", tmp_path / "grow.yaml", "--dry-run", "--json")
    row = json.loads(done.stdout)
    expected = {"budget": 0.2, "rounds": 2, "lr": 0.001, "length": 256}
    assert {name: row["arguments"][name] for name in expected} == expected
    assert (row["budget"], row["grown"]) == (0.2, round(0.2 * row["layers"] * row["experts"]))


def test_numbers_in_settings(tmp_path):
    path = tmp_path / "grow.yaml"
    path.write_text("\ufefflr: 1e-3\nepochs: 2E1\ntrainer: {a: -.5e-2, b: 1.e+2, c: '1e-3', d: e3, e: 1e-3x, f: 7}\n")
    assert read_settings(path, ("lr", "epochs", "trainer"), {}) == {
        "lr": 0.001,
        "epochs": 20.0,
        "trainer": {"a": -0.005, "b": 100.0, "c": "1e-3", "d": "e3", "e": "1e-3x", "f": 7},
    }


def test_several_retain_texts_are_told_apart_by_their_names(words, tmp_path):
    for name in ("code", "news"):
        (tmp_path / f"{name}.txt").write_text("one\n\ntwo")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/news.txt").write_text("three")
    several = [word for name in ("code.txt", "news.txt") for word in ("--retain", tmp_path / name)]
    done = call(*words, *several, "--retain", "self", "--max-forgetting", 0.01, "--dry-run")
    assert (done.exit_code, "retain (code 2 texts, news 2 texts, self self)" in done.stdout) == (0, True), done.stderr
    done = call(*words, *several, "--retain", tmp_path / "other/news.txt", "--dry-run")
    assert (done.exit_code, "--retain names two texts news" in done.stderr) == (2, True)


def test_dry_run_says_what_retain_text_is(words):
    done = call(*words, "--retain", "self", "--max-forgetting", 0.01, "--dry-run")
    assert (done.exit_code, "train_on 3 texts, retain self" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_refused_before_a_weight_is_loaded(words, tmp_path, dry):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/other").write_text("")
    (tmp_path / "grow.yaml").write_text("max_forgetting: 0.1\n")
    cases = [
        (["--out", tmp_path / "text.txt"], "is a file"),
        (["--out", tmp_path / "full"], "no run to go on"),
        (["--max-forgetting", 0.1], "give --retain"),
        (["--config", tmp_path / "grow.yaml"], "give --retain"),
        (["--device", "foo"], "device 'foo' cannot be used"),
    ]
    cases += [] if torch.cuda.is_available() else [(["--device", "cuda"], "device 'cuda' cannot be used")]
    for more, message in cases:
        done = call(*words, *more, *dry)
        assert (done.exit_code, message in done.stderr, done.stdout) == (2, True, ""), (more, done.stderr)
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [("length", 1), ("batch-size", 0), ("rounds", 0), ("max-steps", 0)])
def test_numbers_out_of_range(words, name, value):
    done = call(*words, f"--{name}", value)
    assert (done.exit_code, name in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("budget", [0, 1.5, -0.2, "nan"])
def test_doctor_takes_a_share(budget):
    done = call("doctor", MODEL, "--budget", budget)
    assert (done.exit_code, "budget must be a share" in done.stderr) == (2, True)


def test_compress_and_map_refuse_first(words, tmp_path):
    _, model, *rest = words
    done = call("compress", model, *rest, "--target", 1.5)
    assert (done.exit_code, "target" in done.stderr, (tmp_path / "run").exists()) == (2, True, False), done.stderr
    done = call("compress", model, *rest, "--target", 0.5, "--max-loss-rise", -1)
    assert (done.exit_code, "max-loss-rise" in done.stderr) == (2, True), done.stderr
    done = call("map", model, *rest, "--out", tmp_path / "text.txt")
    assert (done.exit_code, "is a file" in done.stderr) == (2, True), done.stderr


def test_sizes_are_plain_numbers():
    found = check_up(load_config(str(MODEL), None), 0.2)
    assert "base: 1020 MiB in" in str(replace(found, weights=1020 * 2**20))
    assert "base: 1.5 GiB in" in str(replace(found, weights=3 * 2**29))
    assert "base: 0 B in" in str(replace(found, weights=0))


@pytest.mark.parametrize("script", ["missing.py", "no_module_of_this_name", "./missing"])
def test_a_missing_script(script):
    done = call("run", script)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {script} is no file")


def test_what_follows_a_script_is_the_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = tmp_path / "tool.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nif 'bad' in sys.argv: raise ValueError('its own')\n")
    assert call("run", script, "--help", "--", "-x").stdout == "['--help', '--', '-x']\n"
    done = call("run", script, "bad")
    assert (done.exit_code, str(done.exception)) == (1, "its own")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EDQUOT, 1), (errno.ENOENT, 2), (errno.EACCES, 2)],
)
def test_a_full_disk_is_nobodys_usage(number, code, wrapped, capsys):
    """Also where a loader has said so in its own words."""
    error: Exception = OSError(number, "what the\nsystem says", "file")
    if wrapped:
        cause, error = error, ValueError("cannot be\nloaded")
        error.__cause__ = cause
    with pytest.raises(SystemExit) as caught, exit_codes():
        raise error
    assert (caught.value.code, capsys.readouterr().err.count("\n")) == (code, 1)


def test_what_others_raise_deep_within_is_nobodys_usage(capsys):
    with pytest.raises(ValueError, match="invalid literal"), exit_codes():
        int("x")
    with pytest.raises(SystemExit) as caught, exit_codes():
        check_arguments({"lr": 0})
    assert (caught.value.code, capsys.readouterr().err) == (2, "error: lr must be above 0, got 0\n")


def test_standard_output_is_the_results(capsys):
    with exit_codes() as stdout:
        print("said on the way")
        print("result", file=stdout)
    assert capsys.readouterr() == ("result\n", "said on the way\n")


@pytest.mark.parametrize("goes_on", [False, True])
def test_interrupted(goes_on, capsys):
    with pytest.raises(SystemExit) as caught, exit_codes(goes_on):
        raise KeyboardInterrupt
    assert (caught.value.code, "goes on from here" in capsys.readouterr().err) == (130, goes_on)
