"""Carry the error from the output down to the locus, one layer at a time.

With predictions and Jacobians held at the forward values (the fixed-prediction assumption: Whittington & Bogacz 2017;
Millidge et al. 2022), the equilibrium of the predictive-coding energy over the residual stream x_0 .. x_L is reached
by one top-down sweep:

    delta_L = dLoss/dx_L            delta_l = delta_{l+1} + (dg_l/dx at x_l)^T delta_{l+1}

Each step is one layer's vector-Jacobian product, recomputed from that layer's stored input. These errors equal
backprop's; what is gained is that no autograd graph ever spans two layers.

During a training forward the decoder layers run without a graph and only their inputs are kept. The last output
passes through `Boundary`, a custom autograd function that takes the trainable parameters as extra inputs: the user's
loss is differentiated by autograd down to there, and the boundary's backward settles the rest. The state belongs to
that one forward, so two forwards before a backward are both right.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

CACHES = ("past_key_values", "past_key_value", "layer_past")
# what may stand between two layers: the mark of the lower one's output, or its move to another device or dtype
HANDED_ON = ("RefusalBackward", "ToCopyBackward0")
ROUTER_LOSS = (
    "settle='sweep' carries the error of the top layer's output only, so the load-balancing loss of "
    "output_router_logits=True would get no gradient: switch it off (TRL: router_aux_loss_coef=0.0), or use "
    "PCGrowConfig(settle='backprop')"
)
# layers that are being recomputed just now: hooks, of whichever stack, must leave them alone
_recomputed: set[int] = set()


class Probe:
    """Looks into a layer while it is settled (the error map does). Subclasses override both methods."""

    def watch(self, index: int) -> AbstractContextManager[Callable[[], list[Tensor]]]:
        """Entered around layer `index`'s recomputation and VJP; its value lists, once the layer has run, the tensors
        whose gradients are wanted."""
        raise NotImplementedError

    def receive(self, index: int, errors: Sequence[Tensor | None]) -> None:
        """Called with the gradients of the tensors that `watch` listed."""
        raise NotImplementedError


@dataclass
class LayerRun:
    """How one decoder layer was called: enough to run it again with the same result."""

    layer: Any  # an nn.Module
    index: int
    x: Tensor
    args: tuple
    kwargs: dict[str, Any]
    device_type: str
    autocast: dict[str, Any]
    cpu_rng: Tensor
    device_rng: tuple[list[int], list[Tensor]]

    def again(self, x: Tensor) -> Tensor:
        """The layer's output for input `x`, under the recorded autocast and random state, without a KV cache."""
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
            if checkpointing:
                self.layer.gradient_checkpointing = False
            _recomputed.add(id(self.layer))
            try:
                return _hidden(self.layer(x, *self.args, **self.kwargs), self.layer)
            finally:
                _recomputed.discard(id(self.layer))
                if checkpointing:
                    self.layer.gradient_checkpointing = True


@dataclass
class Tape:
    """What one forward leaves behind for its backward."""

    runs: list[LayerRun] = field(default_factory=list)
    bottom: Tensor | None = None


class Boundary(torch.autograd.Function):
    """Between the decoder layers and the head: autograd above, settling below."""

    @staticmethod
    def forward(ctx, stack: "LayerStack", tape: Tape, top: Tensor, bottom: Tensor | None, *parameters: Tensor):
        ctx.stack, ctx.tape, ctx.parameters = stack, tape, parameters
        # saved through autograd: freed with the graph, checked against writes in place
        ctx.save_for_backward(*(run.x for run in tape.runs))
        for run in tape.runs:
            run.x = None  # type: ignore[assignment]
        return top.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, delta: Tensor):
        runs = list(zip(ctx.tape.runs, ctx.saved_tensors, strict=True))
        wants_bottom = ctx.tape.bottom is not None and ctx.needs_input_grad[3]
        trainable = {id(p) for p, wanted in zip(ctx.parameters, ctx.needs_input_grad[4:], strict=True) if wanted}
        found, below = ctx.stack.sweep(runs, delta, trainable, wants_bottom)
        # a parameter that no row reached has a zero gradient, as under autograd; DDP's reducer waits for it
        gradients = [found.get(id(p), torch.zeros_like(p)) if id(p) in trainable else None for p in ctx.parameters]
        return None, None, None, below, *gradients


