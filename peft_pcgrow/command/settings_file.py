"""Arguments of a command from a YAML file, by the names that they have in Python."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in one respect: 1e-3 is a number, which 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_settings(path: Path, known: Sequence[str], elsewhere: Mapping[str, str | None]) -> dict[str, Any]:
    """What a file sets.

    Args:
        known: names that it may set. elsewhere: others, and the options in their place (None: there is none).

    Raises:
        ValueError: no YAML, no mapping, or a name that is not `known`; the nearest one is named.
        OSError: the file cannot be read.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}: give names and values, such as budget: 0.2")
    for name in given:
        if name in elsewhere:
            option = elsewhere[name]
            why = f"is an option of the command: give {option}" if option else "is for Python only: leave it out"
            raise ValueError(f"{path} sets {name}, which {why}")
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ValueError(f"{path} sets {name}, which is no argument: {hint}")
    return given
