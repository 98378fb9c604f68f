"""Run a decoder layer again, with the result that it had in the forward."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from peft_pcgrow.handover import swap, tensors, written
from peft_pcgrow.per_thread import PerThread

# what layers call their KV cache: transformers from 5.24 on, before, and of old
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class _Again(PerThread):
    """The layer that a thread is running again just now: stacks, of whichever model, must leave it alone."""

    layer: Any = None


_again = _Again()


@dataclass
class LayerRun:
    """How one decoder layer was called: enough to run it again with the same result.

    Attributes:
        origin: the input as it came, with its graph; x: the same without.
        extras: tensors among `args` and `kwargs` that other layers made, with their graphs.
        recorded: what transformers recorded inside it in the forward, an `inner_outputs.Recorded`.
        handed: what the layer handed on in the forward, by the number of its mark, its output first.
    """

    layer: Any  # an nn.Module
    index: int
    x: Tensor
    args: tuple
    kwargs: dict[str, Any]
    device_type: str
    autocast: dict[str, Any]
    cpu_rng: Tensor
    device_rng: tuple[list[int], list[Tensor]]
    origin: Tensor
    extras: list[Tensor]
    recorded: Any
    handed: dict[int, Tensor] = field(default_factory=dict)

    def again(self, x: Tensor, extras: Sequence[Tensor] = ()) -> list[Tensor]:
        """What the layer hands on for input `x`, its output first, under the recorded autocast and random state, and
        without a KV cache; `extras` take the places of the recorded ones."""
        given = {id(old): new for old, new in zip(self.extras, extras, strict=True)} if extras else {}
        args, kwargs = swap((self.args, self.kwargs), lambda held: given.get(id(held), held.detach()))
        before = swap(kwargs, lambda held: held)
        with ExitStack() as stack:
            devices = self.device_rng[0]
            stack.enter_context(torch.random.fork_rng(devices, device_type=self.device_type if devices else "cuda"))
            torch.set_rng_state(self.cpu_rng)
            if devices:
                set_device_states(*self.device_rng, device_type=self.device_type)
            for device_type, options in self.autocast.items():
                stack.enter_context(torch.autocast(device_type, **options))
            # a checkpoint inside the recomputation would only run the layer a third time
            checkpointing = getattr(self.layer, "gradient_checkpointing", False)
            inside = stack.enter_context(self.recorded.again())
            try:
                if checkpointing:
                    self.layer.gradient_checkpointing = False
                _again.layer = self.layer
                # hooks of the layer have seen what it takes and returns, and what they made of it has a graph
                output = self.layer.forward(x, *args, **kwargs)
                return [hidden_of(output, self.layer), *handed_beside(output, before, kwargs), *inside()]
            finally:
                _again.layer = None
                if checkpointing:
                    self.layer.gradient_checkpointing = True


@cache
def _parameters(kind: type) -> tuple[str, ...]:
    """Names of what a class of layers can be given by position after the residual stream."""
    named = list(inspect.signature(kind.forward).parameters.values())[2:]  # type: ignore[attr-defined]
    return tuple(each.name for each in named if each.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD)


def by_name(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A layer's arguments, with all but the first by name; GPT-2's get their cache and mask by position."""
    names = _parameters(type(layer)) if len(args) > 1 else ()
    if len(names) < len(args) - 1:
        return args, kwargs
    return args[:1], {**dict(zip(names, args[1:], strict=False)), **kwargs}


def is_recomputed(layer: nn.Module) -> bool:
    """Whether this thread is running a layer again just now."""
    return _again.layer is layer


def record(
    layer: nn.Module,
    index: int,
    x: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    extras: list[Tensor],
    recorded: Any,
) -> LayerRun:
    device_type = x.device.type
    autocast = {
        kind: {
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in {device_type, "cpu"}
    }
    device_rng = get_device_states(x) if device_type not in ("cpu", "meta") else ([], [])
    cpu_rng = torch.get_rng_state()
    rng = cpu_rng, device_rng
    return LayerRun(layer, index, x.detach(), args, kwargs, device_type, autocast, *rng, x, extras, recorded)


def refuse_filled_cache(kwargs: dict[str, Any]) -> None:
    for name in CACHES:
        cache: Any = kwargs.get(name)
        if hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0:
            raise ValueError(
                f"settling cannot train behind a filled KV cache ({name} holds {cache.get_seq_length()} "
                "positions): pass the whole sequence, or use PCGrowConfig(settle='backprop')"
            )


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """For the recomputation: with the KV cache, a layer would append its keys a second time and attend to both."""
    changed: dict[str, Any] = {name: None for name in CACHES if kwargs.get(name) is not None}
    if kwargs.get("use_cache"):
        changed["use_cache"] = False
    return {**kwargs, **changed}


def handed_beside(output: Any, before: dict[str, Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a layer returned beside the residual stream, and those it put into mappings of its `kwargs`."""
    returned = list(tensors(output[1:])) if isinstance(output, tuple) else []
    return returned + [held for mapping, key in written(before, kwargs) for held in tensors(mapping[key])]


def hidden_of(output: Any, layer: nn.Module) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"{type(layer).__name__} returns {type(output).__name__}, expected the residual stream or a tuple that starts "
        "with it: use PCGrowConfig(settle='backprop')"
    )
