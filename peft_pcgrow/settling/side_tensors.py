"""What decoder layers hand to each other beside the residual stream.

A router's state returned next to it (ZAYA), keys and values put into a mapping that later layers read (Gemma 4), the
outputs of all lower layers gathered into one tensor (Inkling 2): tensors among a layer's arguments that were made from
what earlier layers returned. Where they come from is autograd's to say: what a layer hands on is marked in the forward,
and the little code between two layers leaves a graph from these marks to the arguments of the layers above.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def tensors(held: Any, every: bool = False) -> Iterator[Tensor]:
    """The floating-point tensors (`every`: also others) in nested tuples, lists and mappings, in order."""
    if isinstance(held, Tensor):
        if every or held.is_floating_point():
            yield held
    elif isinstance(held, (tuple, list, Mapping)):
        for value in held.values() if isinstance(held, Mapping) else held:
            yield from tensors(value, every)


def swap(held: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with its floating-point tensors changed; mappings are copied, so that writes stay apart."""
    if isinstance(held, Tensor):
        return change(held) if held.is_floating_point() else held
    if isinstance(held, (tuple, list)):
        changed = [swap(value, change) for value in held]
        # a namedtuple takes its fields one by one
        return type(held)(*changed) if hasattr(held, "_fields") else type(held)(changed)
    if isinstance(held, MutableMapping):
        copied = copy.copy(held)
        for key, value in held.items():
            copied[key] = swap(value, change)
        return copied
    return held


def written(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(mapping, key) of what was put into mappings among keyword arguments since `before` was copied of them."""
    for name, held in after.items():
        if isinstance(held, MutableMapping):
            for key, value in held.items():
                old = before.get(name, {}).get(key, ())
                if [id(tensor) for tensor in tensors(old)] != [id(tensor) for tensor in tensors(value)]:
                    yield held, key


def trained_elsewhere(taken: Tensor, bottom: Tensor) -> bool:
    """Whether something that is neither a layer's output nor the residual stream's `bottom` trains through `taken`."""
    waiting, seen = [taken.grad_fn], set()
    if taken.grad_fn is None:
        return taken.requires_grad and taken is not bottom
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node is bottom.grad_fn or node.name() == "MarkBackward":
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None and leaf is not bottom:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
