"""Bring settings to plain Python values, whatever they come from: numpy, torch, OmegaConf, YAML, a command line."""

import json
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """`value` with mappings as dicts, other collections as lists (sets sorted), and numbers as Python's own."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(held) for key, held in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=str)
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [plain(held) for held in value]
    return value


def number(value: Any) -> Any:
    """`value` as a number if it is one, or a text that writes one; as it is otherwise."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def whole(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """`value` as a whole number; raises ValueError, naming it, if it is none from `least` to `most`."""
    found = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return found


def flag(name: str, value: Any) -> bool:
    """`value` as True or False; raises ValueError, naming it, if it is neither."""
    found = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return found


def text(name: str, value: Any) -> str | None:
    """A text or None; raises ValueError, naming it, if it is neither."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be a text or None, got {value!r}")
    return value


def names(name: str, value: Any) -> list[str] | None:
    """A list of texts, or None; one text is a list of it. Raises ValueError, naming it, if it is something else."""
    found = [value] if isinstance(value, str) else value
    if found is not None and not (isinstance(found, list) and all(isinstance(held, str) and held for held in found)):
        raise ValueError(f"{name} must be a list of names or None, got {value!r}")
    return found


def wholes(name: str, value: Any) -> list[int]:
    """A list of whole numbers, 0 or more; one is a list of it. Raises ValueError, naming it, for anything else."""
    if isinstance(value, (dict, type(None))):
        raise ValueError(f"{name} must be a whole number or a list of them, got {value!r}")
    return [whole(name, held, 0) for held in (value if isinstance(value, list) else [value])]


def dictionary(name: str, value: Any) -> dict[str, Any] | None:
    """A dict as JSON gives it back, or None; raises ValueError, naming it, if it is neither."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping or None, got {value!r}")
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"{name} holds what cannot be saved ({error})") from None


def refuse_gone(function: str, given: Mapping[str, Any], gone: Mapping[str, str]) -> None:
    """TypeError for keyword arguments that a function does not take, with what to do instead of those it once took."""
    for name in given:
        if name in gone:
            raise TypeError(f"{function}({name}=...) is gone: {gone[name]}")
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def token_indices(name: str, value: Any) -> Any:
    """Lists of tokens, by the name of an embedding or of the one there is, or None."""
    if isinstance(value, dict):
        names(name, list(value))
        return {module: wholes(name, tokens) for module, tokens in value.items()}
    return None if value is None else wholes(name, value)
