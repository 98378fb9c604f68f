"""examples/recipes: each runs as it is, with the real packages, and so does its LoRA twin."""

import ast
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
EMBEDDED = RECIPES.parent / "embedded-moe"
# what the model's own folder lacks: how a talk is written, with the marks of what the assistant says
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Answer: "
    "{% generation %}{{ message.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}Question: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer: {% endif %}"
)
# recipe -> the data that it takes, and further arguments
GIVEN: dict[str, tuple[list[str], list[str]]] = {
    "trainer": (["texts"], []),
    "accelerate_loop": (["texts"], []),
    "sft": (["talks"], []),
    "dpo": (["preferences"], []),
    "grpo": (["prompts"], ["--tokens", "8"]),
    "four_bit": (["texts"], []),
    "lora_beside": (["texts"], []),
    "three_domains": (["names", "reversed", "texts"], []),
}
NEEDS = {"sft": "trl", "dpo": "trl", "grpo": "trl", "four_bit": "bitsandbytes"}
NAMED = [(name, " ".join(topics[name].split())[:200]) for name in sorted(topics)[:24]]
TALKS = [
    [{"role": "user", "content": f"What is {name}?"}, {"role": "assistant", "content": text[:120]}]
    for name, text in NAMED
]
WORSE = [[talk[0], {"role": "assistant", "content": talk[1]["content"][::-1]}] for talk in TALKS]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with the model, and data sets of every kind that recipes take, of Python's language reference."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    # many CPUs take ten times as long for 16 bit
    AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).save_pretrained(folder / "model")
    rows = {
        "texts": [{"text": text} for _, text in NAMED],
        "names": [{"text": f"{name.upper()} " * 8} for name, _ in NAMED[:12]],
        "reversed": [{"text": text[:100:-1]} for _, text in NAMED[:12]],
        "retain": [{"text": f"def {name}(self): return self.{name}[{len(text)}]\n" * 6} for name, text in NAMED],
        "talks": [{"messages": talk} for talk in TALKS],
        "preferences": [{"chosen": good, "rejected": bad} for good, bad in zip(TALKS, WORSE, strict=True)],
        "prompts": [{"prompt": text[:60]} for _, text in NAMED],
    }
    for name, each in rows.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return folder


def loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """The mean of the texts' own, without a gradient."""
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts[:8]]
    with torch.no_grad():
        return sum(float(model(input_ids=row, labels=row).loss) for row in rows) / len(rows)


def falls(recipe: str, tokenizer: Any) -> Callable[[Any], float]:
    """What training lowers."""
    texts = [text for _, text in NAMED]
    good, bad = ([tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks] for talks in (TALKS, WORSE))
    return {
        "sft": lambda model: loss(model, tokenizer, good),
        "dpo": lambda model: loss(model, tokenizer, good) - loss(model, tokenizer, bad),
    }.get(recipe, lambda model: loss(model, tokenizer, texts))


@pytest.mark.slow
@pytest.mark.parametrize("twin", [False, True], ids=["grown", "lora"])
@pytest.mark.parametrize("recipe", GIVEN)
def test_recipe(recipe, twin, given, tmp_path, monkeypatch):
    """It trains what it is about, and saves that; so does its twin."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip(NEEDS.get(recipe, "accelerate"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data, more = GIVEN[recipe]
    told = ["--model", given / "model", "--data", *(given / name for name in data), *more]
    told += ["--retain", given / "retain"] if recipe == "three_domains" else []
    told += ["--steps", 4, "--lr", 1e-3, "--out", tmp_path / "out", *(["--lora"] if twin else [])]
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, told)])
    monkeypatch.chdir(tmp_path)
    left = runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")

    # of 4 bits in training mode: on some CPUs bitsandbytes' own inference does not take layers this narrow
    model = (left["trainer"].model if "trainer" in left else left["model"]).train(recipe == "four_bit")
    if recipe == "grpo":  # four steps of a reward lower nothing for sure
        assert all(bool(p.grad is None) for p in model.parameters())
        assert left["trainer"].state.log_history[0]["grad_norm"] > 0
    else:
        wanted = falls(recipe, left["tokenizer"])
        after = wanted(model)
        with model.disable_adapter():
            assert after < wanted(model)
    saved = sorted((tmp_path / "out").glob("**/adapter_config.json"))
    saved = [path for path in saved if "checkpoint" not in str(path)]
    assert len(saved) == (3 if recipe == "three_domains" else 1)
    kinds = {json.loads(path.read_text())["peft_type"].split(":")[0] for path in saved}
    assert kinds == {"LORA" if twin else "PCGROW"}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_twins_differ_by_their_config(recipe):
    """One question after `--lora` in a script of under 60 lines, and nothing but the config hangs on the answer."""
    source = (RECIPES / f"{recipe}.py").read_text()
    assert recipe in GIVEN
    assert len(source.splitlines()) < 60
    assert source.count("args.lora") == 1
    choices = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    (choice,) = (node for node in choices if ast.unparse(node.test) == "args.lora")
    for branch in (choice.body, choice.orelse):
        assert ast.unparse(branch[-1]).startswith("config = ")
