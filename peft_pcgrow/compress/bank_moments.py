"""Second moments of what enters each slice of a grown bank, as the text at hand uses it.

Shapes: N slices of a bank, I inputs, T tokens, H hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures import experts, run_rows

# a stack of a layer
Place: TypeAlias = tuple[int, str]
# sums over rows, each weighted as its expert's output is, `[N, I, I]`
Moments: TypeAlias = dict[Place, Tensor]


@contextmanager
def input_moments(
    layers: Sequence[PCGrowExperts], adapter: str, moments: Moments, keep: Sequence[Tensor]
) -> Iterator[None]:
    """Inside, one forward pass over each batch adds to `moments` what enters an adapter's slices.

    Args:
        layers: those that the adapter grows, while it is active.
        keep: of each batch in its order, which of its tokens are not padding, `[T]` bool.
    """
    handles = [layer.register_forward_pre_hook(partial(_see, adapter, moments, iter(keep))) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _see(adapter: str, moments: Moments, kept: Iterator[Tensor], layer: PCGrowExperts, args: tuple) -> None:
    hidden, index, weight = args
    birth, held = layer.births[adapter], layer.pieces(layer.births[adapter])
    grown = run_rows.with_bank(layer.base_layer, layer.weights(adapter))
    real = next(kept).to(hidden.device)
    passes = layer.margin(adapter, hidden) > 0 if birth.spawned else real
    entering: dict[int, dict[str, Tensor]] = {}
    for place, expert in enumerate(birth.grown):
        mine = (index == expert) & (real & passes if expert in birth.spawned else real).unsqueeze(1)
        token, choice = torch.where(mine)
        inputs = experts.stack_inputs(grown, hidden[token].float(), place)
        # an expert's output counts as much as it is weighted
        entering[expert] = {stack: x * weight[token, choice, None].float() for stack, x in inputs.items()}
    for stack in held.keys() & next(iter(entering.values())).keys():
        pieces = held[stack]
        for n, expert in enumerate(pieces.experts.tolist()):
            x = entering[expert][stack]
            key = layer.layer_index, stack
            if key not in moments:
                moments[key] = x.new_zeros(len(pieces.experts), x.shape[1], x.shape[1])
            moments[key][n] += x.mT @ x
