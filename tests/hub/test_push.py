"""What was grown, pushed to a server on this machine and loaded from it: by all that users call, bit for bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import create_repo, upload_folder
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from short_runs import corpora, run
from torch import nn
from transformers import AutoModelForCausalLM

from peft_pcgrow import PCGrowConfig, load_grown, push
from peft_pcgrow.rounds.one_round import losses_of
from peft_pcgrow.rounds.texts import read_texts
from tiny import LOCUS, assert_same, build, logits, snapshot, spawning, train

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder of a run that kept two rounds, its base in `base`, and its result."""
    folder = tmp_path_factory.mktemp("ran")
    build().save_pretrained(folder / "base")
    result = run(folder / "run", AutoModelForCausalLM.from_pretrained(folder / "base"), rounds=2, max_steps=6)
    assert [done.kept for done in result.rounds] == [True, True]
    return folder, result


def grown(folder: Path, base: nn.Module, **settings) -> PeftModel:
    """A trained adapter, saved there."""
    model = get_peft_model(base, PCGrowConfig(**{"locus": LOCUS, **settings}))
    train(model)
    model.save_pretrained(folder)
    return model


def with_banks_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every bank's weights rounded where they are."""
    for name, p in model.named_parameters():
        if ".pcgrow_" in name:
            p.data = p.data.to(dtype).to(p.dtype)
    return model


# ---- there and back

LOADS = """
import sys, torch
import peft_pcgrow
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
base = AutoModelForCausalLM.from_pretrained("me/base")
found = [PeftModel.from_pretrained(base, "me/grown"), AutoPeftModelForCausalLM.from_pretrained("me/grown")]
found += [AutoModelForCausalLM.from_pretrained("me/grown")]
found += [peft_pcgrow.load_grown(AutoModelForCausalLM.from_pretrained("me/base"), "me/grown")]
with torch.no_grad():
    torch.save([model.eval()(input_ids=ids, use_cache=False).logits for model in found], sys.argv[2])
"""