class Refusal(torch.autograd.Function):
    """Marks a layer's output below the top: a loss on it would get no gradient, so its backward says so."""

    @staticmethod
    def forward(ctx, output: Tensor, anchor: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, delta: Tensor):
        raise RuntimeError(
            "settle='sweep' carries the error of the top layer's output only, and this loss also reads hidden states "
            "of lower layers: use PCGrowConfig(settle='backprop')"
        )


class LayerStack:
    """The decoder layers of one model, settled instead of backpropagated through where `begin()` says so.

    Args:
        layers: decoder layers in the order they run; each takes the residual stream `[..., H]` first and returns it
            (alone, or first in a tuple whose other members carry no gradient).
        begin: called at the bottom layer of every forward; whether to settle this one (if gradients are enabled).
        probe: watches each layer while it is settled, down to the bottom.
        finished: called with (layer index) after every forward of a layer, settled or not.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        begin: Callable[[], bool] = lambda: True,
        probe: Probe | None = None,
        finished: Callable[[int], None] | None = None,
    ):
        self.layers = list(layers)
        self.begin, self.probe, self.finished = begin, probe, finished
        self._tape: Tape | None = None
        self._grad_was_enabled: list[bool] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> "LayerStack":
        if not self._handles:
            for index, layer in enumerate(self.layers):
                before, after = partial(_before_layer, self, index), partial(_after_layer, self, index)
                self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(layer.register_forward_hook(after, with_kwargs=True, always_call=True))
        return self

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._tape = None

    def __enter__(self) -> "LayerStack":
        return self.attach()

    def __exit__(self, *error) -> None:
        self.detach()

    def before(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if id(layer) in _recomputed:
            return None
        if index == 0:
            self._grad_was_enabled.clear()
            self._tape = Tape() if self.begin() and torch.is_grad_enabled() else None
        if self._tape is None:
            return None
        if args:
            x, args = args[0], args[1:]
        else:
            x, kwargs = kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if index == 0:
            _refuse_filled_cache(kwargs)
            if kwargs.get("output_router_logits"):
                raise ValueError(ROUTER_LOSS)
            # a leaf here is only enable_input_require_grads: no parameter below needs the error
            self._tape.bottom = x if x.grad_fn is not None else None
        elif type(x.grad_fn).__name__ not in HANDED_ON:
            raise TypeError(
                f"{type(layer).__name__} {index} does not take the output of the layer before it as it is: errors "
                "cannot be handed down between them; use PCGrowConfig(settle='backprop')"
            )
        self._tape.runs.append(_record(layer, index, x.detach(), args, _without_cache(kwargs)))
        self._grad_was_enabled.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)
        return (x.detach(), *args), kwargs

    def after(self, index: int, layer: nn.Module, output: Any):
        if id(layer) in _recomputed:
            return None
        if self._grad_was_enabled:
            torch.set_grad_enabled(self._grad_was_enabled.pop())
        if output is None:  # the layer raised
            self._tape = None
            return None
        if self.finished is not None:
            self.finished(index)
        if self._tape is None:
            return None
        hidden = _hidden(output, layer)
        if index < len(self.layers) - 1:
            # the next layer detaches it again; only a loss that reads captured states meets it
            hidden = Refusal.apply(hidden, torch.zeros((), device=hidden.device, requires_grad=True))
        else:
            tape, self._tape = self._tape, None
            hidden = self._bound(tape, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _bound(self, tape: Tape, top: Tensor) -> Tensor:
        parameters = list({id(p): p for layer in self.layers for p in layer.parameters() if p.requires_grad}.values())
        if tape.bottom is None and self.probe is None:
            holding = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
            lowest = holding.index(True) if any(holding) else len(holding)
            tape.runs = tape.runs[lowest:]
        if self.probe is not None and not parameters and tape.bottom is None:
            # nothing trains: an input of our own makes autograd call the boundary's backward all the same
            return Boundary.apply(self, tape, top, torch.zeros((), device=top.device, requires_grad=True))
        return Boundary.apply(self, tape, top, tape.bottom, *parameters)

    def sweep(
        self, runs: list[tuple[LayerRun, Tensor]], delta: Tensor, trainable: set[int], wants_bottom: bool
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Settle from the top layer of `runs` to the lowest.

        Args:
            runs: what each layer was called with and its stored input `[B, S, H]`, bottom first.
            delta: error at the top output, `[B, S, H]`.
            trainable: ids of the parameters whose gradients are wanted.
            wants_bottom: whether something trains below the lowest layer.

        Returns:
            Gradients by parameter id, and the error at the lowest input (None unless wanted).
        """
        found: dict[int, Tensor] = {}
        carried: Tensor | None = delta
        for position in range(len(runs) - 1, -1, -1):
            run, stored = runs[position]
            # `_bound` cut the runs at the lowest layer that trains
            wants_below = position > 0 or wants_bottom
            if carried is not None:
                carried = self._settle_layer(run, stored, carried, trainable, wants_below, found)
        return found, carried if wants_bottom else None

    def _settle_layer(
        self,
        run: LayerRun,
        stored: Tensor,
        delta: Tensor,
        trainable: set[int],
        wants_below: bool,
        found: dict[int, Tensor],
    ) -> Tensor | None:
        parameters = [p for p in run.layer.parameters() if id(p) in trainable]
        watching = self.probe.watch(run.index) if self.probe is not None else nullcontext(list)
        with torch.enable_grad(), watching as listed:
            x = stored.detach().requires_grad_(wants_below or self.probe is not None)
            output = run.again(x)
            watched = listed()
            wanted = ([x] if x.requires_grad else []) + parameters + watched
            if not wanted or not output.requires_grad:
                return None
            errors = list(torch.autograd.grad(output, wanted, delta.to(output.device, output.dtype), allow_unused=True))
        below = errors.pop(0) if x.requires_grad else None
        for parameter, gradient in zip(parameters, errors, strict=False):
            if gradient is not None:
                key = id(parameter)
                found[key] = found[key] + gradient if key in found else gradient
        if self.probe is not None:
            self.probe.receive(run.index, errors[len(parameters) :])
        return below


