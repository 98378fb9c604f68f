"""A folder with tensors and the facts about them, written all or nothing and read with a checksum."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT = 2
TENSORS, FACTS = "error_map.safetensors", "error_map.json"


def write(target: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Raises FileExistsError if `target` is a file."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; an error map is saved as a folder, give another name")
    blob = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    noted = {"format": FORMAT, **facts, "sha256": hashlib.sha256(blob).hexdigest()}
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        (staging / TENSORS).write_bytes(blob)
        (staging / FACTS).write_text(json.dumps(noted, indent=2) + "\n")
        target.mkdir(exist_ok=True)
        # tensors first: an interruption leaves a checksum that does not fit, which `read` reports
        for name in (TENSORS, FACTS):
            (staging / name).replace(target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote.

    Raises:
        FileNotFoundError: no map there. ValueError: truncated, altered or of an unknown format.
    """
    if not all((folder / name).is_file() for name in (FACTS, TENSORS)):
        raise FileNotFoundError(f"no error map in {folder}: expected {FACTS} and {TENSORS} there")
    blob = (folder / TENSORS).read_bytes()
    try:
        facts = json.loads((folder / FACTS).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(damaged(folder, f"{FACTS} is not JSON: {error}")) from error
    if not isinstance(facts, dict):
        raise ValueError(damaged(folder, f"{FACTS} holds no object"))
    if facts.get("format") != FORMAT:
        found = facts.get("format")
        raise ValueError(
            f"the error map in {folder} has format {found!r}; this version reads {FORMAT}: measure it again"
        )
    if hashlib.sha256(blob).hexdigest() != facts.get("sha256"):
        raise ValueError(damaged(folder, f"{TENSORS} does not have the checksum noted beside it"))
    try:
        return load(blob), facts
    except SafetensorError as error:
        raise ValueError(damaged(folder, f"missing or unreadable entry: {error}")) from error


def damaged(folder: Path, why: str) -> str:
    return f"the error map in {folder} is damaged ({why}); measure it again"
