"""A model and its tokenizer, from the Hub or a folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peft_pcgrow.command.fail import Unusable

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(name: str, revision: str | None) -> Any:
    """A model's config, without its weights."""
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise Unusable(f"no model at {name}: {_first_line(error)}") from error


def load_model(name: str, revision: str | None, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """A causal LM on a device, and its tokenizer.

    Args:
        dtype: of `DTYPES`. device: "auto": a GPU if there is one.
    """
    load_config(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise Unusable(f"{name} cannot be loaded as a causal LM: {_first_line(error)}") from error
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return model.to(where), tokenizer


def check_new(path: Path, what: str) -> Path:
    """A folder to write to: new, or empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Unusable(f"{what} {path} is not empty: give a new folder")
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
