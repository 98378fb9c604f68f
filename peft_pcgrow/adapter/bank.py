"""The banks of grown experts: whole and in full width, or shrunk to what they add to the base's weights.

A shrunk bank stores, for each of its N slices, the slice minus the base's own, in few bits (see `Coding`), and nothing
else. Decoded, it is the base's slice plus that. Shapes: O outputs, I inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pcgrow_kernels import lowbit
from peft_pcgrow.settling.host import times_written

# what a config file calls that, and what one of an adapter in two thin factors said
KIND, FACTORS = "bits", "rank"
SHRUNK = (
    "adapter {!r} is shrunk and cannot be trained: what it adds to the base is stored in few bits. Train the adapter "
    "that it was shrunk from and shrink that again, or train another adapter beside it"
)


@dataclass(frozen=True)
class Coding:
    """How the slices of one stack are stored.

    Attributes:
        numbers: of each slice, its bits a weight, of `lowbit.WIDTHS`.
    """

    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(width in lowbit.WIDTHS for width in self.numbers):
            raise ValueError(f"{self.numbers} are no bits to store slices with: the adapter's config was altered")

    def __str__(self) -> str:
        return " ".join(map(str, self.numbers))


def codings(shrunk: Any, layer: int) -> dict[str, Coding] | None:
    """By stack, how a layer's bank is stored, from what an adapter's config says; None: it is not shrunk.

    Raises:
        ValueError: `shrunk` is not as `noted` gives it, lacks the layer, or is of factors.
    """
    if shrunk is None:
        return None
    if isinstance(shrunk, dict) and shrunk.get("kind") == FACTORS:
        raise ValueError(
            "this adapter was shrunk to factors (energy=), which are no longer read: shrink the adapter that it was "
            "made from again, with bits= or target="
        )
    try:
        if shrunk["kind"] != KIND:
            raise ValueError(f"stored in {shrunk['kind']!r}")
        stacks = shrunk["layers"][str(layer)].items()
        return {name: Coding(tuple(map(int, widths.split()))) for name, widths in stacks}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"shrunk={str(shrunk)[:80]!r} does not say how the bank of layer {layer} is stored: it is set by "
            "shrink_adapter; leave it out for a new adapter"
        ) from error


def noted(found: dict[int, dict[str, Coding]]) -> dict[str, Any]:
    """What `codings` reads, for a config file."""
    layers = {str(layer): {name: str(coding) for name, coding in stacks.items()} for layer, stacks in found.items()}
    return {"kind": KIND, "layers": layers}


class Bank(nn.Module):
    """One stack of grown experts, `weight [G, ...]`, in the base's layout."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def read(self, stack: Any, born: Callable[[], Tensor]) -> Tensor:
        return self.weight


class ShrunkBank(nn.Module):
    """One stack of grown slices, kept as packed deltas; it holds no parameter, so nothing of it trains.

    Args:
        shape: of the stack, `[N, O, I]`, `[N, I, O]` if `transposed`, or `[N, W]` of biases.
        coding: of each slice.
        packed: bytes, `[sum(sizes)]` uint8; zeros, still to be loaded, if None.

    Raises:
        ValueError: another number of slices than the coding has.
    """

    def __init__(self, shape: torch.Size, transposed: bool, coding: Coding, packed: Tensor | None = None):
        super().__init__()
        if shape[0] != len(coding.numbers):
            raise ValueError(
                f"a bank of {shape[0]} slices is said to be shrunk to {len(coding.numbers)}: the adapter's config was "
                "altered"
            )
        self.shape, self.coding = shape, coding
        self.turned = transposed and len(shape) == 3
        self.matrix = (1, shape[1]) if len(shape) == 2 else (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        self.sizes = [lowbit.size(*self.matrix, width) for width in coding.numbers]
        packed = torch.zeros(sum(self.sizes), dtype=torch.uint8, device="cpu") if packed is None else packed
        # bytes: what casts an adapter to another dtype leaves them alone
        self.register_buffer("packed", packed)
        self._decoded: tuple[Any, Tensor] | None = None

    def matrices(self) -> Tensor:
        """What is stored, `[N, O, I]` in fp32."""
        slices = zip(self.get_buffer("packed").split(self.sizes), self.coding.numbers, strict=True)
        return torch.stack([lowbit.decode(data, *self.matrix, width, dtype=torch.float32) for data, width in slices])

    def deltas(self) -> Tensor:
        """The same in the stack's shape and layout."""
        found = self.matrices()
        return (found.mT if self.turned else found).reshape(self.shape).contiguous()

    @torch.compiler.disable
    def read(self, stack: Any, born: Callable[[], Tensor]) -> Tensor:
        """The decoded weights, in the base's dtype: decoded once, and again when what they are made of has changed.

        Args:
            stack: the base's stack, whose state tells that. born: reads the base's own slices of it.
        """
        now = state_of(stack), state_of(self.get_buffer("packed"))
        if self._decoded is None or self._decoded[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                base = born()
                wide = torch.promote_types(base.dtype, torch.float32)
                weight = base.to(wide) + self.deltas().to(base.device, wide)
                self._decoded = now, weight.to(base.dtype)
        return self._decoded[1]

    def __getstate__(self) -> dict[str, Any]:
        # a copy decodes for itself, with its own base
        return {**self.__dict__, "_decoded": None}

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {KIND} {self.coding}"


def make_bank(weight: Tensor, transposed: bool, coding: Coding | None) -> Bank | ShrunkBank:
    """A bank of `weight`, or room for a shrunk one of its shape."""
    return Bank(weight) if coding is None else ShrunkBank(weight.shape, transposed, coding)


def as_matrices(stack: Tensor, transposed: bool) -> Tensor:
    """The slices of a stack as `[N, O, I]`; biases are matrices of one output."""
    if stack.dim() == 2:
        return stack.unsqueeze(1)
    return stack.mT.contiguous() if transposed else stack


def state_of(tensor: Any) -> tuple[Any, ...]:
    """What changes when a tensor is moved, cast, replaced, or written to (unless through `.data`)."""
    if not isinstance(tensor, Tensor):  # experts that are packed themselves: nobody writes to them
        return tensor.device, tensor.dtype
    return tensor.data_ptr(), times_written(tensor), tensor.device, tensor.dtype
