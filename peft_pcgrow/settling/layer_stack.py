"""Carry the error from the output down to the locus, one layer at a time.

With predictions and Jacobians held at the forward values (the fixed-prediction assumption: Whittington & Bogacz 2017;
Millidge et al. 2022), the equilibrium of the predictive-coding energy over the residual stream x_0 .. x_L is reached
by one top-down sweep:

    delta_L = dLoss/dx_L            delta_l = delta_{l+1} + (dg_l/dx at x_l)^T delta_{l+1}

Each step is one layer's vector-Jacobian product, recomputed from that layer's stored input. These errors equal
backprop's; what is gained is that no autograd graph ever spans two layers.

Two other ways, see `Way`, reach the same errors hop by hop, or leave most of the way down out.

A layer's own `forward` is what settles, inside of whatever hooks the layer has: what those change is code between two
layers. During a training forward the layers run without a graph and only their inputs are kept (of some, by `keeps`,
a graph of their trainable weights instead). Three custom autograd functions take the backward over: what a layer hands
on is marked (`Mark`, and `Top` for the last one's output), and all marks hang on a `Ground` below the layers, or on one
for each of them, which take the trainable parameters as inputs. The user's loss, whatever layers' outputs it reads, is
differentiated by autograd down to the marks, which note the errors that arrive; the grounds' backward comes last and
settles the rest, one layer after another, each layer's gradients out of hand before the next.
The state belongs to that one forward, so two forwards before a backward are both right.

Where an engine gathers sharded weights by hooks of modules, all of this is left to torch: see `checkpointed`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.per_thread import PerThread
from peft_pcgrow.settling import checkpointed
from peft_pcgrow.settling.conditions import own_hooks
from peft_pcgrow.settling.descent import TOP, Descent, Probe, Way
from peft_pcgrow.settling.host import Moved, node_of, saving_hooks, set_grad_enabled
from peft_pcgrow.settling.inner_outputs import Recorded
from peft_pcgrow.settling.keep import Weighed, can_keep
from peft_pcgrow.settling.layer_run import (
    LayerRun,
    Random,
    by_name,
    cache_entries,
    handed_beside,
    hidden_of,
    is_recomputed,
    out_of_reach,
    record,
    refuse_filled_cache,
    tapped,
    without_cache,
)
from peft_pcgrow.settling.side_tensors import swap, tensors, trained_elsewhere, written
from peft_pcgrow.settling.tape import Ground, Mark, Tape, Top

# what may stand between two layers: the mark of the lower one's output, or its move to another device or dtype
HANDED_ON = (node_of(Mark), Moved)


class _Open(PerThread):
    """The forward that a thread is in the middle of: how it settles, and by hand if there is a tape."""

    way: Way | None = None
    tape: Tape | None = None


class LayerStack:
    """The decoder layers of one model, settled instead of backpropagated through as `begin()` says.

    Args:
        layers: decoder layers in the order they run; each takes the residual stream `[..., H]` first and returns it,
            alone or first in a tuple. What else they hand to each other, see `handover`, settles too.
        begin: called at the bottom layer of every forward: how to settle it (if gradients are enabled), None: not.
        probe: watches each layer while it is settled, down to the bottom.
        entered: called with (layer index, layer, args, kwargs) before each run of a layer's own code, settled or not.
        left: called with (layer index, whether it ran to its end) after each.
        keeps: of a layer and its trainable weights, whether a graph for these alone holds little more than the layer's
            input; `"direct"` then keeps that of a layer which no error goes through, and does not run it again.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        begin: Callable[[], Way | None] = Way,
        probe: Probe | None = None,
        entered: Callable[[int, nn.Module, tuple, dict[str, Any]], None] | None = None,
        left: Callable[[int, bool], None] | None = None,
        keeps: Callable[[int, list[Tensor]], bool] = lambda *_: False,
    ):
        self.layers = list(layers)
        self.keeps = keeps
        self.begin, self.probe, self.entered, self.left = begin, probe, entered, left
        self.attached = False
        self._open = _Open()
        self._weighed = Weighed()

    def attach(self) -> "LayerStack":
        self.attached = True
        for index, layer in enumerate(self.layers):
            layer.forward = partial(_run, self, index, layer, layer.__dict__.get("forward"))
        return self

    def detach(self) -> None:
        # a layer that somebody wrapped since goes on calling us, and we pass it by
        self.attached = False
        for layer in self.layers:
            held: Any = layer.__dict__.get("forward")
            if getattr(held, "func", None) is _run and held.args[0] is self:
                del layer.forward
                if (below := held.args[3]) is not None:
                    layer.forward = below

    def __enter__(self) -> "LayerStack":
        try:
            return self.attach()
        except BaseException:
            self.detach()
            raise

    def __exit__(self, *error) -> None:
        self.detach()

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.entered is not None:
            self.entered(index, layer, args, kwargs)

    @torch.compiler.disable
    def checkpointed(self, index: int, layer: nn.Module) -> Way | None:
        """How to settle a layer that autograd goes through; None: by hand, or not."""
        if is_recomputed(layer):
            return None
        if index == 0:
            self._open.tape = self._open.way = None
            way = self.begin()
            self._open.way = way if torch.is_grad_enabled() else None
        way = self._open.way
        return way if way is not None and way.checkpoint else None

    @torch.compiler.disable
    def before(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any, Tape | None]:
        """What a layer is to be called with, and the tape if it settles."""
        self.enter(index, layer, args, kwargs)
        way = self._open.way if index == 0 else None
        if is_recomputed(layer) or (way is None and self._open.tape is None):
            return args, kwargs, None
        args, kwargs = by_name(layer, args, kwargs)
        if args:
            x, args = args[0], args[1:]
        else:
            x, kwargs = kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if way is not None:
            refuse_filled_cache(kwargs)
            self._open.tape = self._begin_tape(x, way)
        elif not x.requires_grad:
            raise TypeError(
                f"{type(layer).__name__} {index} does not take the output of the layer before it: errors cannot be "
                "handed down between them; use PCGrowConfig(settle='backprop')"
            )
        tape = self._open.tape
        assert tape is not None
        self._note(tape, index, layer, x, args, kwargs)
        return (x.detach() if tape.leaf is None else tape.leaf, *args), kwargs, tape

    def _note(self, tape: Tape, index: int, layer: nn.Module, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        cache, kwargs = cache_entries(kwargs, index), without_cache(kwargs)
        tape.current, tape.before, tape.recorded = None, swap(kwargs, lambda held: held), Recorded.at_hand()
        tape.keeps = False
        extras = list({id(held): held for held in tensors((args, kwargs)) if held.requires_grad}.values())
        changed = index > 0 and not isinstance(x.grad_fn, HANDED_ON)
        if extras or changed:
            self._check_linked(tape, index, layer, [*extras, x] if changed else extras)
        if tape.wanted[index]:
            tape.current = record(layer, index, x, args, tape.before, extras, tape.recorded)
            if any(id(p) not in tape.trainable for p in tape.current.conditions.trainable()):
                raise TypeError(
                    f"{type(layer).__name__} {index} runs with trainable weights that it did not have when the forward "
                    "began (sharded by FSDP2, for example), and settling could not hand them their gradients: use "
                    "PCGrowConfig(settle='backprop')"
                )
            tape.runs.append(tape.current)
            if index >= len(self.layers) - tape.way.keep and self.probe is None and can_keep(tape.current, cache):
                tape.leaf = x.detach().requires_grad_(tape.bottom is not None or any(tape.wanted[:index]))
                # of weights that another layer, without a graph, has cast
                torch.clear_autocast_cache()
            tape.keeps = self._keeps(tape, tape.current)

    def _keeps(self, tape: Tape, run: LayerRun) -> bool:
        exact = tape.way.settle != "direct" or run.index >= tape.way.lowest_exact(len(self.layers))
        if exact or self.probe is not None:
            return False
        # what hooks see is marked, which no graph may go through; checkpointing would run the layer for its graph
        watched = any(own_hooks(module._forward_hooks) for module in run.layer.modules() if module is not run.layer)
        checkpointed = getattr(run.layer, "gradient_checkpointing", False) or saving_hooks(True) is not None
        return not (watched or checkpointed) and self.keeps(run.index, run.conditions.trainable())

    def _check_linked(self, tape: Tape, index: int, layer: nn.Module, taken: list[Tensor]) -> None:
        if tape.way.settle == "relax" or (tape.way.settle == "direct" and tape.way.depth):
            raise ValueError(
                f"{type(layer).__name__} {index} takes more from the layers before it than the residual stream, or has "
                "that changed on the way; settle='relax' and settle_depth > 0 follow that stream only: use "
                "settle='sweep', or PCGrowConfig(settle='backprop')"
            )
        if any(trained_elsewhere(held, tape.start) for held in taken):
            raise TypeError(
                f"{type(layer).__name__} {index} takes a tensor that something below or between the layers trains "
                "through beside the residual stream: use PCGrowConfig(settle='backprop')"
            )
        tape.linked |= tape.way.settle == "sweep"

    @torch.compiler.disable
    def after(self, tape: Tape, index: int, layer: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        """What a layer that settles hands on."""
        if tape.current is not None:
            tape.current.drawn = Random.of(tape.current.x)
            tape.current.conditions.ran()
        hidden, kept = hidden_of(output, layer), tape.leaf is not None
        if tape.current is not None and tape.leaf is not None:
            beside = *handed_beside(output, tape.before, kwargs), *tape.recorded.since()
            tape.current.kept, hidden = (tape.leaf, [hidden, *beside]), hidden.detach()
        others = output[1:] if isinstance(output, tuple) else ()
        if tape.keeps and tape.current is not None and hidden.requires_grad:
            tape.current.conditions.refuse_strangers([hidden], ())
            tape.current.output, tape.current.x = hidden, hidden.new_empty(0)
            hidden = hidden.detach()
        if index < len(self.layers) - 1:
            hidden = tape.mark(hidden)
        else:
            self._open.tape = None
            if tape.way.keep:
                self._weighed.tell()
            if tape.current is not None:
                tape.current.handed[TOP] = hidden
            hidden = Top.apply(hidden, tape.ground, tape)
        # in the order of `LayerRun.again`
        others = swap(others, tape.mark)
        for mapping, key in list(written(tape.before, kwargs)):
            mapping[key] = swap(mapping[key], tape.mark)
        tape.recorded.mark(tape.mark)
        tape.close_layer()
        out_of_reach(kwargs, index, kept)
        return (hidden, *others) if isinstance(output, tuple) else hidden

    @torch.compiler.disable
    def close(self, index: int, ran: bool) -> None:
        if not ran:
            self._open.tape = None
        if self.left is not None:
            self.left(index, ran)

    def _begin_tape(self, x: Tensor, way: Way) -> Tape:
        tape = Tape(way, self._layers_wanted(way, x.grad_fn is not None), x)
        parameters: list[list[Tensor]] = [[p for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        tape.trainable = {id(p) for held in parameters for p in held}
        lowest, *others = [index for index, held in enumerate(parameters) if held] or [0]
        if self.probe is not None and not parameters[lowest] and tape.bottom is None:
            # nothing trains: an input of our own makes autograd call the ground's backward all the same
            parameters[lowest] = [torch.zeros((), device=x.device, requires_grad=True)]
        ground: Any = Ground.apply(self, tape, None, tape.bottom, *parameters[lowest])
        for index in others:
            ground = Ground.apply(self, tape, index, ground, *parameters[index])
        tape.ground = ground
        return tape

    def _layers_wanted(self, way: Way, wants_bottom: bool) -> list[bool]:
        """Which layers run again in the backward of a forward that begins now."""
        total = len(self.layers)
        if self.probe is not None:
            return [self.probe.again or index >= way.lowest_exact(total) for index in range(total)]
        holding = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
        lowest = holding.index(True) if any(holding) else total
        exact = max(0 if wants_bottom else lowest, way.lowest_exact(total))
        return [index >= exact or holding[index] for index in range(total)]

    def settle(
        self,
        tape: Tape,
        runs: list[tuple[LayerRun, Tensor]],
        arrived: dict[int, Tensor],
    ) -> tuple[Descent, Iterator[int]]:
        """The way down from the errors that have arrived, and its steps, which are still to be taken."""
        for run, _ in runs if self.probe is None or not self.probe.frees else ():
            run.conditions.check(run.index)
        descent = Descent(tape.way, len(self.layers), tape.trainable, tape.bottom, self.probe)
        lower, hooked = arrived.keys() - {TOP}, tape.hooked()
        if (lower or hooked) and tape.way.settle != "sweep":
            raise RuntimeError(
                f"settle={tape.way.settle!r} carries the error of the top layer's output only, and this loss also "
                "reads hidden states of lower layers, or what is recorded inside layers (router logits: a "
                "load-balancing loss, which TRL adds unless router_aux_loss_coef=0.0), or these have hooks or retain "
                "their gradients: use settle='sweep', or PCGrowConfig(settle='backprop')"
            )
        if any(hooked.get(number) for number in lower):
            raise RuntimeError(
                "a hidden state between two layers has a hook (register_hook), and the loss reads it too: the hook "
                "would see its error in two parts. Remove one of them, or use PCGrowConfig(settle='backprop')"
            )
        # along autograd's graph between the layers, where hooks of tensors run
        linked = tape.linked or lower or hooked
        return descent, descent.linked(runs, arrived) if linked else descent.run(runs, arrived[TOP])


# Compiled code breaks its graph here, and goes on inside the layer: what settles is not for a compiler. A function of
# the module, so that a model that holds it can be pickled.
@torch.compiler.disable(recursive=False)
def _run(stack: LayerStack, index: int, layer: nn.Module, below: Callable[..., Any] | None, *args: Any, **kwargs: Any):
    """The `forward` of a layer; `below` is the one that it had before, if not its class's."""
    forward = below or partial(type(layer).forward, layer)
    if not stack.attached:
        return forward(*args, **kwargs)
    enabled, ran = torch.is_grad_enabled(), False
    if (way := stack.checkpointed(index, layer)) is not None:  # type: ignore
        around = partial(stack.enter, index, layer), partial(stack.close, index)  # type: ignore
        keeps = partial(stack.keeps, index)
        return checkpointed.run(way, (index, len(stack.layers)), layer, forward, around, keeps, args, kwargs)
    try:
        args, kwargs, tape = stack.before(index, layer, args, kwargs)  # type: ignore
        if tape is None:
            output = forward(*args, **kwargs)
        else:
            set_grad_enabled(tape.leaf is not None or tape.keeps)
            weighed = nullcontext() if tape.leaf is None else stack._weighed.around(index, layer)
            with weighed, tapped(layer, tape.tap):
                output = forward(*args, **kwargs)
            set_grad_enabled(enabled)
            output = stack.after(tape, index, layer, kwargs, output)  # type: ignore
        ran = True
        return output
    finally:
        # at once, whatever was raised: Python code around it could itself be interrupted before it does anything
        set_grad_enabled(enabled)
        stack.close(index, ran)  # type: ignore


def beneath(forward: Any) -> Any:
    """The `forward` that a module had of its own before its stacks were attached; None: its class's."""
    while getattr(forward, "func", None) is _run:
        forward = forward.args[3]
    return forward
