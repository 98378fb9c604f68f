"""Whether two descriptions (see `identity.describe_base`) are of one base model, and in what they differ."""

from collections.abc import Mapping
from typing import Any

# what descriptions of one model agree in
SAME = ("model_type", "nodes", "layers", "experts", "shapes")
# fingerprints of weights, by the half precision that they were rounded to; unknown where a base cannot tell
WEIGHTS = ("routers", "stacks")
NAMED = {"routers": "routers' weights", "stacks": "experts' weights"}
SHOWN = 120


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What is known to differ, in words; empty if nothing is."""
    unlike = [key for key in SAME if one.get(key) != other.get(key)]
    found = [f"{key}: {_short(one.get(key))} against {_short(other.get(key))}" for key in unlike]
    return ", ".join([*found, *(f"other {NAMED[key]} ({key})" for key in other_weights(one, other))])


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of models with the same experts, as far as is known."""
    return not difference(one, other)


def other_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Which of `WEIGHTS` are known to differ."""
    return [key for key in WEIGHTS if _known_to_differ(one.get(key), other.get(key))]


def _known_to_differ(one: Any, other: Any) -> bool:
    # a plain hash is one of bf16
    one, other = ({"bfloat16": hashed} if isinstance(hashed, str) else hashed or {} for hashed in (one, other))
    common = one.keys() & other.keys()
    return bool(common) and all(one[key] != other[key] for key in common)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
