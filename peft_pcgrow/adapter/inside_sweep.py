"""Steps of an optimizer inside the sweep: a bank moves as soon as its gradient is whole, and the gradient goes.

So no more than one layer's gradients of banks are alive at once. What needs more than one of them is refused: sums over
several backwards, the scaling of a GradScaler, clipping where it would change something, averages over processes.
"""

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size, is_available, is_initialized

from peft_pcgrow.adapter.host import wrapper_of

GONE = (
    "this gradient is gone, it was applied inside the sweep: accumulation, clipping that bites, gradient scaling, or "
    "whatever else reads gradients after backward() needs inside_sweep=False; a Trainer needs max_grad_norm=0 and "
    "gradient_accumulation_steps=1"
)


class Applied(Tensor):
    """In the place of a gradient that has been applied: has its shape and norm, and no numbers.

    Its norm is there for those who watch it (a Trainer does in every step, by clipping to an infinite one).
    """

    norm_of: Tensor

    @staticmethod
    def __new__(cls, gradient: Tensor) -> "Applied":
        found = wrapper_of(cls, gradient.shape, dtype=gradient.dtype, device=gradient.device)
        found.norm_of = torch.linalg.vector_norm(gradient)
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Applied(shape={tuple(self.shape)}, norm={float(self.norm_of):.3g})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        first, *others = args
        if func is torch.ops.aten.linalg_vector_norm.default and others in ([], [2]) and not kwargs:
            return first.norm_of
        if func is torch.ops.aten.mul_.Tensor and isinstance(first, cls) and float(others[0]) == 1:
            return first
        raise RuntimeError(GONE)


def gradient_of(parameter: Tensor) -> Tensor | None:
    """What an optimizer is still to apply to a parameter."""
    return None if isinstance(parameter.grad, Applied) else parameter.grad


def step_inside_sweep(optimizer: torch.optim.Optimizer, banks: Iterable[nn.Parameter]) -> None:
    """From now on, as long as there is the optimizer, it steps `banks`, some of what it holds, inside the backward."""
    held = weakref.ref(optimizer)
    for bank in banks:
        handle = bank.register_post_accumulate_grad_hook(partial(_step, held))
        weakref.finalize(optimizer, handle.remove)
    optimizer.register_step_pre_hook(_forget)


@torch.compiler.disable
def _step(held: "weakref.ref[torch.optim.Optimizer]", bank: Tensor) -> None:
    optimizer, gradient = held(), gradient_of(bank)
    if optimizer is None or gradient is None:
        return
    if is_available() and is_initialized() and get_world_size() > 1:
        raise RuntimeError(
            "several processes train, and inside the sweep each would step by the gradients of its own batch: make the "
            "optimizer with inside_sweep=False"
        )
    gone, whole = Applied(gradient), optimizer.param_groups
    # for the step, all that it holds: so its hooks, and whoever watches it, see what it is about
    optimizer.param_groups = [{**g, "params": [bank]} for g in whole if any(p is bank for p in g["params"])]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = whole
    bank.grad = gone


def _forget(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The loop takes its step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = gradient_of(p)
