"""Whether what becomes a node is its weights alone: banks copy those, and nothing else that a module does.

Weights that a hook computes from others, hooks and forwards of somebody's own, and memory that two layers share would
all be lost, or written twice, without an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.host import BITSANDBYTES, HOOK, OLD_FORWARD, gathers, loaded, plain_forwards
from peft_pcgrow.settling.conditions import own_hooks

# what torch's own tools leave beside a weight that they compute anew at every call, and what takes them off
_COMPUTED = {
    "_mask": "torch.nn.utils.prune.remove(module, {name!r})",
    "_g": "torch.nn.utils.remove_weight_norm(module, {name!r})",
    "_u": "torch.nn.utils.remove_spectral_norm(module, {name!r})",
}


def why_computed(module: Any, names: Iterable[str]) -> str | None:
    """Why one of a module's weights `names` is none of its parameters: something computes it at every call."""
    for name in names:
        if name in module._parameters or not isinstance(getattr(module, name, None), Tensor):
            continue
        held = {**module._parameters, **module._buffers}
        made = next((way for end, way in _COMPUTED.items() if f"{name}{end}" in held), None)
        if made is not None:
            left = ", ".join(other for other in held if other.startswith(f"{name}_"))
            return f"its {name} is computed from other tensors ({left}) at every call: {made.format(name=name)} first"
        return f"its {name} is no parameter: make it one, module.{name} = nn.Parameter(module.{name}.detach().clone())"
    return None


def why_hooked(module: Any) -> str | None:
    """What else runs when a module is called, which grown copies of its weights would not."""
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    if own := [key for key in own_hooks(hooks) if not gathers(hooks[key])]:
        named = getattr(hooks[own[0]], "__qualname__", None) or type(hooks[own[0]]).__name__
        return (
            f"it has a forward hook ({named}), which grown copies of its weights would not run: remove it by its "
            "handle, or put it on the block around it"
        )
    return None


def why_own_forward(layer: Any) -> str | None:
    """Why a linear layer computes something else than its architecture has it compute."""
    kind = type(layer)
    # accelerate's hooks run what was there before them
    replaced = layer.__dict__.get(OLD_FORWARD if hasattr(layer, HOOK) else "forward")
    if replaced is not None and getattr(replaced, "__func__", None) is not kind.forward:
        return "its forward was replaced, which grown copies of its weights would not run: delete that attribute"
    if kind.forward in plain_forwards():
        return None
    return f"{kind.__name__} has a forward of its own, which grown copies would not run"


def check_unshared(model: nn.Module, holders: Mapping[str, Sequence[nn.Module]]) -> None:
    """Raise ValueError, naming both, if weights of nodes lie in the same memory as others, or over themselves: whoever
    writes the ones (merging, packing) writes the others too, and what is measured of the ones is missing of the others.

    Modules that a model knows by two names are used once, unless these names tell different layers.

    Args:
        holders: of each layer's nodes, by name, the modules that hold their weights.
    """
    nodes = {id(inner) for held in holders.values() for module in held for inner in module.modules()}
    spans: dict[tuple[Any, ...], tuple[torch.device, int, int, str, bool]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        place = tuple(part for part in path.split(".") if part.isdigit())
        for name, tensor in module._parameters.items():
            span = None if tensor is None else _span(tensor)
            if tensor is None or span is None:
                continue
            label = f"{path}.{name}"
            if id(module) in nodes and span[1] - span[0] < tensor.numel() * tensor.element_size():
                raise ValueError(
                    f"{label} lies over itself: its {tensor.numel()} numbers are stored as fewer (by expand(), for "
                    f"example), and cannot change one by one. Copy it: nn.Parameter(module.{name}.detach().clone())"
                )
            spans.setdefault((id(module), name, place), (tensor.device, *span, label, id(module) in nodes))
    before: tuple[torch.device, int, int, str, bool] | None = None
    for each in sorted(spans.values(), key=lambda each: (str(each[0]), each[1], not each[4])):
        if before is not None and before[0] == each[0] and each[1] < before[2] and (before[4] or each[4]):
            raise ValueError(
                f"{before[3]} and {each[3]} are the same weights, in one memory: nodes of one layer cannot be grown, "
                "measured or packed without those of the other. Untie them: give one layer a copy, "
                "copy.deepcopy(module)"
            )
        # the one that reaches furthest; of several over the same, one that is a node
        if before is None or before[0] != each[0] or (each[2], each[4]) > (before[2], before[4]):
            before = each


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """The addresses from and up to which a tensor lies; None where it has none."""
    known = type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, loaded(BITSANDBYTES))
    if tensor.is_meta or not tensor.numel() or not known:
        return None
    start = tensor.data_ptr()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (start, start + reach * tensor.element_size()) if start else None
