"""examples/recipes for engines: each runs as it is, in two processes, with the real packages."""

import importlib.util
import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, distributed

import fresh
from peft_pcgrow import PCGrowConfig
from tiny import LOCUS, build

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
EMBEDDED = RECIPES.parent / "embedded-moe"
WORDS = 4096
pytestmark = pytest.mark.cpu("processes meet over gloo")


@pytest.fixture
def given(tmp_path) -> Path:
    """A folder with a model, its tokenizer, an adapter and texts."""
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "model")
    build(vocab_size=WORDS).save_pretrained(tmp_path / "model")
    config = PCGrowConfig(locus=LOCUS, init_weights=False)
    get_peft_model(build(vocab_size=WORDS), config).save_pretrained(tmp_path / "adapter")
    texts = [json.dumps({"text": " ".join(topics[name].split())[:200]}) for name in sorted(topics)[:24]]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text("\n".join(texts))
    return tmp_path


needs_sizes = pytest.mark.skipif(
    "ep_size" not in distributed.DistributedConfig.__dataclass_fields__, reason="this transformers has no ep_size"
)


def assert_trained(given: Path) -> None:
    """What was saved is an adapter of its model with other weights than at birth."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given / "model"), str(given / "out"))
    layers = model.base_model.tuner_layers()
    assert layers
    for layer in layers:
        born = layer.donors(layer.births["default"])
        assert not all(torch.equal(bank, born[name]) for name, bank in layer.bank("default").items())


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero2(given):
    folders = ("--model", given / "model", "--data", given / "texts", "--out", given / "out")
    done = fresh.two(RECIPES / "deepspeed" / "train.py", *folders, "--steps", "2", forked=False, DS_ACCELERATOR="cpu")
    assert all(process.returncode == 0 for process in done), done[0].stderr[-3000:]
    assert_trained(given)


@needs_sizes
def test_expert_parallel_training(given):
    folders = ("--model", given / "model", "--data", given / "texts", "--out", given / "out")
    done = fresh.two(RECIPES / "expert_parallel" / "train.py", *folders, "--steps", "4", "--budget", "0.3")
    assert all(process.returncode == 0 for process in done), done[0].stderr[-3000:]
    assert "step 4: loss" in done[0].stdout
    assert_trained(given)


@needs_sizes
def test_expert_parallel_serving(given):
    """What two processes write together is what one writes with the adapter."""
    folders = ("--model", given / "model", "--adapter", given / "adapter", "--out", given / "merged")
    done = fresh.two(RECIPES / "expert_parallel" / "serve.py", *folders, "--tokens", "8")
    assert all(process.returncode == 0 for process in done), done[0].stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(given / "model")
    model = PeftModel.from_pretrained(build(vocab_size=WORDS), str(given / "adapter"))
    ids = tokenizer("The", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert done[0].stdout.strip().endswith(tokenizer.decode(written[0], skip_special_tokens=True).strip())
