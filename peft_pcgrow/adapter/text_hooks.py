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
    may_attend,
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
        if not layer.disable_adapters and is_gated(layer):
            raise TypeError(UNKNOWN_CACHE.format("PagedAttentionCache"))
    return getattr(type(model), BATCHING)(model, *args, **kwargs)


def _keep_all_tokens(
    layers: Callable[[], list[PCGrowExperts]], _: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    if any(map(is_gated, layers())) and kwargs.get("logits_to_keep") is not None:
        return args, {**kwargs, "logits_to_keep": 0}
    return None


def enter(layer: PCGrowExperts, decoder_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A run of `layer`'s decoder layer begins: let it know how the tokens stand in their texts."""
    layer.call.end()
    layer.call.entered, layer.call.called = True, False
    if is_gated(layer):
        layer.call.sequence = TextPosition.of(layer.place, *by_name(decoder_layer, args, kwargs), layer.chunk)


def is_gated(layer: PCGrowExperts) -> bool:
    """Whether newborns are in use here."""
    born = any(birth.spawned for birth in layer.births.values())
    return born and any(layer.spawned(name) for name in layer.active_banks())


def follow_inside(decoder_layer: nn.Module, layer: PCGrowExperts) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    """Let `layer` know that also where only the inside of its decoder layer runs: transformers' gradient checkpointing
    recomputes it so, on whichever thread autograd uses."""
    layer.place, layer.chunk = (of(decoder_layer, layer.layer_index) for of in (cache_place, attention_chunk))
    inside, children = partial(_note_inside, layer), modules_inside(decoder_layer)
    return tuple(c.register_forward_pre_hook(inside, with_kwargs=True) for c in children if may_attend(c))


def _note_inside(layer: PCGrowExperts, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The attention is handed all that the decoder layer is."""
    known = layer.call.entered and not any(birth.lora for birth in layer.births.values())
    if not known and (hidden := entering(args, kwargs)) is not None and is_gated(layer):
        _enter_inside(layer, hidden, args, kwargs)  # type: ignore


@torch.compiler.disable
def _enter_inside(layer: PCGrowExperts, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
    if not layer.call.entered:
        layer.call.end()
        layer.call.sequence = TextPosition.of(layer.place, args, kwargs, layer.chunk)
    if not layer.call.passes:
        layer.note_entry(hidden)
