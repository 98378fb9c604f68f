"""Run a decoder layer again, with the result that it had in the forward."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_pcgrow.per_thread import PerThread
from peft_pcgrow.settling.conditions import Conditions, own_hooks
from peft_pcgrow.settling.host import get_device_states, set_device_states
from peft_pcgrow.settling.side_tensors import swap, tensors, written

# what layers call their KV cache: transformers from 5.24 on, before, and of old
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class _Again(PerThread):
    """The layer that a thread is running again just now: stacks, of whichever model, must leave it alone."""

    layer: Any = None


_again = _Again()


class Random(NamedTuple):
    """States of the random generators of the CPU and of some devices."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def of(cls, x: Tensor) -> "Random":
        """Here and now, for a layer that is given `x`."""
        devices = get_device_states(x) if x.device.type not in ("cpu", "meta") else ([], [])
        return cls(torch.get_rng_state(), *devices)

    def equals(self, other: "Random") -> bool:
        return all(map(torch.equal, (self.cpu, *self.states), (other.cpu, *other.states)))


@dataclass
class LayerRun:
    """How one decoder layer was called: enough to run it again with the same result.

    Attributes:
        origin: the input as it came, with its graph; x: the same without.
        extras: tensors among `args` and `kwargs` that other layers made, with their graphs.
        recorded: what transformers recorded inside it in the forward, an `inner_outputs.Recorded`.
        random, drawn: the random states before and after it. conditions: what else its outputs depend on.
        handed: what the layer handed on in the forward, by the number of its mark, its output first; None: it went to
            hooks only.
        kept: the input that it ran with, and what it handed on, as `again` gives it, with the graph between them.
        output: with the graph of its weights, if that was kept; then it is not run again, and `x` is not kept.
    """

    layer: Any  # an nn.Module
    index: int
    x: Tensor
    args: tuple
    kwargs: dict[str, Any]
    device_type: str
    autocast: dict[str, Any]
    random: Random
    origin: Tensor
    extras: list[Tensor]
    recorded: Any
    conditions: Conditions
    drawn: Random | None = None
    kept: tuple[Tensor, list[Tensor]] | None = None
    handed: dict[int, Tensor | None] = field(default_factory=dict)
    output: Tensor | None = None

    def again(self, x: Tensor, extras: Sequence[Tensor] = ()) -> list[Tensor]:
        """What the layer hands on for input `x`, its output first, under the recorded autocast and random state, and
        without a KV cache; `extras` take the places of the recorded ones."""
        given = {id(old): new for old, new in zip(self.extras, extras, strict=True)} if extras else {}
        args, kwargs = swap((self.args, self.kwargs), lambda held: given.get(id(held), held.detach()))
        before = swap(kwargs, lambda held: held)
        with ExitStack() as stack:
            stack.enter_context(self.conditions.in_place())
            devices = self.random.devices
            stack.enter_context(torch.random.fork_rng(devices, device_type=self.device_type if devices else "cuda"))
            torch.set_rng_state(self.random.cpu)
            if devices:
                set_device_states(devices, self.random.states, device_type=self.device_type)
            for device_type, options in self.autocast.items():
                stack.enter_context(torch.autocast(device_type, **options))
            # a checkpoint inside the recomputation would only run the layer a third time
            checkpointing = getattr(self.layer, "gradient_checkpointing", False)
            inside = stack.enter_context(self.recorded.again())
            seen: list[Tensor] = []
            stack.enter_context(tapped(self.layer, lambda held: seen.append(held) or held))
            try:
                if checkpointing:
                    self.layer.gradient_checkpointing = False
                _again.layer = self.layer
                # hooks of the layer have seen what it takes and returns, and what they made of it has a graph
                output = self.layer.forward(x, *args, **kwargs)
                if self.drawn is not None and not self.drawn.equals(Random.of(x)):
                    raise RuntimeError(
                        f"{type(self.layer).__name__} {self.index} drew other random numbers (dropout) in the backward "
                        "than in the forward, so its gradients would be wrong: do not use the model, or torch's random "
                        "numbers, from another thread while it trains"
                    )
                return [hidden_of(output, self.layer), *handed_beside(output, before, kwargs), *inside(), *seen]
            finally:
                if checkpointing:
                    # first, and by no call that Ctrl-C could come into
                    vars(self.layer)["gradient_checkpointing"] = True
                _again.layer = None


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
    given = [
        (name, held) for name, value in (*enumerate(args, 1), *kwargs.items()) for held in tensors(value, every=True)
    ]
    held = Random.of(x), x, extras, recorded, Conditions.of(layer, [(str(name), tensor) for name, tensor in given])
    return LayerRun(layer, index, x.detach(), args, kwargs, device_type, autocast, *held)


@contextmanager
def tapped(layer: nn.Module, look: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, `look` is given the tensors that modules in a layer return to forward hooks of the user's, and says what
    these see."""
    handles = []
    try:
        for module in layer.modules():
            if _has_tap(module, layer):
                handles.append(module.register_forward_hook(partial(_tap, look), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_tap(module: nn.Module, layer: nn.Module) -> bool:
    return module is not layer and bool(own_hooks(module._forward_hooks))


def has_taps(layer: nn.Module) -> bool:
    """Whether `tapped` would find something in a layer."""
    return any(_has_tap(module, layer) for module in layer.modules())


@torch.compiler.disable
def _tap(look: Callable[[Tensor], Tensor], _: nn.Module, args: tuple, output: Any) -> Any:
    with torch.enable_grad():
        return swap(output, look)


def refuse_filled_cache(kwargs: dict[str, Any]) -> None:
    for name in CACHES:
        cache: Any = kwargs.get(name)
        if hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0:
            raise ValueError(
                f"settling cannot train behind a filled KV cache ({name} holds {cache.get_seq_length()} "
                "positions): pass the whole sequence, or use PCGrowConfig(settle='backprop')"
            )


def out_of_reach(kwargs: dict[str, Any], index: int, graph: bool) -> None:
    """Let a loss that reads what layer `index` put into its KV cache fail, rather than miss its gradient; `graph`: the
    layer ran with one."""
    for entry in cache_entries(kwargs, index):
        # those of a static cache are written to in place
        kept = {} if getattr(entry, "is_compileable", False) else dict(vars(entry))
        for key, held in kept.items():
            if isinstance(held, Tensor) and held.is_floating_point() and (graph or not held.requires_grad):
                anything = torch.zeros((), device=held.device, requires_grad=True)
                setattr(entry, key, _Unreachable.apply(held.detach(), anything))


def cache_entries(kwargs: dict[str, Any], index: int) -> list[Any]:
    """Where layer `index` keeps what it puts into the KV caches that it is given."""
    place = index + kwargs.get("cache_offset", 0)
    lists = [getattr(kwargs.get(name), "layers", None) or () for name in CACHES]
    return [entry for held in lists for entry in held[place : place + 1]]


class _Unreachable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, held: Tensor, _: Tensor) -> Tensor:  # type: ignore[override]
        return held.view_as(held)

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError(
            "this loss reads the KV cache, whose errors settling does not carry: use PCGrowConfig(settle='backprop')"
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
