"""Where a kernel in Triton runs instead of its definition in torch.

A file of an op holds both, the definition first. Importing it imports no Triton: `Kernel` does, at its first launch.
"""

from collections.abc import Callable
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor

# numbers at once in a program, at most
WIDEST = 1024
# compute capabilities of cards on which examples/check_kernels.py found every kernel right, and faster than its
# definition, in bf16 (an H100); elsewhere definitions run
TRIED: frozenset[tuple[int, int]] = frozenset({(9, 0)})
_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int32)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def use_triton(first: Tensor, *others: Tensor) -> bool:
    """Whether an op on these tensors runs its kernel: all on one GPU of a kind that was `TRIED`, bf16 among them or no
    floats, Triton installed.

    Not while torch.compile looks on: it fuses the definitions itself.
    """
    given = (first, *others)
    if not first.is_cuda or any(t.dtype not in _DTYPES or t.device != first.device for t in given):
        return False
    floats = {t.dtype for t in given if t.is_floating_point()}
    if floats and torch.bfloat16 not in floats:
        return False
    if torch.cuda.get_device_capability(first.device) not in TRIED:
        return False
    return _installed() and not torch.compiler.is_compiling()


def block(size: int) -> int:
    """Numbers that a program takes at once of a row of `size`: a power of two."""
    return min(1 << max(size - 1, 0).bit_length(), WIDEST)


def rows_of(x: Tensor) -> Tensor:
    """`x` with its last axis in one piece, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Language(type):
    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"triton.language.{name} before any kernel was launched: launch it, do not call it")


class tl(metaclass=_Language):
    """Stands for `triton.language` in a module of kernels until its first launch."""

    constexpr: TypeAlias = Any


class Kernel:
    """A function in Triton's language, compiled when it is first launched.

    Its module's `tl` becomes Triton's language then, and `libdevice`, if it names that, CUDA's own functions.
    With TRITON_INTERPRET=1, set before anything imports Triton, it runs on CPUs: for tests, in fp32.
    """

    def __init__(self, function: Callable[..., None]):
        self.function = function

    @cached_property
    def compiled(self) -> Any:
        import triton
        import triton.language as language
        from triton.language.extra import libdevice

        held = self.function.__globals__
        held["tl"] = language
        if "libdevice" in held:
            held["libdevice"] = libdevice
        return triton.jit(self.function)

    @staticmethod
    def options(constants: dict[str, Any]) -> dict[str, Any]:
        """How it is compiled, for programs of `columns` (times `rows`) numbers at once.

        Products and sums are not fused: a kernel rounds where its definition does. No number is two warps': one could
        read what the other has overwritten.
        """
        warps = constants["columns"] * constants.get("rows", 1) // 256
        return {"num_warps": min(max(warps, 1), 4), "enable_fp_fusion": False}

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Run a grid of programs where the first argument, a tensor, is; nothing if it has none."""
        with torch.cuda.device_of(args[0]):
            if all(grid):
                self.compiled[grid](*args, **constants, **self.options(constants))
