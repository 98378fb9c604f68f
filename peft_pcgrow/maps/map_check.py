"""What a map's file must hold, whoever wrote it: names, types and shapes that belong together."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.gates.gate import RATES

SUMS = ("count", "weight", "mass", "square")
COUNTS = ("labels", "tokens", "batches")
# shapes of the other tensors: L layers, E experts, N newborns, A of both, R rates, F folds; another letter is any size
SHAPES = {
    "fold_labels": "F",
    "shared": "AA",  # unread, of version 0.1
    "hops": "ab",
    "words": "V",
    "gradient.*": "FLEab",
    "newborns.gradient.*": "FNab",
    "separation.direction": "LH",
    "separation.law": "L4",
    "separation.threshold": "LR",
    "separation.recall": "LER",
    "separation.false_positive": "LER",
    "separation.domain_rows": "LE",
    "separation.retain_rows": "LE",
    "separation.moment.*": "LEID",
    "separation.trace.*": "LE",
    "separation.entry.direction": "LH",
    "separation.entry.law": "L4",
    "separation.entry.threshold": "LR",
    "separation.newborns.recall": "NR",
    "separation.newborns.false_positive": "NR",
    "separation.newborns.domain_rows": "N",
    "separation.newborns.retain_rows": "N",
    **dict.fromkeys(SUMS, "LE"),
    **{f"newborns.{name}": "N" for name in SUMS},
}
# what is there in every map, with newborns, and where there is retain text
ALWAYS = (*SUMS, "fold_labels")
WITH_NEWBORNS = tuple(f"newborns.{name}" for name in SUMS)
WITH_RETAIN = tuple(
    name for name in SHAPES if name.startswith("separation.") and "*" not in name and "newborns" not in name
)


def check_map(tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Raise ValueError, naming the entry, unless tensors and facts are those of one map."""
    if not isinstance(facts, Mapping):
        raise ValueError(f"a map's facts must be named, got {facts!r:.80}")
    held = {name: tensor for name, tensor in tensors.items() if name.startswith("heldout.")}
    if "heldout" in facts:
        check_map({name.removeprefix("heldout."): tensor for name, tensor in held.items()}, facts["heldout"])
        tensors = {name: tensor for name, tensor in tensors.items() if name not in held}
    layers, born, separation = facts.get("layers"), facts.get("newborns", []), facts.get("separation")
    if not _whole_numbers(layers) or not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers must be whole numbers, each once, got {layers!r:.80}")
    for name in COUNTS:
        if not _whole_number(facts.get(name)):
            raise ValueError(f"{name} must be a whole number >= 0, got {facts.get(name)!r:.80}")
    loss = facts.get("loss")
    if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not math.isfinite(loss):
        raise ValueError(f"loss must be a number, got {loss!r:.80}")
    if not isinstance(facts.get("run", {}), Mapping):
        raise ValueError(f"run must name what was asked for, got {facts['run']!r:.80}")
    experts = tensors["count"].shape[-1] if "count" in tensors and tensors["count"].dim() == 2 else 0
    _check_newborns(born, layers, experts)
    _check_base(facts.get("base"))
    if separation is not None:
        _check_separation(separation)
    for name in (*ALWAYS, *(WITH_NEWBORNS if born else ()), *(WITH_RETAIN if separation is not None else ())):
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
    sizes = {"L": len(layers), "E": experts, "N": len(born), "A": len(layers) * experts + len(born), "4": 4}
    sizes |= {"R": len(RATES)}
    if any("gradient." in name for name in tensors):
        sizes["F"] = len(tensors["fold_labels"])
    stacks = facts["base"].get("shapes", {}).keys() & facts["base"].get("layouts", {}).keys()
    for name, tensor in tensors.items():
        path, _, stack = name.rpartition(".")
        letters = SHAPES.get(name) or SHAPES.get(f"{path}.*")
        if letters is None or (name.startswith("separation.") and separation is None):
            raise ValueError(f"tensor {name} belongs to no map")
        if path.endswith("gradient") and stack not in stacks:
            raise ValueError(f"base does not describe the stack of {name}")
        _check_shape(name, tensor, letters, sizes)
        # a gate that nothing passes has an infinite threshold
        broken = tensor.isnan() if name.endswith("threshold") else ~torch.isfinite(tensor)
        if bool(broken.any()):
            raise ValueError(f"tensor {name} has values that are not finite")
    moment, trace = ({n for n in tensors if n.startswith(f"separation.{kind}.")} for kind in ("moment", "trace"))
    if {name.replace("moment", "trace") for name in moment} != trace:
        raise ValueError("separation.moment and separation.trace are of different stacks")


def _check_newborns(nodes: Any, layers: list[int], experts: int) -> None:
    for node in nodes if isinstance(nodes, list) else [nodes]:
        layer, donor, adapter = node if isinstance(node, list) and len(node) == 3 else (None, None, None)
        if layer not in layers or not _whole_number(donor) or donor >= experts or not isinstance(adapter, str):  # type: ignore
            raise ValueError(f"newborns must be layer, donor and adapter of each, got {node!r:.80}")


def _check_base(base: Any) -> None:
    if not isinstance(base, Mapping):
        raise ValueError(f"base must describe the model, got {base!r:.80}")
    shapes, layouts = base.get("shapes", {}), base.get("layouts", {})
    for name, held in (("shapes", shapes), ("layouts", layouts)):
        if not isinstance(held, Mapping) or not all(isinstance(each, list) for each in held.values()):
            raise ValueError(f"base.{name} must list something for each stack, got {held!r:.80}")
    for stack, shape in shapes.items():
        if not _whole_numbers(shape) or not 1 <= len(shape) <= 2 or 0 in shape:
            raise ValueError(f"base.shapes of {stack} must be one or two sizes, got {shape!r:.80}")
    for stack, layout in layouts.items():
        axis, copies, turns = layout if len(layout) == 3 else (0, 0, 0)
        known = axis in (None, 0, 1) and axis is not False and axis is not True
        if not known or copies not in (1, 2) or isinstance(copies, bool) or not isinstance(turns, bool):
            raise ValueError(f"base.layouts of {stack} is no layout: {layout!r:.80}")
    vocabulary, kind = base.get("vocabulary"), base.get("model_type", "")
    if vocabulary is not None and (not _whole_number(vocabulary) or not vocabulary):
        raise ValueError(f"base.vocabulary must be a number of words, got {vocabulary!r:.80}")
    if not isinstance(kind, str):
        raise ValueError(f"base.model_type must be a name, got {kind!r:.80}")


def _check_separation(facts: Any) -> None:
    if not isinstance(facts, Mapping):
        raise ValueError(f"separation must hold facts, got {facts!r:.80}")
    for name in ("window", "sketch", "domain_tokens", "retain_tokens"):
        if not _whole_number(facts.get(name)):
            raise ValueError(f"separation.{name} must be a whole number >= 0, got {facts.get(name)!r:.80}")


def _check_shape(name: str, tensor: Tensor, letters: str, sizes: Mapping[str, int]) -> None:
    known = [sizes.get(letter) for letter in letters]
    fits = tensor.dim() == len(known) and all(size in (None, n) for size, n in zip(known, tensor.shape, strict=True))
    if not fits or not tensor.numel():
        raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, which does not fit the map's other entries")


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(_whole_number(value) for value in values)


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