@pytest.mark.slow
def test_every_loader_in_a_fresh_process(hub, tmp_path):
    """A base of the Hub, whose commit the adapter notes; its banks in 16 bit."""
    build().save_pretrained(tmp_path / "base")
    create_repo("me/base")
    commit = upload_folder(repo_id="me/base", folder_path=tmp_path / "base").oid
    model = grown(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained("me/base"), revision=commit)
    done = push(tmp_path / "adapter", "me/grown", private=True)
    assert hub.repos["me/grown"].private
    assert done.commit == hub.repos["me/grown"].branches["main"]
    assert set(hub.repos["me/grown"].commits[done.commit]) == {*done.files, ".gitattributes"}
    assert done.files[FILE] < 0.55 * (tmp_path / "adapter" / FILE).stat().st_size
    assert "base_model:adapter:me/base" in done.card
    assert f"revision {commit}" in done.card
    ids = torch.arange(3, 67).view(2, 32)
    torch.save(ids, tmp_path / "ids")
    told = [sys.executable, "-c", LOADS, str(tmp_path / "ids"), str(tmp_path / "logits")]
    paths = os.pathsep.join(filter(None, sys.path))
    ended = subprocess.run(
        told, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    expected = logits(with_banks_in(model, torch.bfloat16), ids)
    found = torch.load(tmp_path / "logits")
    assert len(found) == 4
    for each in found:
        assert torch.equal(each, expected)


@pytest.mark.slow
@pytest.mark.parametrize("resolution", ["expert", "matrix"])
def test_over_a_base_in_16_bit_nothing_is_lost(resolution, hub, tmp_path):
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    given = (
        {"parts": {1: {4: ["down_proj"]}, 2: {0: ["gate_up_proj"]}}, "locus": None} if resolution == "matrix" else {}
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits(grown(tmp_path / "adapter", base, resolution=resolution, **given))
    push(tmp_path / "adapter", "me/grown")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/grown")), expected)


@pytest.mark.slow
def test_in_32_bit_it_trains_on(hub, tmp_path):
    """What is pushed is what was saved, and goes on as if it had never left."""
    build().save_pretrained(tmp_path / "base")
    model = grown(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    done = push(tmp_path / "adapter", "me/grown", dtype="float32")
    pushed = hub.repos["me/grown"].commits[done.commit]
    (tmp_path / "back").write_bytes(pushed[FILE])
    assert_same(load_file(tmp_path / "adapter" / FILE), load_file(tmp_path / "back"))
    assert "without loss" in done.stored
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, "me/grown", is_trainable=True)
    assert train(loaded, seed=7) == train(model, seed=7)


@pytest.mark.slow
def test_newborns_and_what_is_beside_them(hub, tmp_path):
    """Gates, LoRA and further modules are sent as they are; only whole banks are rounded."""
    build().save_pretrained(tmp_path / "base")
    config = spawning(lora={"target_modules": ["q_proj"], "r": 2}, modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    push(tmp_path / "adapter", "me/grown")
    expected = logits(with_banks_in_16_bit_only(model))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/grown")), expected)


def with_banks_in_16_bit_only(model: nn.Module) -> nn.Module:
    """By the names of stacks, of which the gates' tensors are none."""
    for name, p in model.named_parameters():
        if ".pcgrow_gate_up_proj." in name or ".pcgrow_down_proj." in name:
            p.data = p.data.bfloat16().float()
    return model


@pytest.mark.slow
def test_what_transformers_pushes_loads_too(hub, tmp_path):
    build().save_pretrained(tmp_path / "base")
    model = grown(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.push_to_hub("me/grown")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/grown")), logits(model))


# ---- a run


@pytest.mark.slow
def test_a_run_with_its_rounds_and_what_16_bit_cost(hub, ran):
    folder, result = ran
    base, given = AutoModelForCausalLM.from_pretrained(folder / "base"), corpora()
    before = snapshot(base)
    texts = read_texts(given["train_on"], given["heldout"], given["retain"], None, 24, 8)
    done = push(folder / "run", "me/run", model=base, heldout=given["heldout"])
    assert_same(before, snapshot(base))
    assert done.loss_before == pytest.approx(result.after["heldout"], abs=1e-6)
    loaded = load_grown(base, "me/run")
    assert list(loaded.peft_config) == ["default", "round-2"]
    assert done.loss_after == pytest.approx(losses_of(loaded, texts, 8)["heldout"], abs=1e-6)
    assert done.loss_after != done.loss_before
    for number in (f"gain {result.gain:.4f}", f"forgetting {result.forgetting:+.4f}", f"{done.loss_after:.4f} after"):
        assert number in done.card
    assert hub.repos["me/run"].commits[done.commit]["map.png"].startswith(b"\x89PNG")
    whole = load_grown(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "run/adapter")
    assert torch.equal(logits(loaded), logits(with_banks_in(whole, torch.bfloat16)))


@pytest.mark.slow
def test_a_later_round_alone_is_none(ran):
    with pytest.raises(ValueError, match="give the folder that holds all"):
        push(ran[0] / "run/adapter/round-2", "me/run", dry_run=True)


@pytest.mark.slow
def test_shrunk_on_the_way(hub, ran):
    """As shrink_adapter does it; the folder and the base stay as they were."""
    folder, result = ran
    base, files = AutoModelForCausalLM.from_pretrained(folder / "base"), contents(folder / "run")
    done = push(folder / "run", "me/run", shrink=4, model=base, heldout=corpora()["heldout"])
    assert contents(folder / "run") == files
    assert "default: 4 bits" in done.card
    assert done.loss_after - result.after["heldout"] < 0.05
    loaded = load_grown(base, "me/run")
    assert all(config.shrunk for config in loaded.peft_config.values())
    plain = push(folder / "run", "me/run", dry_run=True)
    assert done.files[FILE] < 0.8 * plain.files[FILE]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_revision_is_what_it_was(hub, ran):
    """By a commit's hash and by a branch; a later push takes rounds away that it has not."""
    folder, _ = ran
    first = push(folder / "run", "me/run")
    branch = push(folder / "run", "me/run", dtype="float32", revision="exact")
    alone = folder / "alone"
    load_grown(
        AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "run/adapter", ["default"]
    ).save_pretrained(alone)
    last = push(alone, "me/run")
    assert len({first.commit, branch.commit, last.commit}) == 3
    assert not any(name.startswith("round-2/") for name in hub.repos["me/run"].commits[last.commit])
    exact = logits(load_grown(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "run/adapter"))
    for revision, names in (
        (first.commit, ["default", "round-2"]),
        ("exact", ["default", "round-2"]),
        (None, ["default"]),
    ):
        loaded = load_grown(AutoModelForCausalLM.from_pretrained(folder / "base"), "me/run", revision=revision)
        assert list(loaded.peft_config) == names
        assert torch.equal(logits(loaded), exact) == (revision == "exact")


@pytest.mark.slow
def test_a_broken_upload_is_gone_on_with(hub, ran):
    """The second of two files is cut in its middle: nothing is there to load, and the same call sends only that one."""
    folder, _ = ran
    first = folder / "run/adapter" / FILE
    hub.cut = f"round-2/{FILE}"
    with pytest.raises(ConnectionError, match="only what is missing"):
        push(folder / "run/adapter", "me/run", dtype="float32")
    assert list(hub.repos["me/run"].commits[hub.repos["me/run"].branches["main"]]) == [".gitattributes"]
    sent = list(hub.uploads)
    assert hub.stored[sent[0]] is not None
    hub.cut = None
    done = push(folder / "run/adapter", "me/run", dtype="float32")
    assert not set(sent) & set(hub.uploads[len(sent) :])
    assert sorted(hub.uploads) == sorted(set(hub.uploads))
    pushed = hub.repos["me/run"].commits[done.commit]
    assert len(pushed[FILE]) == first.stat().st_size
    asked = len(hub.asked)
    assert push(folder / "run/adapter", "me/run", dtype="float32").commit == done.commit
    assert not any(line.startswith("PUT") for line in hub.asked[asked:])


def test_large_files_go_in_parts(hub, tmp_path):
    """As the Hub asks of files beyond 5 GB."""
    hub.part = 4096
    grown(tmp_path / "adapter", build())
    done = push(tmp_path / "adapter", "me/parts", dtype="float32")
    size = (tmp_path / "adapter" / FILE).stat().st_size
    parts = [line for line in hub.asked if re.fullmatch(r"PUT /lfs/\w+/\d+", line)]
    assert size > hub.part
    assert len(parts) == -(-size // hub.part)
    assert not hub.parts
    assert len(hub.repos["me/parts"].commits[done.commit][FILE]) == size
