"""A map's folder: one file of tensors and the facts about them, replaced as a whole and read with one checksum."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from peft_pcgrow.files import write_whole
from peft_pcgrow.maps.map_check import check_map

MAP_FORMAT = 4
FILE = "error_map.safetensors"
# where format 2 kept its facts
OLD = "error_map.json"


def write(target: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Whoever reads meanwhile, or after an interruption, finds the map from before or this one.

    Raises FileExistsError if `target` is a file, ValueError for facts that are no JSON, such as NaN.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; an error map is saved as a folder, give another name")
    text = json.dumps({"format": MAP_FORMAT, **facts}, allow_nan=False)
    header, body = _split(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    noted = {"facts": text, "sha256": _digest(text, header, body)}
    head = json.dumps({"__metadata__": noted, **header}).encode()
    head += b" " * (-len(head) % 8)
    write_whole(target / FILE, len(head).to_bytes(8, "little") + head, body)
    (target / OLD).unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote.

    Raises:
        FileNotFoundError: no map there. ValueError: truncated, altered, of an unknown format, or no error map.
    """
    if not exists(folder):
        raise FileNotFoundError(f"no error map in {folder}: expected {FILE} there")
    blob = (folder / FILE).read_bytes()
    try:
        header, body = _split(blob)
        noted = header.pop("__metadata__", None) or {}
        facts = json.loads(noted["facts"], parse_constant=_no_number) if "facts" in noted else {"format": 2}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(damaged(folder, f"{FILE} does not begin with a readable header: {error}")) from error
    found = facts.get("format") if isinstance(facts, dict) else facts
    if found != MAP_FORMAT:
        raise ValueError(
            f"the error map in {folder} has format {found!r}; this version reads {MAP_FORMAT}: measure it again"
        )
    if _digest(noted["facts"], header, body) != noted.get("sha256"):
        raise ValueError(damaged(folder, f"{FILE} does not have the checksum noted in it"))
    try:
        tensors = load(blob)
        check_map(tensors, facts)
    except (SafetensorError, ValueError) as error:
        raise ValueError(damaged(folder, str(error))) from error
    return tensors, facts


def damaged(folder: Path, why: str) -> str:
    return f"the error map in {folder} is damaged ({why}); measure it again"


def _split(blob: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header of a safetensors file, and what follows."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("it is no object")
    return header, memoryview(blob)[8 + size :]


def _digest(text: str, header: Mapping[str, Any], body: memoryview) -> str:
    digest = hashlib.sha256(f"{text}\n{json.dumps(header, sort_keys=True)}\n".encode())
    digest.update(body)
    return digest.hexdigest()


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
