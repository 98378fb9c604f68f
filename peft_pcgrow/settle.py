"""Carry the error from the output down to the locus, one layer at a time.

With predictions and Jacobians held at the forward values (the fixed-prediction assumption: Whittington & Bogacz 2017;
Millidge et al. 2022), the equilibrium of the predictive-coding energy over the residual stream x_0 .. x_L is reached
by one top-down sweep:

    delta_L = dLoss/dx_L            delta_l = delta_{l+1} + (dg_l/dx at x_l)^T delta_{l+1}

Each step is one layer's vector-Jacobian product, recomputed from that layer's stored input. These errors equal
backprop's; what is gained is that no autograd graph ever spans two layers.

Two other ways, see `Way`, reach the same errors hop by hop, or leave most of the way down out.

During a training forward the decoder layers run without a graph and only their inputs are kept. The last output
passes through `Boundary`, a custom autograd function that takes the trainable parameters as extra inputs: the user's
loss is differentiated by autograd down to there, and the boundary's backward settles the rest. The state belongs to
that one forward, so two forwards before a backward are both right.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peft_pcgrow.handover import swap, tensors, trained_elsewhere, written
from peft_pcgrow.recompute import LayerRun, hidden_of, is_recomputed, record, refuse_filled_cache, without_cache
from peft_pcgrow.relax import relax

WAYS = ("sweep", "direct", "relax")
# what may stand between two layers: the mark of the lower one's output, or its move to another device or dtype
HANDED_ON = ("RefusalBackward", "ToCopyBackward0")
ROUTER_LOSS = (
    "settling carries the error of the top layer's output only, so the load-balancing loss of "
    "output_router_logits=True would get no gradient: switch it off (TRL: router_aux_loss_coef=0.0), or use "
    "PCGrowConfig(settle='backprop')"
)


@dataclass(frozen=True)
class Way:
    """How the error is carried down.

    Args:
        settle: `"sweep"` goes down layer by layer, exactly. `"relax"` lets the errors of all layers hop down at once
            and stops when they have settled; after at most as many hops as there are layers they equal the sweep's.
            `"direct"` is an approximation: the residual stream carries the top layer's error down as it is, and the
            layers below only run again where something trains. On a small model that met a new domain, its errors had
            cosines of 0.52 to 0.76 with the exact ones, depending on the layer.
        depth: of `"direct"`: top layers that the error is carried through exactly; with all of them it is the sweep.
        tol: of `"relax"`: change of a layer's error, as a share of its norm, at which it has settled.

    Raises:
        ValueError: an unknown way, a depth that is not a whole number of layers, a tolerance that is not in (0, 1).
    """

    settle: str = "sweep"
    depth: int = 0
    tol: float = 0.01

    def __post_init__(self):
        if self.settle not in WAYS:
            raise ValueError(f"unknown way to settle: {self.settle!r}; choose from {', '.join(WAYS)}")
        if not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 0:
            raise ValueError(f"settle_depth must be a whole number of layers, 0 or more; got {self.depth!r}")
        if not isinstance(self.tol, float) or not 0 < self.tol < 1:
            raise ValueError(f"settle_tol must be a share in (0, 1), got {self.tol!r}")


class Probe:
    """Looks into a layer while it is settled (the error map does). Subclasses override `watch` and `receive`."""

    def watch(self, index: int) -> AbstractContextManager[Callable[[], list[Tensor]]]:
        """Entered around layer `index`'s recomputation and VJP; its value lists, once the layer has run, the tensors
        whose gradients are wanted."""
        raise NotImplementedError

    def receive(self, index: int, errors: Sequence[Tensor | None]) -> None:
        """Called with the gradients of the tensors that `watch` listed."""
        raise NotImplementedError

    # whether layers that errors are not carried through exactly must run again for it all the same
    again = True

    def carried(self, index: int, delta: Tensor) -> None:
        """Called instead of `watch` and `receive` where `"direct"` does not run a layer again, with the error at its
        output, `[B, S, H]`."""
        raise NotImplementedError

    def settled(self, hops: list[Tensor]) -> None:
        """Called by `"relax"` alone, before it watches the layers: for each of the L layers, bottom first, the first
        hop, `[B * S]` of 1 to L, at which a token's error at that layer's output changed by at most the tolerance."""


@dataclass
class Tape:
    """What one forward leaves behind for its backward."""

    way: Way
    # layers that will be run again
    wanted: list[bool]
    # the lowest layer's input
    start: Tensor
    # the same, if something below trains through it
    bottom: Tensor | None = None
    runs: list[LayerRun] = field(default_factory=list)
    # whether layers hand each other more than the residual stream, or have it changed between them
    linked: bool = False
    # of the layer at hand: its keyword arguments before it ran, and its run if it will be run again
    before: dict[str, Any] = field(default_factory=dict)
    current: LayerRun | None = None


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
        bottom = ctx.tape.bottom
        wants_bottom = bottom is not None and ctx.needs_input_grad[3]
        trainable = {id(p) for p, wanted in zip(ctx.parameters, ctx.needs_input_grad[4:], strict=True) if wanted}
        found, below = ctx.stack.settle(ctx.tape, runs, delta, trainable, wants_bottom)
        if below is not None and bottom is not None:
            # an error that was carried as it is comes from the top layer's device
            below = below.to(bottom.device, bottom.dtype)
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
            "settling carries the error of the top layer's output only, and this loss also reads hidden states of "
            "lower layers: use PCGrowConfig(settle='backprop')"
        )


class LayerStack:
    """The decoder layers of one model, settled instead of backpropagated through where `begin()` says so.

    Args:
        layers: decoder layers in the order they run; each takes the residual stream `[..., H]` first and returns it,
            alone or first in a tuple. What else they hand to each other, see `handover`, settles too.
        begin: called at the bottom layer of every forward; whether to settle this one (if gradients are enabled).
        probe: watches each layer while it is settled, down to the bottom.
        finished: called with (layer index) after every forward of a layer, settled or not.
        way: how to settle; may be changed, and holds for the forwards that begin from then on.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        begin: Callable[[], bool] = lambda: True,
        probe: Probe | None = None,
        finished: Callable[[int], None] | None = None,
        way: Way = Way(),
    ):
        self.layers = list(layers)
        self.begin, self.probe, self.finished, self.way = begin, probe, finished, way
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
        if is_recomputed(layer):
            return None
        if index == 0:
            self._grad_was_enabled.clear()
            self._tape = None
            settling = self.begin() and torch.is_grad_enabled()
        else:
            settling = self._tape is not None
        if not settling:
            return None
        if args:
            x, args = args[0], args[1:]
        else:
            x, kwargs = kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if index == 0:
            refuse_filled_cache(kwargs)
            if kwargs.get("output_router_logits"):
                raise ValueError(ROUTER_LOSS)
            # a leaf here is only enable_input_require_grads: no parameter below needs the error
            bottom = x if x.grad_fn is not None else None
            self._tape = Tape(self.way, self._layers_wanted(bottom is not None), x, bottom)
        elif not x.requires_grad:
            raise TypeError(
                f"{type(layer).__name__} {index} does not take the output of the layer before it: errors cannot be "
                "handed down between them; use PCGrowConfig(settle='backprop')"
            )
        assert self._tape is not None
        self._note(self._tape, index, layer, x, args, kwargs)
        self._grad_was_enabled.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)
        return (x.detach(), *args), kwargs

    def _note(self, tape: Tape, index: int, layer: nn.Module, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = without_cache(kwargs)
        tape.current, tape.before = None, swap(kwargs, lambda held: held)
        extras = list({id(held): held for held in tensors((args, kwargs)) if held.requires_grad}.values())
        changed = index > 0 and type(x.grad_fn).__name__ not in HANDED_ON
        if extras or changed:
            self._check_linked(tape, index, layer, extras, x)
        if tape.wanted[index]:
            run = tape.current = record(layer, index, x.detach(), args, tape.before)
            run.extras, run.origin = extras, x
            tape.runs.append(run)

    def _check_linked(self, tape: Tape, index: int, layer: nn.Module, extras: list[Tensor], x: Tensor) -> None:
        exact_all = tape.way.settle == "sweep"
        if not exact_all and (tape.way.settle == "relax" or tape.way.depth):
            raise ValueError(
                f"{type(layer).__name__} {index} takes more from the layers before it than the residual stream, or has "
                "that changed on the way; settle='relax' and settle_depth > 0 follow that stream only: use "
                "settle='sweep', or PCGrowConfig(settle='backprop')"
            )
        bottom = x if index == 0 else tape.start
        if any(trained_elsewhere(held, bottom) for held in extras):
            raise TypeError(
                f"{type(layer).__name__} {index} takes a tensor that something below the layers trains through beside "
                "the residual stream: use PCGrowConfig(settle='backprop')"
            )
        tape.linked |= exact_all

    def after(self, index: int, layer: nn.Module, kwargs: dict[str, Any], output: Any):
        if is_recomputed(layer):
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
        hidden = hidden_of(output, layer)
        others = output[1:] if isinstance(output, tuple) else ()
        if index < len(self.layers) - 1:
            # the layers above detach what they take; only a loss that reads captured states meets the mark
            anchor = torch.zeros((), device=hidden.device, requires_grad=True)
            marks: list[Tensor] = []

            def mark(held: Tensor) -> Tensor:
                marks.append(Refusal.apply(held, anchor.to(held.device)))
                return marks[-1]

            hidden, others = mark(hidden), swap(others, mark)
            for mapping, key in list(written(self._tape.before, kwargs)):
                mapping[key] = swap(mapping[key], mark)
            if self._tape.current is not None:
                self._tape.current.handed = marks
        else:
            tape, self._tape = self._tape, None
            hidden = self._bound(tape, hidden)
        return (hidden, *others) if isinstance(output, tuple) else hidden

    def _layers_wanted(self, wants_bottom: bool) -> list[bool]:
        """Which layers run again in the backward of a forward that begins now."""
        total = len(self.layers)
        if self.probe is not None:
            return [self.probe.again or index >= self._lowest_exact(self.way) for index in range(total)]
        holding = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
        lowest = holding.index(True) if any(holding) else total
        exact = max(0 if wants_bottom else lowest, self._lowest_exact(self.way))
        return [index >= exact or holding[index] for index in range(total)]

    def _lowest_exact(self, way: Way) -> int:
        """The lowest layer that errors are carried through exactly."""
        return max(len(self.layers) - way.depth, 0) if way.settle == "direct" else 0

    def _bound(self, tape: Tape, top: Tensor) -> Tensor:
        parameters = list({id(p): p for layer in self.layers for p in layer.parameters() if p.requires_grad}.values())
        if self.probe is not None and not parameters and tape.bottom is None:
            # nothing trains: an input of our own makes autograd call the boundary's backward all the same
            return Boundary.apply(self, tape, top, torch.zeros((), device=top.device, requires_grad=True))
        return Boundary.apply(self, tape, top, tape.bottom, *parameters)

    def settle(
        self,
        tape: Tape,
        runs: list[tuple[LayerRun, Tensor]],
        delta: Tensor,
        trainable: set[int],
        wants_bottom: bool,
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Settle from the top layer of `runs` to the lowest.

        Args:
            tape: of the forward. runs: what each layer was called with and its stored input `[B, S, H]`, bottom first.
            delta: error at the top output, `[B, S, H]`.
            trainable: ids of the parameters whose gradients are wanted.
            wants_bottom: whether something trains below the lowest layer.

        Returns:
            Gradients by parameter id, and the error at the lowest input (None unless wanted).
        """
        found: dict[int, Tensor] = {}
        if tape.linked:
            return found, self._settle_linked(tape, runs, delta, trainable, wants_bottom, found)
        if tape.way.settle == "relax":
            return found, self._settle_relaxed(tape.way.tol, runs, delta, trainable, wants_bottom, found)
        carried: Tensor | None = delta
        exact = self._lowest_exact(tape.way)
        for position in range(len(runs) - 1, -1, -1):
            run, stored = runs[position]
            # layers below the lowest that trains are not among the runs
            unseen = self.probe is not None and not self.probe.again and exact > 0
            wants_below = run.index >= exact and (position > 0 or wants_bottom or unseen)
            if carried is not None:
                (below,) = self._settle_layer(run, stored, [carried], trainable, wants_below, found)
                carried = below if wants_below else carried
        if self.probe is not None and not self.probe.again and carried is not None:
            for index in range(exact - 1, -1, -1):
                self.probe.carried(index, carried)
        return found, carried if wants_bottom else None

    def _settle_linked(
        self,
        tape: Tape,
        runs: list[tuple[LayerRun, Tensor]],
        delta: Tensor,
        trainable: set[int],
        wants_bottom: bool,
        found: dict[int, Tensor],
    ) -> Tensor | None:
        """The sweep where a layer's error goes to several of those below, along the graph of the code between them."""
        below = [tape.bottom] if wants_bottom and tape.bottom is not None else []
        marks = [*below, *(mark for run, _ in runs for mark in run.handed)]
        errors: dict[int, Tensor] = {}
        for position in range(len(runs) - 1, -1, -1):
            run, stored = runs[position]
            marks = marks[: len(marks) - len(run.handed)]
            deltas = [errors.pop(id(mark), None) for mark in run.handed] if run.handed else [delta]
            if all(error is None for error in deltas):
                continue
            arrived = self._settle_layer(run, stored, deltas, trainable, bool(marks), found)
            taken = [
                (source, error)
                for source, error in zip((run.origin, *run.extras), arrived, strict=True)
                if error is not None and source is not None and source.requires_grad
            ]
            if not taken or not marks:
                continue
            sources, arrived = zip(*taken, strict=True)
            passed = torch.autograd.grad(sources, marks, arrived, retain_graph=True, allow_unused=True)
            for mark, error in zip(marks, passed, strict=True):
                if error is not None:
                    errors[id(mark)] = errors[id(mark)] + error if id(mark) in errors else error
        return errors.get(id(tape.bottom)) if wants_bottom else None

    def _settle_relaxed(
        self,
        tol: float,
        runs: list[tuple[LayerRun, Tensor]],
        delta: Tensor,
        trainable: set[int],
        wants_bottom: bool,
        found: dict[int, Tensor],
    ) -> Tensor | None:
        needed = [0] if wants_bottom else []
        for position, (run, _) in enumerate(runs):
            if self.probe is not None or any(id(p) in trainable for p in run.layer.parameters()):
                needed.append(position + 1)
        errors, hops = relax(runs, delta, tol, needed, every_token=self.probe is not None)
        if self.probe is not None:
            self.probe.settled(hops)
        for position in range(len(runs) - 1, -1, -1):
            self._settle_layer(*runs[position], [errors[position + 1]], trainable, False, found)
        return errors[0] if wants_bottom else None

    def _settle_layer(
        self,
        run: LayerRun,
        stored: Tensor,
        deltas: Sequence[Tensor | None],
        trainable: set[int],
        wants_below: bool,
        found: dict[int, Tensor],
    ) -> list[Tensor | None]:
        """From the errors at what a layer handed on to those at its input and `run.extras` (None where not wanted)."""
        nothing: list[Tensor | None] = [None] * (1 + len(run.extras))
        parameters = [p for p in run.layer.parameters() if id(p) in trainable]
        if not (wants_below or parameters or self.probe is not None):
            return nothing
        watching = self.probe.watch(run.index) if self.probe is not None else nullcontext(list)
        with torch.enable_grad(), watching as listed:
            # for a probe too: through x, what it watches has a gradient where nothing trains
            x = stored.detach().requires_grad_(wants_below or self.probe is not None)
            extras = [extra.detach().requires_grad_(wants_below) for extra in run.extras]
            outputs = run.again(x, extras)
            watched = listed()
            inputs = [x, *extras] if wants_below else []
            wanted = inputs + parameters + watched
            reached = [
                (output, delta.to(output.device, output.dtype))
                for output, delta in zip(outputs, deltas, strict=False)
                if delta is not None and output.requires_grad
            ]
            if not wanted or not reached:
                return nothing
            handed, given = zip(*reached, strict=True)
            errors = list(torch.autograd.grad(handed, wanted, given, allow_unused=True))
        below, errors = errors[: len(inputs)], errors[len(inputs) :]
        for parameter, gradient in zip(parameters, errors, strict=False):
            if gradient is not None:
                key = id(parameter)
                found[key] = found[key] + gradient if key in found else gradient
        if self.probe is not None:
            self.probe.receive(run.index, errors[len(parameters) :])
        return below or nothing


# Compiled code breaks its graph at these hooks: what settles is not for a compiler. They are functions of the module
# so that a model that holds them can be pickled.
@torch.compiler.disable
def _before_layer(stack: LayerStack, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
    return stack.before(index, layer, args, kwargs)


@torch.compiler.disable
def _after_layer(stack: LayerStack, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any):
    return stack.after(index, layer, kwargs, output)
