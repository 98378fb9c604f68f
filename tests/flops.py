"""Floating-point operations as torch itself counts them, from what its operators are given."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Inside, `total` sums what FlopCounterMode would; that itself hooks every module, which settling does not bear.

    Of attention only the eager one is counted: CPUs run another in one operator that torch has no formula for.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


def counted(call: Callable[[], Any]) -> int:
    with Flops() as flops:
        call()
    return flops.total
