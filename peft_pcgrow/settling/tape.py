"""What a settled forward leaves behind, and the autograd functions that its backward goes through.

See `settle` for how they work together.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_pcgrow.settling.descent import BOTTOM, TOP, Descent, Way
from peft_pcgrow.settling.host import backward_under_way, keeps_graph
from peft_pcgrow.settling.inner_outputs import Recorded
from peft_pcgrow.settling.layer_run import LayerRun

NOT_TOP = (
    "this loss reads hidden states of lower layers, or router logits, and not the top layer's output: add it to the "
    "one that does before backward(), or use PCGrowConfig(settle='backprop')"
)


@dataclass
class Arrivals:
    """Errors that have arrived at marks in one backward, by their number; none is noted once settling has begun. It
    holds no graph, so that marks may hold it."""

    errors: dict[int, Tensor] = field(default_factory=dict)
    backward: int = -1
    settling: bool = False

    def add(self, number: int, delta: Tensor) -> None:
        if (backward := backward_under_way()) != self.backward:
            # whatever is left was of one that was interrupted
            self.backward, self.errors = backward, {}
        held = self.errors.get(number)
        self.errors[number] = delta if held is None else held + delta


@dataclass
class Tape:
    """What one forward leaves behind for its backward."""

    way: Way
    # layers that will be run again
    wanted: list[bool]
    # the lowest layer's input
    start: Tensor
    # ids of the layers' trainable weights, all of which the ground takes
    trainable: set[int] = field(default_factory=set)
    runs: list[LayerRun] = field(default_factory=list)
    # whether layers hand each other more than the residual stream, or have it changed between them
    linked: bool = False
    # what all marks hang on, and how many there are
    ground: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    marks: int = TOP
    arrived: Arrivals = field(default_factory=Arrivals)
    stored: tuple[Tensor, ...] = ()
    # the backward that settles, and what is left of its way down
    begun: tuple[int, Descent, Iterator[int]] | None = None
    # how often each layer still comes on that way
    left: Counter[int] = field(default_factory=Counter)
    # of the layer at hand: its keyword arguments before it ran, what is recorded beside, its run if it runs again
    before: dict[str, Any] = field(default_factory=dict)
    recorded: Recorded = field(default_factory=lambda: Recorded({}))
    current: LayerRun | None = None
    # its input, with a gradient to come, if its activations are kept
    leaf: Tensor | None = None
    # whether the graph of its weights is kept
    keeps: bool = False
    # and the numbers of what hooks of the user's saw in it
    tapped: list[int] = field(default_factory=list)

    @property
    def bottom(self) -> Tensor | None:
        """The lowest layer's input, if something below trains through it: a leaf is only enable_input_require_grads."""
        return self.start if self.start.grad_fn is not None else None

    def mark(self, held: Tensor) -> Tensor:
        marked = self._marked(held)
        if self.current is not None:
            self.current.handed[self.marks] = marked
        return marked

    def tap(self, held: Tensor) -> Tensor:
        """Mark what a module within the layer at hand returns."""
        self.tapped.append(self.marks + 1)
        return self._marked(held)

    def close_layer(self) -> None:
        """Called after all else that it hands on is marked."""
        if self.current is not None:
            self.current.handed |= dict.fromkeys(self.tapped)
        self.tapped, self.leaf = [], None

    def _marked(self, held: Tensor) -> Tensor:
        self.marks += 1
        return Mark.apply(held.detach(), self.ground, self.arrived, self.marks)  # type: ignore[return-value]

    def hooked(self) -> dict[int, bool]:
        """Marks, by number, of what has hooks or retains its gradient; whether it has hooks."""
        handed = [(number, mark) for run in self.runs for number, mark in run.handed.items() if mark is not None]
        # what came to a layer may have been moved to its device on the way
        handed += [(BOTTOM, run.origin) for run in self.runs[1:]]
        return {
            number: bool(mark._backward_hooks) for number, mark in handed if mark._backward_hooks or mark.retains_grad
        }

    def settle(self, stack: Any, last: int | None) -> Descent:
        """Carry the errors that have arrived down through layer `last`, each time that it ran, or go on from where this
        backward was; None: to the end."""
        backward = backward_under_way()
        if self.begun is None or self.begun[0] != backward:
            if TOP not in self.arrived.errors:
                raise RuntimeError(NOT_TOP)
            runs = list(zip(self.runs, self.stored, strict=True))
            errors, self.arrived.errors, self.stored = self.arrived.errors, {}, ()
            self.begun = backward, *stack.settle(self, runs, errors)
            self.left = Counter(run.index for run, _ in runs)
        _, descent, steps = self.begun
        # one that did not run has nothing to hand out; hops in parallel are done with all layers at once
        if last is None or self.left[last] or self.way.settle == "relax":
            self.arrived.settling = True
            try:
                for index in steps:
                    self.left[index] -= 1
                    if index == last and not self.left[index]:
                        break
            finally:
                self.arrived.settling = False
        if last is not None:
            return descent
        self.begun = None
        if descent.below is not None:
            # one that was carried as it is comes from the top layer's device
            descent.below = descent.below.to(self.start.device, self.start.dtype)
        if not keeps_graph():
            self.let_go()
        return descent

    def let_go(self) -> None:
        """Of the hidden states: the graph is freed, and whoever keeps the loss should not keep them."""
        self.runs, self.before, self.current, self.start = [], {}, None, self.ground


