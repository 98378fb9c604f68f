"""Where the intermediate neurons of experts are in their stacks of weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StackLayout:
    """Where the intermediate neurons of an expert's stack are.

    Attributes:
        neurons: axis of a slice along which they lie, 0 or 1; None: the stack has none (the down projection's bias).
        copies: rows (or columns) of each neuron: 2 in a fused gate and up projection.
        interleaved: whether a neuron's copies are neighbours, rather than I apart.
    """

    neurons: int | None
    copies: int = 1
    interleaved: bool = False
