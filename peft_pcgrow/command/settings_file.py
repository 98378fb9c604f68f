"""Arguments of a command from a YAML file, by the names that they have in Python."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def read_settings(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """What a file sets.

    Raises:
        ValueError: no YAML, no mapping, or a name that is not `known`; the nearest one is named.
        OSError: the file cannot be read.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}: give names and values, such as budget: 0.2")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ValueError(f"{path} sets {name}, which is no argument: {hint}")
    return given
