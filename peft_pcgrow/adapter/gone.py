"""Settings that version 0.1 had: what takes their place, and where they had no effect and may stand."""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

RULE = "choose nodes by a rule of your own, locus=peft_pcgrow.choose({}, budget, layers=emap.layers)"
# fields: the value that did nothing, and what takes the place of others
FIELDS = {
    "max_per_layer": (None, RULE.format("scores")),
    "cost_weight": (0.0, "to keep steps short, say which layers may grow, layers_to_transform="),
    "block": (16, "blocks of neurons were removed: resolution='matrix' grows single matrices"),
    "settle_tol": (0.01, "it was of settle='relax', which no longer trains: leave it out"),
}
# of fields that are still there, values that are not
VALUES = {
    "select": {
        "joint": "use select='removable'",
        "square": RULE.format("emap.square"),
        "coherent": RULE.format("emap.coherent"),
        **dict.fromkeys(("lowest", "contested", "separable"), RULE.format("scores") + ", as examples/donors.py does"),
    },
    "resolution": {"neurons": "resolution='matrix' grows single matrices"},
    "settle": {"relax": "it no longer trains; settle='sweep' has the same gradients"},
}
C = TypeVar("C", bound=type)


def without_gone(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as this version has them.

    In the config of an adapter that was made already, what chose its nodes has no effect any more, and is dropped.

    Raises:
        ValueError: one that is gone and has an effect; the text names what takes its place.
    """
    made = bool(given.get("base")) and bool(given.get("locus"))
    kept = {name: value for name, value in given.items() if name not in FIELDS}
    if made and given.get("resolution") == "neurons":
        raise ValueError(
            "resolution='neurons': this adapter holds blocks of neurons, which were removed: merge or export it with "
            "version 0.1, or grow anew with resolution='matrix'"
        )
    if made and _gone("settle", given.get("settle")):
        text = (
            "this adapter was made with settle='relax', which no longer trains: from now on it trains by settle='sweep'"
        )
        warnings.warn(text, stacklevel=4)
        kept["settle"] = "sweep"
    if made:
        return kept | ({"select": None} if _gone("select", given.get("select")) else {})
    for name, (idle, instead) in FIELDS.items():
        if (value := given.get(name, idle)) != idle or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} was removed after version 0.1: {instead}")
    for name in VALUES:
        if instead := _gone(name, given.get(name)):
            raise ValueError(f"{name}={given[name]!r} was removed after version 0.1: {instead}")
    return kept


def knows_gone(config: C) -> C:
    """A dataclass that is also made of settings of version 0.1 (see `without_gone`)."""
    make: Callable[..., None] = config.__init__

    @wraps(make)
    def init(self: Any, *args: Any, **given: Any) -> None:
        make(self, *args, **without_gone(given))

    config.__init__ = init
    return config


def _gone(name: str, value: Any) -> str | None:
    return VALUES[name].get(value) if isinstance(value, str) else None
