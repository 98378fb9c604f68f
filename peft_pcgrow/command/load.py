"""A model and its tokenizer, from the Hub or a folder."""

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
        dtype: of `DTYPES`. device: as for `usable_device`.
    """
    where = usable_device(device)
    load_config(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise Unusable(f"{name} cannot be loaded as a causal LM: {_first_line(error)}") from error
    return model.to(where), tokenizer


def usable_device(name: str) -> torch.device:
    """A device that tensors can be made on. "auto": a GPU if there is one, else the CPU."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=found if name == "auto" else name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise Unusable(f"device {name!r} cannot be used ({_first_line(error)}): give cpu, or auto") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
