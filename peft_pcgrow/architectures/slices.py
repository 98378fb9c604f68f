"""Pieces of stacks of experts: what an adapter may hold of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pieces:
    """Slices of one stack `[E, ...]`, N of them.

    Attributes:
        experts: whose each piece is, `[N]` integer.
        labels: what each is called beside its expert; empty for whole experts.
    """

    experts: Tensor
    labels: tuple[str, ...]

    def to(self, device: torch.device, experts: Tensor | None = None) -> "Pieces":
        """The same on a device; `experts`: where these are in another stack."""
        return replace(self, experts=(self.experts if experts is None else experts).to(device))

    def read(self, stack: Tensor) -> Tensor:
        """A copy of them, `[N, ...]`."""
        return stack[self.experts.to(stack.device)]

    def put(self, stack: Tensor, pieces: Tensor) -> Tensor:
        """`stack` with `pieces [N, ...]` in their places: another tensor, of the same strides, differentiable."""
        return stack.index_put((self.experts.to(stack.device),), pieces.to(stack.device, stack.dtype))

    def write(self, stack: Tensor, pieces: Tensor) -> None:
        """Overwrite them in place."""
        stack[self.experts.to(stack.device)] = pieces.to(stack.device, stack.dtype)
