"""Tiny random models in folders named as the ids that the suite asks the Hub for: the working directory comes first."""

import json
from pathlib import Path

import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tiny import ARCHITECTURES, COMMON, build

# the suite's tokens end below 300
SIZES = {"vocab_size": 1024, "max_position_embeddings": 512}
HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
QUOTES = "ybelkada/english_quotes_copy"
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"


def make(folder: Path, name: str, architecture: str, head: str = "CAUSAL_LM", **changes) -> None:
    """Write a tiny model and a tokenizer to `folder/name`.

    Args:
        architecture: one of `tiny.ARCHITECTURES`, or any other `model_type` of transformers.
        head: one of HEADS, with random weights, on the same model.
        changes: to the model's config.
    """
    if architecture in ARCHITECTURES:
        model = build(architecture, **{**SIZES, **changes})
    else:
        config = AutoConfig.for_model(architecture, **{**COMMON, **SIZES, **changes})
        model = AutoModelForCausalLM.from_config(config)
    if head != "CAUSAL_LM":
        backbone, model = model.model, getattr(transformers, HEADS[head]).from_config(model.config)
        getattr(model, model.base_model_prefix).load_state_dict(backbone.state_dict())
    model.save_pretrained(folder / name)
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=bytewise, model_max_length=64, **named).save_pretrained(folder / name)


def make_data(folder: Path) -> None:
    """What the suite reads besides models: a config of LoRA, and the columns of the texts that it trains on."""
    for name in (ADAPTER, QUOTES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(folder / ADAPTER)
    rows = ({"quote": " ".join(f"w{7 * i + j}" for j in range(9)), "author": "", "tags": [""]} for i in range(64))
    (folder / QUOTES / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
