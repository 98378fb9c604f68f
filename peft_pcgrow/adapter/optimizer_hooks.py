"""The steps of every optimizer of the process, told to those who watch the parameters that it holds.

torch calls the hooks for whatever is a torch.optim.Optimizer. Nothing is asked of one but which parameters it holds,
until some of them are found to be a watcher's. Which those are is looked up at each step: models are copied, loaded and
cast, and then have others.
"""

import gc
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_watchers: "weakref.WeakSet[StepWatcher]" = weakref.WeakSet()
_hooked = False


class StepWatcher:
    """What is told of the steps of the optimizers that hold a parameter of its model."""

    model: nn.Module

    def watch(self) -> None:
        """From now on, as long as this is referred to."""
        _watchers.add(self)
        _hook_optimizers()

    def is_mine(self, optimizer: Any) -> bool:
        """Whether an optimizer holds a parameter of this model."""
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group.get("params", ())}
        return any(id(p) in held for p in self.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of its model, the likeliest first: this is asked twice a step."""
        return self.model.parameters()

    @abstractmethod
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are there, also where a closure makes them."""

    @abstractmethod
    def after_step(self, optimizer: torch.optim.Optimizer) -> None: ...


def held_anywhere() -> set[int]:
    """Ids of the parameters of all optimizers that there are."""
    found: set[int] = set()
    for held in gc.get_objects():
        if issubclass(type(held), torch.optim.Optimizer):
            groups = getattr(held, "param_groups", ())
            found |= {id(p) for group in groups for p in group.get("params", ())}
    return found


def moves(group: dict[str, Any]) -> bool | None:
    """Whether the rate of a group of parameters is above zero; None: it has none (Adafactor's relative steps, say)."""
    try:
        return float(group["lr"]) > 0
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None


def _hook_optimizers() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        register_optimizer_step_pre_hook(_before)  # type: ignore
        register_optimizer_step_post_hook(_after)  # type: ignore


def _mine(optimizer: torch.optim.Optimizer) -> list[StepWatcher]:
    """The watchers of the models whose optimizer this is."""
    found = [watcher for watcher in list(_watchers) if watcher.is_mine(optimizer)]
    # nothing can be read while a CUDA graph is recorded
    recorded = found and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return [] if recorded else found


@torch.compiler.disable
def _before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    watchers = _mine(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not (watchers and callable(closure)):
        _check(watchers, optimizer)
        return None
    # gradients are only there once it has run
    checked = partial(_checked, closure, watchers, optimizer)
    return ((args[0], checked, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": checked})


def _checked(closure: Callable[[], Any], watchers: list[StepWatcher], optimizer: torch.optim.Optimizer) -> Any:
    loss = closure()
    _check(watchers, optimizer)
    return loss


def _check(watchers: list[StepWatcher], optimizer: torch.optim.Optimizer) -> None:
    for watcher in watchers:
        watcher.before_step(optimizer)


@torch.compiler.disable
def _after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for watcher in _mine(optimizer):
        watcher.after_step(optimizer)
