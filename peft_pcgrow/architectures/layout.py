"""Where the intermediate neurons of experts are in their stacks of weights."""

from dataclasses import dataclass

from torch import Tensor


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

    def split(self, stack: Tensor, block: int | None) -> Tensor:
        """`[..., a, b]` -> `[..., I / block, block * copies, other]`: the part of each block of neurons.

        `block=None` is one block of all neurons; the order of rows within a part is of no account.
        """
        if self.neurons is None:
            raise ValueError("this stack has no intermediate neurons")
        rows = stack if self.neurons == 0 else stack.mT
        width = rows.shape[-2] // self.copies
        size = block or width
        if width % size:
            raise ValueError(
                f"block={size} does not divide the experts' {width} intermediate neurons; choose from {divisors(width)}"
            )
        if self.copies == 1 or self.interleaved:
            return rows.unflatten(-2, (width // size, size * self.copies))
        apart = rows.unflatten(-2, (self.copies, width // size, size))
        return apart.transpose(-4, -3).flatten(-3, -2)


def divisors(width: int) -> list[int]:
    return [size for size in range(1, width + 1) if width % size == 0]
