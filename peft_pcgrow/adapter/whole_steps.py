"""Steps of a tuner that happen in all layers or in none: merging, unmerging, unloading, adding an adapter."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.adapter.host import AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.atomic import all_or_nothing, completed

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class WholeSteps(BaseTuner):
    """A tuner that is interrupted between its steps only."""

    # hooks on the model, and the layers that this tuner made, by decoder layer
    _handles: tuple[torch.utils.hooks.RemovableHandle, ...] = ()
    _created: Mapping[int, tuple[PCGrowExperts, ...]] = MappingProxyType({})

    def _let_go(self) -> None:
        self._remove_hooks()

    def _remove_hooks(self, but: tuple[torch.utils.hooks.RemovableHandle, ...] = ()) -> None:
        for handle in self._handles[len(but) :]:
            handle.remove()
        self._handles = but

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Refuse before any layer has been written."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(safe_merge, adapter_names)
        with all_or_nothing() as undo:
            undo += merging(self.model)
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        with all_or_nothing() as undo:
            undo += merging(self.model)
            super().unmerge_adapter()

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ):
        if merge:
            self._check_merge(safe_merge, adapter_names)
        with all_or_nothing() as undo:
            undo.append(assembled(self.model))
            undo += merging(self.model) if merge else []
            unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        completed(self._let_go)
        return unloaded

    @contextmanager
    def or_not_at_all(self, model: nn.Module, adapter: str) -> Iterator[None]:
        """Inside, an adapter is added."""
        with all_or_nothing() as undo:
            if not any(adapter in layer.births for layer in model.modules() if isinstance(layer, PCGrowExperts)):
                undo.append(partial(self.peft_config.pop, adapter, None))  # type: ignore
            # the first one: nothing is left of this tuner
            undo.append(partial(self._remove_hooks, self._handles) if self._handles else self._let_go)
            undo.append(without(model, adapter))
            undo.append(partial(setattr, self, "_created", self._created))
            yield


def merging(model: nn.Module) -> list[Callable[[], None]]:
    """For each adapted layer, what merges again exactly what is merged now; bit for bit also where the layer's own
    tuner could not (LoRA subtracts what it added)."""
    found: list[Callable[[], None]] = []
    for layer in model.modules():
        if isinstance(layer, PCGrowExperts):
            found.append(layer.merging())
        elif isinstance(layer, BaseTunerLayer):
            found.append(_written(layer))
    return found


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Inside, the experts are the base's own, which banks are copies of and digests are about; what was merged before
    is merged again afterwards."""
    layers = [layer for layer in model.modules() if isinstance(layer, PCGrowExperts) and layer.merged]
    again = [layer.merging() for layer in layers]
    try:
        for layer in layers:
            layer.unmerge()
        yield
    finally:
        completed(partial(_call_all, again))


def _call_all(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()


def _written(layer: Any) -> Callable[[], None]:
    base, merged = layer.get_base_layer(), list(layer.merged_adapters)
    held = dict(base._parameters)
    values = {name: p.detach().clone() for name, p in held.items() if p is not None and not p.is_meta}
    return partial(_write, layer, base, merged, held, values)


@torch.no_grad()
def _write(layer: Any, base: Any, merged: list[str], held: dict[str, Any], values: dict[str, Tensor]) -> None:
    base._parameters.update(held)
    for name, value in values.items():
        held[name].data.copy_(value)
    layer.merged_adapters[:] = merged


def assembled(model: nn.Module) -> Callable[[], None]:
    """What puts a model's modules, and the note of its adapters, back to where they are now."""
    children = {module: dict(module._modules) for module in model.modules()}
    noted = {name: model.__dict__[name] for name in ("peft_config",) if name in model.__dict__}
    return partial(_assemble, model, children, noted)


def _assemble(model: nn.Module, children: dict[nn.Module, dict[str, Any]], noted: dict[str, Any]) -> None:
    for module, held in children.items():
        module._modules.clear()
        module._modules.update(held)
    model.__dict__.update(noted)


def without(model: nn.Module, adapter: str) -> Callable[[], None]:
    """What takes an adapter out again that is about to be added: the wrappers made for it, its part in those that are
    there already, and what it froze."""
    layers: dict[Any, Any] = {m: m.active_adapter for m in model.modules() if isinstance(m, WRAPPERS)}
    new = not any(adapter in layer.births for layer in layers if isinstance(layer, PCGrowExperts))
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    return partial(_take_out, model, adapter, layers, new, trains)


def _take_out(
    model: nn.Module, adapter: str, layers: dict[Any, Any], new: bool, trains: dict[nn.Parameter, bool]
) -> None:
    for layer, active in layers.items():
        if isinstance(layer, PCGrowExperts) and new and adapter in layer.births:
            layer.delete_adapter(adapter)
            layer._active_adapter = active
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, WRAPPERS) and child not in layers:
                held: Any = child
                module._modules[name] = held.base_layer if isinstance(held, BaseTunerLayer) else held.original_module  # type: ignore
    for parameter, train in trains.items():
        parameter.requires_grad_(train)
