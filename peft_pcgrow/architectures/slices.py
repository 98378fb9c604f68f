"""Pieces of stacks of experts: what an adapter may hold of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of one stack `[E, ...]`, N of them: whole slices, or neurons of an expert each.

    Attributes:
        experts: whose each piece is, `[N]` integer.
        labels: what each is called beside its expert; empty for whole experts.
        axis: axis of the stack that neurons lie along. places: where on it those of each piece lie, `[N, P]` integer;
            None: pieces are whole slices.
        inputs: whether the neurons are what enters the matrix.
    """

    experts: Tensor
    labels: tuple[str, ...]
    axis: int = 1
    places: Tensor | None = None
    inputs: bool = False

    def to(self, device: torch.device, experts: Tensor | None = None) -> "Pieces":
        """The same on a device; `experts`: where these are in another stack."""
        places = None if self.places is None else self.places.to(device)
        return replace(self, experts=(self.experts if experts is None else experts).to(device), places=places)

    def read(self, stack: Tensor) -> Tensor:
        """A copy of them, `[N, ...]`."""
        found = stack.transpose(1, self.axis)[self._index(stack)].transpose(1, self.axis)
        return found if self.places is None else found.contiguous()

    def put(self, stack: Tensor, pieces: Tensor) -> Tensor:
        """`stack` with `pieces [N, ...]` in their places: another tensor, of the same strides, differentiable."""
        view, values = stack.transpose(1, self.axis), pieces.to(stack.device, stack.dtype).transpose(1, self.axis)
        return view.index_put(self._index(stack), values).transpose(1, self.axis)

    def write(self, stack: Tensor, pieces: Tensor) -> None:
        """Overwrite them in place."""
        values = pieces.to(stack.device, stack.dtype).transpose(1, self.axis)
        stack.transpose(1, self.axis)[self._index(stack)] = values

    def _index(self, stack: Tensor) -> tuple[Tensor, ...]:
        experts = self.experts.to(stack.device)
        return (experts,) if self.places is None else (experts.unsqueeze(1), self.places.to(stack.device))
