"""What a stack of experts' weights looks like where no such tensor exists: it is packed, or lies in several pieces."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class StackView:
    """Stands for a stack `[E, ...]`; it is never whole.

    `stack[expert]` and `stack[LongTensor]` make copies of single experts' slices.

    Args:
        shape: of the stack.
        like: a tensor on its device, of its dtype.
        read: gives one expert's slice.
        write: overwrites one expert's slice; None: this stack cannot be written to.
    """

    requires_grad = False

    def __init__(
        self,
        shape: torch.Size,
        like: Tensor,
        read: Callable[[int], Tensor],
        write: Callable[[int, Tensor], None] | None = None,
    ):
        self.shape, self.dtype, self.device = shape, like.dtype, like.device
        self.is_meta = like.is_meta
        self._read, self._write = read, write

    @property
    def read_only(self) -> bool:
        return self._write is None

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def detach(self) -> "StackView":
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Any) -> Tensor:
        if isinstance(chosen, Tensor) and chosen.dim() == 1:
            found = [self[int(expert)] for expert in chosen]
            return (
                torch.stack(found) if found else torch.empty(0, *self.shape[1:], dtype=self.dtype, device=self.device)
            )
        return self._read(int(chosen))

    def write(self, chosen: Tensor, values: Tensor) -> None:
        """Overwrite the slices of some experts, `[N, ...]`."""
        assert self._write is not None, "these weights are read-only"
        for expert, value in zip(chosen.tolist(), values, strict=True):
            self._write(expert, value)


class ViewedExperts:
    """What experts modules offer beyond the contract whose stacks are views: adopted ones, packed ones.

    Attributes:
        dense: stacks to use instead of their own, `[G, ...]` by name.
        packed: whether `pack` made them.
    """

    dense: Mapping[str, Tensor] | None = None
    packed = False

    @property
    @abstractmethod
    def stack_views(self) -> dict[str, Any]:
        """A `StackView`, or the dense stack, for each stack that is no parameter, by name."""

    @abstractmethod
    def replaced(self, stacks: Mapping[str, Tensor]) -> Any:
        """The module with dense stacks, `[G, ...]` by name, in the place of its own."""

    def takes_each_row(self, index: Tensor) -> bool:
        """Whether rows `index [T, K]` are not sorted, but each multiplied by a matrix that is read for it."""
        return False

    @abstractmethod
    def composed_once(self) -> AbstractContextManager[None]:
        """Inside, the weights are dense leaves, the same in every forward: their gradients can be asked for."""
