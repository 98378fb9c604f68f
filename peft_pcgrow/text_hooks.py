"""Hooks that tell newborns' gates how the tokens of each call stand in their texts."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_pcgrow.layer import PCGrowExperts
from peft_pcgrow.recompute import by_name
from peft_pcgrow.sequence import Sequence


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


def _keep_all_tokens(
    layers: Callable[[], list[PCGrowExperts]], _: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    gated = any(layer.spawned(name) for layer in layers() for name in layer.active_banks())
    if gated and kwargs.get("logits_to_keep") is not None:
        return args, {**kwargs, "logits_to_keep": 0}
    return None


def follow_calls(decoder_layer: nn.Module, layer: PCGrowExperts) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    """Let `layer` know how the tokens of each call stand in their texts.

    Also where only the inside of its decoder layer runs: transformers' gradient checkpointing recomputes without the
    decoder layer's own hooks.
    """
    inside = partial(_note_inside, layer)
    return (
        decoder_layer.register_forward_pre_hook(partial(_enter, layer), with_kwargs=True),
        decoder_layer.register_forward_hook(partial(_leave, layer), always_call=True),
        *(child.register_forward_pre_hook(inside, with_kwargs=True) for child in decoder_layer.children()),
    )


@torch.compiler.disable
def _enter(layer: PCGrowExperts, decoder_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if any(layer.spawned(name) for name in layer.active_banks()):
        layer.entered, layer.sequence = True, Sequence.of(layer.layer_index, *by_name(decoder_layer, args, kwargs))


@torch.compiler.disable
def _leave(layer: PCGrowExperts, *_: Any) -> None:
    layer.entered, layer.sequence = False, None


@torch.compiler.disable
def _note_inside(layer: PCGrowExperts, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The attention is handed all that the decoder layer is."""
    if not layer.entered and "attention_mask" in kwargs:
        layer.sequence = Sequence.of(layer.layer_index, args, kwargs)
