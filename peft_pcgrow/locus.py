"""The locus: the set of nodes chosen to change, as decoder layer -> experts, or down to parts of experts."""

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# how fine an adapter may choose: whole experts, or single matrices
RESOLUTIONS = ("expert", "matrix")
# nodes up to which a line names each
NAMED = 48


class Locus(Mapping[int, tuple[int, ...]]):
    """An immutable, sorted set of (layer, expert) nodes; `locus[layer]` gives the experts grown there.

    Layers are positions in the model's list of decoder layers (not ordinals among its MoE layers), so they mean
    the same for models whose first layers are dense.

    Args:
        nodes (Mapping): decoder layer, from 0 -> its experts, from 0, as numbers or as text (JSON's keys).
        name (str): what errors call it.

    Raises:
        ValueError: empty, or a layer or expert that is not a whole number >= 0, or a layer named twice.

    Example:
        >>> locus = Locus({2: [7], 1: [4, 0]})
        >>> locus.nodes
        [(1, 0), (1, 4), (2, 7)]
        >>> locus[1]
        (0, 4)
    """

    def __init__(self, nodes: Mapping, name: str = "locus"):
        if not isinstance(nodes, Mapping):
            raise ValueError(f"{name} must map layer -> [experts], got {nodes!r}; for example {{3: [0, 5], 4: [1]}}")
        chosen = {}
        for layer, experts in nodes.items():
            if isinstance(experts, (str, bytes)) or not isinstance(experts, Iterable):
                raise ValueError(f"layer {layer!r} in the {name} must list its experts, got {experts!r}")
            if isinstance(experts, Mapping):
                raise ValueError(
                    f"layer {layer!r} in the {name} must list its experts, which grow as a whole, got {experts!r}; to "
                    "grow parts of them, give parts={layer: {expert: [...]}} and resolution='matrix'"
                )
            if listed := list(experts):
                if (number := _whole(layer, "layer", f"the {name}")) in chosen:
                    raise ValueError(f"layer {number} is in the {name} twice: list its experts once")
                chosen[number] = tuple(sorted({_whole(e, "expert", f"the {name}") for e in listed}))
        if not chosen:
            raise ValueError(f"the {name} is empty ({nodes!r}): name at least one expert, or raise the budget")
        self._nodes = dict(sorted(chosen.items()))

    def __getitem__(self, layer: int) -> tuple[int, ...]:
        return self._nodes[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"Locus({self._nodes})"

    @property
    def nodes(self) -> list[tuple[int, int]]:
        """All (layer, expert) pairs, bottom layer first."""
        return [(layer, expert) for layer, experts in self._nodes.items() for expert in experts]

    def check(self, experts_at: Mapping[int, int]) -> None:
        """Raise ValueError unless every node exists in a model with `experts_at[layer]` experts per MoE layer."""
        for layer, experts in self._nodes.items():
            if layer not in experts_at:
                raise ValueError(
                    f"the locus names layer {layer}, which has no experts in this model; "
                    f"layers with experts: {_ranges(sorted(experts_at))}"
                )
            if experts[-1] >= experts_at[layer]:
                raise ValueError(
                    f"the locus names expert {experts[-1]} of layer {layer}, but this model has only "
                    f"{experts_at[layer]} experts there (0 to {experts_at[layer] - 1})"
                )

    def to_json(self) -> dict[str, list[int]]:
        return {str(layer): list(experts) for layer, experts in self._nodes.items()}

    def describe(self) -> str:
        """One line: `layer 3: 0 5 | layer 4: 1`; of many nodes, how many there are in each layer or in all."""
        if len(self.nodes) <= NAMED:
            return " | ".join(f"layer {layer}: {' '.join(map(str, experts))}" for layer, experts in self._nodes.items())
        counts = {layer: len(experts) for layer, experts in self._nodes.items()}
        least, most = min(counts.values()), max(counts.values())
        each = f"{most}" if least == most else f"{least} to {most}"
        return f"{len(self.nodes)} nodes, {each} in each of layers {_ranges(list(counts))}"


def read_parts(parts: Any, resolution: str) -> dict[str, dict[str, list[Any]]]:
    """Parts of experts, `{layer: {expert: [...]}}`, with sorted string keys and sorted lists, as JSON gives them back.

    Args:
        parts: lists name weight stacks.

    Raises:
        ValueError: whole experts have no parts, or a layer, expert, list or part that is none, empty or named twice.
    """
    if resolution == "expert":
        raise ValueError(
            f"parts={parts!r} chooses within experts, which resolution='expert' grows as a whole: use "
            "resolution='matrix', or locus= without parts="
        )
    example = "{3: {0: ['down_proj']}}"
    if not isinstance(parts, Mapping) or not parts:
        raise ValueError(f"parts must map layer -> expert -> [parts], for example {example}; got {parts!r}")
    chosen: dict[int, dict[int, list[Any]]] = {}
    for layer, experts in parts.items():
        if not isinstance(experts, Mapping) or not experts:
            raise ValueError(f"layer {layer!r} in parts must map experts to [parts], as in {example}; got {experts!r}")
        here = chosen.setdefault(_whole(layer, "layer", "parts"), {})
        for expert, listed in experts.items():
            number = _whole(expert, "expert", "parts")
            what = f"layer {layer}, expert {expert} in parts"
            if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable) or not (listed := list(listed)):
                raise ValueError(f"{what} must list at least one part, as in {example}; got {listed!r}")
            if unknown := [part for part in listed if not isinstance(part, str)]:
                raise ValueError(f"{what} must name weight stacks, as in {example}; got {unknown[0]!r}")
            if number in here or len(set(listed)) < len(listed):
                raise ValueError(f"{what} names a part twice, or is there twice: {listed!r}")
            here[number] = sorted(listed)
    return {str(layer): {str(e): chosen[layer][e] for e in sorted(chosen[layer])} for layer in sorted(chosen)}


def _whole(value: Any, what: str, where: str) -> int:
    # JSON turns the keys of an object into strings
    if isinstance(value, str):
        number = int(value) if value.isdecimal() and len(value) < 20 else -1
    else:
        number = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else -1
    if number < 0:
        raise ValueError(f"{what} {value!r} in {where} is not a whole number >= 0")
    return number


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"
