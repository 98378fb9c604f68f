"""Tell newborns' gates how the tokens of each call stand in their texts."""

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures.host import BATCHING
from peft_pcgrow.gates.text_position import (
    UNKNOWN_CACHE,
    TextPosition,
    attention_chunk,
    cache_place,
    entering,
    modules_inside,
)
from peft_pcgrow.settling.layer_run import by_name


def follow_whole_texts(
    model: nn.Module, lowest: nn.Module, layers: Callable[[], list[PCGrowExperts]]
) -> tuple[Any, ...]:
    """Let newborns' gates see all of a prompt.

    Layers that only reuse lower ones' keys (Gemma 4) are otherwise given no more of it than logits are wanted for.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and any(child is lowest for child in m)]
    holders = [m for m in model.modules() if any(child is held for child in m.children() for held in lists)]
    holders = [m for m in holders if "logits_to_keep" in inspect.signature(m.forward).parameters]
    hook = partial(_keep_all_tokens, layers)
    return tuple(holder.register_forward_pre_hook(hook, with_kwargs=True) for holder in holders)


def refuse_mixed_rows(model: Any, layers: Callable[[], list[PCGrowExperts]]) -> tuple[Any, ...]:
    """Let a model with newborns refuse continuous batching when it is asked for: an error in a forward would only end
    up in the log of transformers' thread, and answers come back empty."""
    if not hasattr(model, BATCHING):
        return ()
    setattr(model, BATCHING, partial(_batch_continuously, model, layers))
    return (SimpleNamespace(remove=partial(_forget, model)),)


def _forget(model: Any) -> None:
    # as often as it is asked, like torch's own handles
    model.__dict__.pop(BATCHING, None)


def _batch_continuously(model: Any, layers: Callable[[], list[PCGrowExperts]], *args: Any, **kwargs: Any) -> Any:
    for layer in layers():
        if not layer.disable_adapters and any(layer.spawned(name) for name in layer.active_banks()):
            raise TypeError(UNKNOWN_CACHE.format("PagedAttentionCache"))
    return getattr(type(model), BATCHING)(model, *args, **kwargs)


def _keep_all_tokens(
    layers: Callable[[], list[PCGrowExperts]], _: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    gated = any(layer.spawned(name) for layer in layers() for name in layer.active_banks())
    if gated and kwargs.get("logits_to_keep") is not None:
        return args, {**kwargs, "logits_to_keep": 0}
    return None


@torch.compiler.disable
def enter(layer: PCGrowExperts, decoder_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A run of `layer`'s decoder layer begins: let it know how the tokens stand in their texts."""
    gated = any(layer.spawned(name) for name in layer.active_banks())
    layer.call.end()
    layer.call.entered, layer.call.called = True, False
    called = by_name(decoder_layer, args, kwargs)
    layer.call.sequence = TextPosition.of(layer.place, *called, layer.chunk) if gated else None


def follow_inside(decoder_layer: nn.Module, layer: PCGrowExperts) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    """Let `layer` know that also where only the inside of its decoder layer runs: transformers' gradient checkpointing
    recomputes it so, on whichever thread autograd uses."""
    layer.place, layer.chunk = (of(decoder_layer, layer.layer_index) for of in (cache_place, attention_chunk))
    inside = partial(_note_inside, layer)
    return tuple(child.register_forward_pre_hook(inside, with_kwargs=True) for child in modules_inside(decoder_layer))


@torch.compiler.disable
def _note_inside(layer: PCGrowExperts, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The attention is handed all that the decoder layer is."""
    if (hidden := entering(args, kwargs)) is None:
        return
    if not layer.call.entered:
        layer.call.end()
        layer.call.sequence = TextPosition.of(layer.place, args, kwargs, layer.chunk)
    if not layer.call.passes:
        layer.note_entry(hidden)
