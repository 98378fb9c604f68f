"""The seal of a packed checkpoint: digests of its tensors and of its config.json, which stand in the latter.

What is digested is what lies in the files, whatever dtype or devices it is loaded to. All tensors count, and all that
config.json says: bytes, names, shapes, forms and settings belong together, and none changes unnoticed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

AGAIN = "copy it again from where it was saved"
# hashing lets other threads run; each holds one tensor
THREADS = 4


def tensors_digest(tensors: Mapping[str, Callable[[], Tensor]]) -> str:
    """Of names, dtypes, shapes and bytes, in any order. About 0.7 GB a second and core."""

    def line(name: str) -> str:
        tensor = tensors[name]().detach().cpu().contiguous()
        held = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {held}\n"

    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256("".join(pool.map(line, sorted(tensors))).encode()).hexdigest()


def facts_digest(config: Mapping[str, Any]) -> str:
    """Of what a config.json says, but for its own digest and for where code of its own lies."""
    # with the digest of the tensors, so that no other tensors go with it
    held = {name: value for name, value in config["quantization_config"].items() if name != "facts"}
    rest = {name: value for name, value in config.items() if name != "auto_map"}
    return hashlib.sha256(json.dumps(rest | {"quantization_config": held}, sort_keys=True).encode()).hexdigest()


def verify(files: Iterable[str], tensors: str | None, facts: str | None) -> None:
    """Raise ValueError unless the files of a checkpoint, and the config.json beside them, have these digests."""
    paths = [Path(file) for file in files]
    folder = paths[0].parent
    if not isinstance(tensors, str) or not isinstance(facts, str):
        raise ValueError(
            f"the packed checkpoint in {folder} has no seal, by which a change of its files would be noticed: its "
            f"config.json was altered, or an early version of peft_pcgrow wrote it; {AGAIN}, or pack the model again"
        )
    if any(path.suffix != ".safetensors" for path in paths):
        raise ValueError(f"packed checkpoints are safetensors files, and {paths[0].name} is none: {AGAIN}")
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        same = facts_digest(held) == facts
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the packed checkpoint in {folder} has no config.json to check ({error}): {AGAIN}") from error
    if not same:
        raise ValueError(
            f"{folder / 'config.json'} is not what was saved with these packed experts: {AGAIN}. A setting can be "
            "changed by a keyword of from_pretrained, or on the loaded model, which save_pretrained writes anew"
        )
    with ExitStack() as opened:
        found: dict[str, Callable[[], Tensor]] = {}
        for path in paths:
            file: Any = opened.enter_context(safe_open(path, "pt"))
            found |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118 (no dict)
        if tensors_digest(found) != tensors:
            raise ValueError(
                f"the tensors in {folder} are not those that this config.json was saved with: a file was altered, is "
                f"missing, or is another checkpoint's; {AGAIN}"
            )