# Compiled code breaks its graph at these hooks: what settles is not for a compiler. They are functions of the module
# so that a model that holds them can be pickled.
@torch.compiler.disable
def _before_layer(stack: LayerStack, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
    return stack.before(index, layer, args, kwargs)


@torch.compiler.disable
def _after_layer(stack: LayerStack, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any):
    return stack.after(index, layer, output)


def _record(layer: nn.Module, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> LayerRun:
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
    return LayerRun(layer, index, x, args, kwargs, device_type, autocast, torch.get_rng_state(), device_rng)


def _refuse_filled_cache(kwargs: dict[str, Any]) -> None:
    for name in CACHES:
        cache: Any = kwargs.get(name)
        if hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0:
            raise ValueError(
                f"settle='sweep' cannot train behind a filled KV cache ({name} holds {cache.get_seq_length()} "
                "positions): pass the whole sequence, or use PCGrowConfig(settle='backprop')"
            )


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """For the recomputation: with the KV cache, a layer would append its keys a second time and attend to both."""
    changed: dict[str, Any] = {name: None for name in CACHES if kwargs.get(name) is not None}
    if kwargs.get("use_cache"):
        changed["use_cache"] = False
    return {**kwargs, **changed}


def _hidden(output: Any, layer: nn.Module) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and isinstance(output[0], Tensor):
        if any(isinstance(other, Tensor) and other.requires_grad for other in output[1:]):
            raise TypeError(
                f"{type(layer).__name__} passes a second tensor with a gradient to the next layer; settle='sweep' "
                "carries the residual stream only: use PCGrowConfig(settle='backprop')"
            )
        return output[0]
    raise TypeError(
        f"{type(layer).__name__} returns {type(output).__name__}, expected the residual stream or a tuple that starts "
        "with it: use PCGrowConfig(settle='backprop')"
    )
