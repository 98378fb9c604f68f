"""What cannot be shipped, and what the Hub refuses: each with what to do, the commands with their exit codes."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peft_pcgrow import PCGrowConfig, load_grown, push
from peft_pcgrow.adapter.sealed_file import SealedFile
from peft_pcgrow.command.main import app
from tiny import LOCUS, build, train

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODEL = Path(__file__).parents[2] / "examples/embedded-moe"


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained adapter, for tests that only read it."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = get_peft_model(build(), PCGrowConfig(locus=LOCUS))
    train(model, 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    """One to break."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def cut(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: len(data) // 2])


def alter(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    key = next(key for key in tensors if key.endswith("down_proj.weight"))
    tensors[key][0, 0, 0] += 1
    save_file(tensors, folder / FILE)


def of_lora(folder: Path) -> None:
    shutil.rmtree(folder)
    get_peft_model(build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


BROKEN = {
    "no adapter": (lambda folder: (folder / CONFIG).unlink(), "there is no adapter in it"),
    "no weights": (lambda folder: (folder / FILE).unlink(), f"holds no {FILE}"),
    "half a file": (cut, "was not written to its end"),
    "another value": (alter, "does not have the checksum"),
    "half a config": (lambda folder: (folder / CONFIG).write_text('{"peft_type": '), "was not saved to its end"),
    "no folder": (shutil.rmtree, "is no folder"),
    "another method": (of_lora, "of the method LORA"),
    "half a journal": (lambda folder: (folder / "journal.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize(("broken", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_folders_that_are_not_whole(hub, adapter, broken, message):
    """Nobody is asked for anything."""
    broken(adapter)
    done = call("push", adapter, "--repo", "me/x")
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
    assert hub.asked == []


def test_names_and_settings_that_are_none(saved):
    for words, message in (
        (("--repo", "a/b/c"), "give owner/name"),
        (("--repo", "me/x", "--base", "/a/path"), "give owner/name"),
        (("--repo", "me/x", "--dtype", "int8"), "int8"),
        (("--repo", "me/x", "--shrink", 4), "does not name its base"),
    ):
        done = call("push", saved, *words)
        assert (done.exit_code, message in done.stderr) == (2, True), (words, done.stderr)
    with pytest.raises(ValueError, match="give model="):
        push(saved, "me/x", shrink=4)
    with pytest.raises(ValueError, match="bits=5"):
        push(saved, "me/x", shrink=5, model=build())
    with pytest.raises(ValueError, match="no token to predict"):
        push(saved, "me/x", model=build(), heldout=torch.ones(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="banks are sent in"):
        push(saved, "me/x", dtype="int8")
    with pytest.raises(ValueError, match="leave it out"):
        load_grown(build(), saved, revision="main")
    with pytest.raises(FileNotFoundError, match="owner/name"):
        load_grown(build(), saved.parent / "nothing" / "there" / "is")


def test_a_base_is_as_it_was_after_a_refusal(saved):
    model = build()
    with pytest.raises(ValueError, match="bits=5"):
        push(saved, "me/x", shrink=5, model=model)
    assert not hasattr(model, "peft_config")


def test_who_may_not(hub, saved, monkeypatch):
    """No token, one that nobody knows, one that may only read, somebody else's repository."""
    for token, repo, message in (
        (None, "me/x", "hf auth login"),
        ("hf_unknown", "me/x", "hf auth login"),
        ("hf_reading", "me/x", "a token that may"),
        ("hf_mine", "you/x", "a repository of your own"),
    ):
        monkeypatch.setenv("HF_TOKEN", token or "")
        asked = len(hub.asked)
        done = call("push", saved, "--repo", repo)
        assert (done.exit_code, message in done.stderr) == (2, True), (token, done.stderr)
        assert (len(hub.asked) == asked) == (token is None)
        assert "me/x" not in hub.repos


def test_what_is_public_is_not_taken_for_private(hub, saved):
    push(saved, "me/x")
    held = hub.repos["me/x"].branches["main"]
    done = call("push", saved, "--repo", "me/x", "--private", "--dtype", "float32")
    assert (done.exit_code, "is there already, and public" in done.stderr) == (2, True), done.stderr
    assert hub.repos["me/x"].branches["main"] == held


def test_no_network(hub, saved, monkeypatch):
    """A port that nobody listens at: the command fails, with another code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    done = call("push", saved, "--repo", "me/x")
    assert (done.exit_code, f"{nowhere} was not reached for me/x" in done.stderr) == (1, True), done.stderr
    with pytest.raises(ConnectionError, match="was not reached"):
        load_grown(build(), "me/x")


def test_what_is_not_on_the_hub(hub, saved):
    with pytest.raises(FileNotFoundError, match=r"has no me/nothing"):
        load_grown(build(), "me/nothing")
    push(saved, "me/x", private=True)
    with pytest.raises(FileNotFoundError, match="no such revision"):
        load_grown(build(), "me/x", revision="v9")
    assert list(load_grown(build(), "me/x").peft_config) == ["default"]


def test_dry_run_and_card(hub, saved, tmp_path):
    """The files are listed that would be sent, nobody is asked, and the folder stays as it is."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    row = json.loads(call("push", saved, "--repo", "me/x", "--dry-run", "--json").stdout)
    assert (row["commit"], list(row["files"])) == (None, ["README.md", CONFIG, FILE])
    assert hub.asked == []
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    printed = call("card", saved).stdout
    assert 'from_pretrained("this adapter")' in printed
    assert json.loads(call("card", saved, "--json").stdout) == {"card": printed.removesuffix("\n"), "written": None}
    folder = Path(shutil.copytree(saved, tmp_path / "adapter"))
    (folder / "README.md").unlink()
    assert call("card", folder, "--write").exit_code == 0
    assert (folder / "README.md").read_text() == printed.removesuffix("\n")
    sent = json.loads(call("push", saved, "--repo", "me/x", "--json", "--base", "me/base").stdout)
    assert sent["files"].keys() == row["files"].keys()
    assert json.loads(hub.repos["me/x"].commits[sent["commit"]][CONFIG])["base_model_name_or_path"] == "me/base"


def test_shrunk_and_measured_from_a_shell(tmp_path):
    """The base is loaded by the name that the adapter notes."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), PCGrowConfig(locus={1: [0, 3]}))
    train(model, 1, lr=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "held.txt").write_text("The value of a name is taken before any other.\n\nA row is a key.")
    words = ("push", tmp_path / "adapter", "--repo", "me/x", "--dry-run", "--json", "--heldout", tmp_path / "held.txt")
    rows = [json.loads(call(*words, *more).stdout) for more in ((), ("--shrink", 4), ("--dtype", "float32"))]
    ids = AutoTokenizer.from_pretrained(MODEL)(["The value of a name is taken before any other.", "A row is a key."])
    assert len({row["loss_before"] for row in rows}) == 1
    texts = [torch.tensor([text]) for text in ids["input_ids"]]
    with torch.no_grad():
        found = [float(model.eval()(input_ids=text, labels=text).loss) * (text.shape[1] - 1) for text in texts]
    # the base is in 16 bit, and there the texts are a padded batch
    assert rows[0]["loss_before"] == pytest.approx(sum(found) / sum(text.shape[1] - 1 for text in texts), rel=2e-3)
    assert all(row["loss_after"] == row["loss_before"] for row in (rows[0], rows[2]))
    assert "default: 4 bits" in rows[1]["card"]
    sizes = [row["files"][FILE] for row in rows]
    assert sizes[1] < 0.6 * sizes[0] < 0.36 * sizes[2]


# ---- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_what_it_says(saved, dtype):
    """The largest error of a bank, from its definition; no other tensor changes."""
    held = SealedFile.read(saved)
    rounded, error = held.rounded(dtype)
    errors = []
    for key, tensor in held.tensors.items():
        assert torch.equal(rounded.tensors[key], tensor.to(dtype))
        lost = tensor.double() - tensor.to(dtype).double()
        errors.append(float(lost.square().sum().sqrt() / tensor.double().square().sum().sqrt()))
    assert error == pytest.approx(max(errors), rel=1e-9)
    # half of the last of 8 or 11 bits at most
    assert 0 < error < 2.0 ** -(9 if dtype == torch.bfloat16 else 12) * 2


def test_what_a_dtype_cannot_hold_is_refused(tmp_path):
    model = get_peft_model(build(), PCGrowConfig(locus=LOCUS))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "pcgrow_down_proj" in name)[0, 0, 0] = 1e5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="choose bfloat16"):
        push(tmp_path, "me/x", dtype="float16", dry_run=True)
    assert push(tmp_path, "me/x", dry_run=True).files