class Ground(torch.autograd.Function):
    """Below the decoder layers, one for each layer that trains, which stand on each other: when all errors have arrived
    at the marks, the backward of the top layer's comes first, and each settles down to its layer and hands out the
    gradients there. So autograd is done with them (sums, hooks of parameters, DDP's buckets) before the sweep goes on.

    Args:
        last: the layer; None: the lowest that trains, with which all is settled.
        under: the ground of the next such layer below; of the lowest, the lowest layer's input if that trains.
    """

    @staticmethod
    def forward(ctx, stack: Any, tape: Tape, last: int | None, under: Tensor | None, *parameters: Tensor):
        # weakly: the tape holds marks, which hang on this node
        ctx.stack, ctx.tape, ctx.last, ctx.parameters = stack, weakref.ref(tape), last, parameters
        ctx.device = tape.start.device
        ctx.set_materialize_grads(False)
        return torch.zeros((), device=ctx.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, reached: Tensor | None):
        if reached is None:  # on the way to the bottom while this settles
            return (None,) * (4 + len(ctx.parameters))
        tape = ctx.tape()
        if tape is None:
            raise RuntimeError(NOT_TOP)
        descent = tape.settle(ctx.stack, ctx.last)
        below = descent.below if ctx.last is None else torch.zeros((), device=ctx.device)
        # a parameter that no layer used has none, as under autograd; a bank that no row reached was given zeros
        return None, None, None, below, *(descent.found.pop(id(p), None) for p in ctx.parameters)


class Mark(torch.autograd.Function):
    """What a layer below the top hands on."""

    @staticmethod
    def forward(ctx, held: Tensor, ground: Tensor, arrived: Arrivals, number: int) -> Tensor:
        ctx.arrived, ctx.number, ctx.device = arrived, number, ground.device
        return held.view_as(held)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta: Tensor):
        if ctx.arrived.settling:
            return None, None, None, None
        ctx.arrived.add(ctx.number, delta)
        return None, torch.zeros((), device=ctx.device), None, None


class Top(torch.autograd.Function):
    """The top layer's output; the owner of the tape."""

    @staticmethod
    def forward(ctx, top: Tensor, ground: Tensor, tape: Tape) -> Tensor:
        ctx.tape = tape
        # saved through autograd: freed with the graph, checked against writes in place
        ctx.save_for_backward(*(run.x for run in tape.runs))
        for run in tape.runs:
            run.x = None  # type: ignore[assignment]
        return top.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, delta: Tensor):
        ctx.tape.stored = ctx.saved_tensors
        ctx.tape.arrived.add(TOP, delta)
        return None, torch.zeros((), device=ctx.tape.ground.device), None
