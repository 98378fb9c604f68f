"""Batches whose samples each name the adapter that computes them: `model(..., adapter_names=["law", "__base__"])`.

As with PEFT's LoRA, in evaluation only. The names belong to one call: other threads' calls know nothing of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.adapter.dispatch import Branch
from peft_pcgrow.adapter.host import AuxiliaryTrainingWrapper, BaseTunerLayer, LoraLayer

# what samples that no adapter computes are named
BASE = "__base__"
# of `modules_to_save`, what PEFT can run by several adapters in one batch
MIXABLE = (nn.Linear, nn.Embedding)


@dataclass(eq=False)
class Names:
    """The adapters of the samples of one call.

    Attributes:
        given: one for each sample. inside: ids of the modules that the call is for.
        expands: whether generation may run several beams, or sequences, of each sample.
    """

    given: Sequence[str]
    inside: frozenset[int]
    expands: bool
    _masks: dict[tuple, Tensor] = field(default_factory=dict)

    def each(self, total: int) -> list[str]:
        """The adapter of each of `total` rows or tokens of the batch; those of one sample are next to each other."""
        return [name for name in self.given for _ in range(total // len(self.given))]

    def tokens(self, name: str, total: int, device: torch.device) -> Tensor:
        """Which of a layer's tokens are an adapter's, `[T]` bool."""
        key = (name, total, device)
        if key not in self._masks:
            self._masks[key] = torch.tensor([each == name for each in self.each(total)], device=device)
        return self._masks[key]


_call: ContextVar[Names | None] = ContextVar("adapter_names", default=None)
# calls under way, in all threads: compilers can follow this, and nothing more is asked where there are none
_under_way: list[Names] = []


def names_for(module: nn.Module) -> Names | None:
    """The adapters that the call at hand names, if it names some for `module`."""
    return _looked_up(module) if _under_way else None  # type: ignore


def adapters_in_use(layer: BaseTunerLayer) -> list[str]:
    """The adapters that the call at hand names, or those that are active."""
    names = names_for(layer) if _under_way else None  # type: ignore[arg-type]
    return layer.active_adapters if names is None else [*dict.fromkeys(names.given)]


def for_their_samples(layer: nn.Module, branches: list[tuple[str, Branch]], hidden: Tensor) -> list[tuple[str, Branch]]:
    """Branches and their adapters, each for tokens of `hidden [T, H]` that are its adapter's only, if samples name
    some."""
    if (names := names_for(layer)) is None:
        return branches
    own = {name: names.tokens(name, len(hidden), hidden.device) for name, _ in branches}
    return [(n, replace(b, passes=own[n] if b.passes is None else b.passes & own[n])) for n, b in branches]


@torch.compiler.disable
def _looked_up(module: nn.Module) -> Names | None:
    found = _call.get()
    return found if found is not None and id(module) in found.inside else None


@contextmanager
def adapters_named(
    model: nn.Module, known: Sequence[str], ours: Any, args: tuple, kwargs: dict[str, Any]
) -> Iterator[None]:
    """Inside, each sample is computed by the adapter that `kwargs["adapter_names"]` names for it.

    Args:
        model: holds adapters of the names `known`, in tuner layers of the classes `ours`.
        args, kwargs: what its forward or generate is called with.

    Raises:
        ValueError: a name that is not known, another number of names than of samples, adapters that are merged, a model
            in training mode, or modules beside the experts that cannot serve several adapters in one batch.
        TypeError: names that are no list of strings.
    """
    names = kwargs["adapter_names"]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list with the name of an adapter for each sample, got {names!r}")
    if model.training:
        raise ValueError("adapter_names= is for evaluation, and the model is in training mode: call model.eval() first")
    if unknown := sorted({*names} - {BASE, *known}):
        raise ValueError(f"adapter_names has {unknown}; the adapters here are {[*known]}, and {BASE!r} stands for none")
    # a forward's own inputs do not get here, those of generate do
    given = next((kwargs[key] for key in ("input_ids", "inputs_embeds", "inputs") if kwargs.get(key) is not None), None)
    given = args[0] if args else given
    if isinstance(given, Tensor) and len(given) != len(names):
        raise ValueError(f"adapter_names has {len(names)} names for {len(given)} samples: give one for each")
    inside = [*model.modules()]
    _check(inside, ours, names)
    found = Names([*names], frozenset(map(id, inside)), given is not None)
    for module in inside:
        theirs = isinstance(module, (AuxiliaryTrainingWrapper, LoraLayer))
        if theirs and _hand_over not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_hand_over, with_kwargs=True)
    token = _call.set(found)
    _under_way.append(found)
    try:
        yield
    finally:
        _under_way.remove(found)
        _call.reset(token)


def check_samples(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of the lowest decoder layer: raise ValueError if the names are not one for each sample."""
    if (names := names_for(layer)) is None:
        return
    samples, given = len(args[0] if args else kwargs["hidden_states"]), len(names.given)
    if samples != given and (not names.expands or samples % given):
        raise ValueError(f"adapter_names has {given} names for {samples} samples: give one for each")


def _hand_over(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """PEFT's own layers are told by an argument; its copies of other modules fail on names they have no copy for."""
    if (names := names_for(module)) is None or not args:
        return None
    held: Any = getattr(module, "_adapters", names.given)
    own = [name if name in held else BASE for name in names.each(len(args[0]))]
    return args, {**kwargs, "adapter_names": own}


def _check(inside: Sequence[nn.Module], ours: Any, names: Sequence[str]) -> None:
    for module in inside:
        births = getattr(module, "births", {})
        if young := [name for name in births if name in names and births[name].parents]:
            raise ValueError(
                f"adapter {young[0]!r} has newborns of another adapter's newborns, and a sample can name one adapter "
                "only: activate both, and leave adapter_names out"
            )
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError("adapter_names= needs adapters that are not merged: call unmerge_adapter() first")
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ours):
            raise ValueError(
                f"adapter_names= does not reach {type(module).__name__} beside the grown experts: run the samples of "
                "one adapter at a time, after set_adapter"
            )
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module.original_module, MIXABLE):
            raise ValueError(
                f"adapter_names= cannot mix adapters in one batch whose modules_to_save are "
                f"{type(module.original_module).__name__}: run the samples of one adapter at a time, after set_adapter"
            )
