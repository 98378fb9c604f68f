"""How blocks that do not follow transformers' experts contract are made to, in place: what would change, a trial of it
that changes nothing, and the change itself.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.host import OLD_FORWARD, REPACKS
from peft_pcgrow.atomic import completed

# tokens that a block is tried on
TRIED = 3


@dataclass(frozen=True, eq=False)
class Change:
    """What makes `module` an instance of a subclass that `mixin` is mixed into, with some more attributes."""

    module: Any
    mixin: type
    attributes: Mapping[str, Any]

    def make(self, module: Any) -> None:
        for name, value in self.attributes.items():
            setattr(module, name, value)
        change_class(module, _adopted_class(self.mixin, type(module)))

    def twin(self) -> Any:
        """A module that shares all that this one holds, and is changed while this one is not."""
        made = copy.copy(self.module)
        made._modules = dict(self.module._modules)
        # accelerate's hooks of a model on several devices call the module that they were given
        if isinstance(hooked := made.__dict__.get("forward"), partial) and self.module in hooked.args:
            made.forward = partial(hooked.func, made)
        self.make(made)
        return made


@dataclass(frozen=True, eq=False)
class Adoption:
    """A block that does not follow the contract, and what makes it; nothing has changed yet.

    Attributes:
        block: the change of the block, which gives it a child `experts` unless that is `own`.
        own: the change of the experts module that it has already; None: it has none.
        twin: the block as it would be. It holds the block's own weights, and nobody calls it.
    """

    block: Change
    own: Change | None = None
    twin: Any = field(init=False)

    def __post_init__(self) -> None:
        twin = self.block.twin()
        if self.own is not None:
            twin._modules["experts"] = self.own.twin()
        object.__setattr__(self, "twin", twin)

    def differs(self, width: int, like: Tensor) -> bool:
        """Whether the block is known to compute something else then: both are tried on random tokens.

        Args:
            width: of what the block takes. like: a tensor of its dtype, where its weights are.
        """
        before = _tried(self.block.module, width, like)
        return before is not None and _differ(before, _tried(self.twin, width, like))

    def perform(self) -> Any:
        """Change the block, unless that was done meanwhile; gives it."""
        completed(self._perform)
        return self.block.module

    def _perform(self) -> None:
        for change in (self.own, self.block):
            if change is not None and not isinstance(change.module, change.mixin):
                change.make(change.module)


@cache
def _adopted_class(mixin: type, kind: type) -> type:
    held = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduced}
    return type(kind.__name__, (mixin, kind), held)


def _reduced(module: Any, protocol: Any) -> Any:
    """Pickle looks classes up by name, and finds the architecture's: say how this one is made."""
    made = type(module)
    if made.__dict__.get("__reduce_ex__") is not _reduced:  # packed: a class of that one
        return object.__reduce_ex__(module, protocol)
    return _empty, made.__bases__, module.__dict__


def _empty(mixin: type, kind: type) -> Any:
    made = _adopted_class(mixin, kind)
    return made.__new__(made)  # type: ignore[call-overload]


def innermost(module: Any) -> Any:
    """Without the wrappers of adapters."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def change_class(module: Any, kind: type) -> None:
    """Make a module an instance of another class, for accelerate's hooks of a model on several devices too."""
    module.__class__ = kind
    if OLD_FORWARD in module.__dict__:
        setattr(module, OLD_FORWARD, type(module).forward.__get__(module))


@torch.no_grad()
def _tried(block: nn.Module, width: int, like: Tensor) -> Any:
    """The block's output for some random tokens `[1, TRIED, width]`; None where there are no values to compute with."""
    if like.is_meta:
        return None
    x = torch.randn(1, TRIED, width, generator=torch.Generator().manual_seed(0), device="cpu").to(
        like.device, like.dtype
    )
    with _evaluating(block):
        try:
            return block(x)
        except (TypeError, LookupError, AttributeError):  # it takes more than tokens
            return ()


def _differ(before: Any, after: Any) -> bool:
    """Whether two outputs of `_tried` are different, or no outputs of tokens."""
    if isinstance(before, tuple) and isinstance(after, tuple) and before and after:
        before, after = before[0], after[0]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return True
    return not torch.equal(before.nan_to_num(), after.nan_to_num())


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    """Without dropout and the like. bitsandbytes' layers pack their weights anew when they evaluate on some CPUs."""
    were = {m: m.training for m in block.modules() if not hasattr(m, REPACKS)}
    for module in were:
        module.training = False
    try:
        yield
    finally:
        for module, training in were.items():
            module.training = training
