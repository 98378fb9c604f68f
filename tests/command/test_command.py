"""The command `pcgrow`, as a shell calls it: what it prints, its exit codes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peft_pcgrow import ErrorMap, load_grown
from peft_pcgrow.command.corpus_file import read_corpus_file
from peft_pcgrow.command.main import app

MODEL = str(Path(__file__).parents[2] / "examples/embedded-moe")


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Some prose and some source, each in paragraphs."""
    folder = tmp_path_factory.mktemp("texts")
    prose = [f"The {thing} of line {n} is taken before any other {thing} of it." for n in range(60) for thing in THINGS]
    code = [f"def {thing}_{n}(self, {thing}):\n    return self.{thing}[{n}]" for n in range(60) for thing in THINGS]
    found = {}
    for name, lines in {"prose": prose, "held": prose[1::7], "code": code}.items():
        found[name] = folder / f"{name}.jsonl"
        chosen = [line for line in lines if name != "prose" or line not in prose[1::7]]
        found[name].write_text("".join(json.dumps({"text": line}) + "\n" for line in chosen))
    return found


THINGS = ("value", "name", "key", "row")


def test_doctor_counts_what_is_there():
    row = json.loads(call("doctor", MODEL, "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    experts = model.model.layers[0].mlp.experts
    one = experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()
    assert (row["in_one"], row["layers"], row["experts"]) == (one, len(model.model.layers), experts.num_experts)
    assert row["bank"] == 4 * one * round(0.2 * row["layers"] * row["experts"])
    assert "can grow" in call("doctor", MODEL).stdout


def test_doctor_says_what_a_step_takes():
    """By every way and optimizer; a GPU by its size or its name."""
    asked = ("doctor", MODEL, "--batch-size", 2, "--length", 64)
    row = json.loads(call(*asked, "--json").stdout)
    peaks = [step["peak"] for step in row["steps"]]
    assert [(step["way"], step["optimizer"]) for step in row["steps"]] == [
        *((way, optimizer) for way in ("sweep", "direct", "backprop") for optimizer in ("Muon", "AdamW")),
        ("LoRA", "AdamW"),
    ]
    assert {step["adapter"] for step in row["steps"][:-1]} == {row["bank"]}
    assert all(row["weights"] <= step["base"] < 1.01 * row["weights"] for step in row["steps"])
    middle = (min(peaks) + max(peaks)) / 2
    found = json.loads(call(*asked, "--gpu", middle / 0.9 / 2**30, "--json").stdout)
    assert found["fits"] == [peak <= middle for peak in peaks]
    assert call(*asked, "--gpu", "H100").stdout.count("  fits") == 8
    done = call(*asked, "--gpu", "enough")
    assert (done.exit_code, "neither GiB, as 24, nor one of T4" in done.stderr) == (2, True)


def test_map_then_compress(texts, tmp_path):
    out = tmp_path / "map"
    done = call("map", MODEL, "--data", texts["prose"], "--out", out, "--max-tokens", 2000, "--length", 64)
    assert done.exit_code == 0
    emap = ErrorMap.load(out / "map")
    assert emap.tokens >= 2000
    assert (out / "map.html").read_text().startswith("<!doctype html>")
    again = call("map", MODEL, "--data", texts["prose"], "--out", out)
    assert (again.exit_code, "holds a map already" in again.stderr) == (2, True)
    small = tmp_path / "small"
    done = call("compress", MODEL, "--target", 0.5, "--retain", texts["code"], "--map", out / "map", "--out", small)
    assert done.exit_code == 0
    assert AutoTokenizer.from_pretrained(small)("x").input_ids
    with safe_open(small / "model.safetensors", "pt") as held:
        assert any(name.endswith(".packed") or "packed" in name for name in held.keys())  # noqa: SIM118


@pytest.mark.slow
def test_grow_goes_on_and_loads(texts, tmp_path):
    settings = tmp_path / "grow.yaml"
    settings.write_text("map_windows: 32\nepochs: 1\nconfig: {nodes: routed}\n")
    words = ["grow", MODEL, "--data", texts["prose"], "--heldout", texts["held"], "--retain", texts["code"]]
    words += ["--out", tmp_path / "run", "--config", settings, "--max-forgetting", 0.1, "--rounds", 1]
    words += ["--max-steps", 8, "--length", 64, "--json"]
    first, second = call(*words), call(*words)
    assert (first.exit_code, second.exit_code) == (0, 0)
    row = json.loads(first.stdout)
    assert row["gain"] > 0
    page = Path(row["page"]).read_text()
    for said in ("prose: what growing did", "What it writes", "Lifecycle after round 1", "Round 1, kept"):
        assert said in page
    assert json.loads(second.stdout) == row
    assert load_grown(AutoModelForCausalLM.from_pretrained(MODEL), row["adapter"])


def test_dry_run_loads_no_weight(texts, tmp_path):
    done = call("grow", MODEL, "--data", texts["prose"], "--out", tmp_path / "run", "--dry-run")
    assert (done.exit_code, "train_on" in done.stdout, (tmp_path / "run").exists()) == (0, True, False)


def test_runs_scripts_with_the_plugin(tmp_path, capsys):
    script = tmp_path / "tool.py"
    script.write_text("import sys, peft\nprint(sys.argv[1:], 'PCGROW' in peft.PeftType.__members__)\n")
    assert call("run", script, "--lr", 3).stdout.strip() == "['--lr', '3'] True"


BAD_LINES = {
    "no JSON": ('"one"\n{"text": \n', "line 2 is no JSON"),
    "another field": ('{"text": "one"}\n\n{"body": "two"}\n', "line 3 has the fields body"),
    "a number": ("3\n", "line 1 has a text of type int"),
    "a number in the field": ('{"text": 3}\n', "line 1 has a text of type int"),
    "nothing": ("\n\n", "holds no text"),
}


@pytest.mark.parametrize(("lines", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named(lines, message, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_corpus_file(path)


def test_ends_of_lines_in_strings_stay(tmp_path):
    """Those that JSON takes as they are, after a byte order mark, in a file from Windows."""
    path, text = tmp_path / "corpus.jsonl", "one\u2028two\u2029three\x85four"
    lines = json.dumps({"text": text}, ensure_ascii=False) + '\r\n"five"\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read_corpus_file(path) == [text, "five"]


def test_paragraphs(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("one\ntwo\n\n\n  \nthree\n")
    assert read_corpus_file(path) == ["one\ntwo", "three"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_corpus_file(path)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("bugdet: 0.3", "sets bugdet, which is no argument: did you mean budget?"),
        ("train_on: x", "sets train_on, which is an option of the command: give --data"),
        ("retain: self", "sets retain, which is an option of the command: give --retain"),
        ("tokenizer: x", "sets tokenizer, which is for Python only"),
        ("[1, 2]", "holds a list"),
        ("a: [", "is no YAML"),
    ],
)
def test_typos_in_settings(texts, tmp_path, yaml, message):
    path = tmp_path / "grow.yaml"
    path.write_text(yaml)
    done = call("grow", MODEL, "--data", texts["prose"], "--out", tmp_path / "run", "--config", path)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


def test_refuses(texts, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    missing = tmp_path / "missing"
    for words, message in (
        (("doctor", missing), "no model at"),
        (("doctor", MODEL, "--nodes", "dense"), "dense"),
        (("map", MODEL, "--data", missing / "a.jsonl", "--out", tmp_path / "m"), "No such file"),
        (("grow", MODEL, "--data", texts["prose"], "--out", tmp_path / "full", "--max-steps", 1), "no run to go on"),
        (("compress", MODEL, "--target", 0.5, "--out", tmp_path / "s"), "give --retain, or --data"),
        (("compress", MODEL, "--target", 0.5, "--out", tmp_path / "full", "--data", texts["held"]), "is not empty"),
    ):
        done = call(*words)
        assert (done.exit_code, message in done.stderr) == (2, True), (words, done.stderr)
