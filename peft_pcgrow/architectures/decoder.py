"""Where in a model something is: which list of layers, which part."""

from collections.abc import Mapping
from typing import Any

from torch import nn

# what to do where a module's forward was replaced, which would never call grown experts
UNPATCHED = (
    "load the model with use_kernels=False, and apply Liger's kernels with swiglu=False (Trainer, TRL: "
    "liger_kernel_config={'swiglu': False})"
)


def layer_list(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The outermost ModuleList on the path to `name`."""
    parts = name.split(".")
    ancestors = (".".join(parts[:length]) for length in range(len(parts)))
    return next((ancestor for ancestor in ancestors if isinstance(modules[ancestor], nn.ModuleList)), None)


def decoder_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """The list of the language model's layers: the longest that is in no other list."""
    decoder = _decoder(model) or model
    prefix = next((f"{name}." for name, module in modules.items() if module is decoder and name), "")
    lists = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and name.startswith(prefix) and layer_list(name, modules) is None
    ]
    return max(lists, key=lambda name: len(list(modules[name].children())), default=None)


def in_decoder(model: nn.Module, modules: Mapping[str, nn.Module], found: dict[str, Any]) -> dict[str, Any]:
    """Those of `found` that are in the language model, where other parts have some too; all, if it has none."""
    decoder = _decoder(model)
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    return {name: module for name, module in found.items() if id(modules[name]) in inside} or found


def _decoder(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_decoder", None)
    decoder = get() if get is not None else None
    return decoder if isinstance(decoder, nn.Module) else None
