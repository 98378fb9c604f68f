"""Settling where an engine gathers sharded weights by hooks of modules (FSDP2): autograd goes through the layers.

Such hooks stand at the borders of a layer's graph: weights are gathered when an error arrives at its output, and their
gradients are sent on when it has left its input. A layer that runs again by torch's own checkpoint, inside of them, has
the sweep's gradients at the sweep's memory, and sends no byte more than backprop does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from peft_pcgrow.settling.descent import Way
from peft_pcgrow.settling.host import saving_hooks
from peft_pcgrow.settling.layer_run import by_name, hidden_of, refuse_filled_cache, without_cache
from peft_pcgrow.settling.side_tensors import swap

# called before and after each run of a layer's own code
Around = tuple[Callable[[tuple, dict[str, Any]], None], Callable[[bool], None]]


def run(
    way: Way,
    place: tuple[int, int],
    layer: nn.Module,
    forward: Callable[..., Any],
    around: Around,
    keeps: Callable[[list[Tensor]], bool],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """A layer's forward, to be settled as `way` says.

    Args:
        place: the layer's index, and how many there are.
        keeps: of the layer's trainable weights, whether a graph for these alone is kept rather than made again.
    """
    index, total = place
    refuse_filled_cache(kwargs)
    args, kwargs = by_name(layer, args, without_cache(kwargs))
    own = partial(_own, forward, around)
    # others may checkpoint it already: around it, or within its own forward
    again = not (index >= total - way.keep or saving_hooks(True) or getattr(layer, "gradient_checkpointing", False))
    if index >= way.lowest_exact(total):
        return checkpoint(own, *args, use_reentrant=False, **kwargs) if again else own(*args, **kwargs)
    x = args[0] if args else kwargs["hidden_states"]
    weights: list[Tensor] = [p for p in layer.parameters() if p.requires_grad]
    given, named = swap((args, kwargs), Tensor.detach)
    if again and weights and not keeps(weights):
        output = checkpoint(own, *given, use_reentrant=False, **named)
    else:
        with torch.set_grad_enabled(bool(weights)):
            output = own(*given, **named)
    carried = Carried.apply(x, hidden_of(output, layer))
    return (carried, *output[1:]) if isinstance(output, tuple) else carried


def _own(forward: Callable[..., Any], around: Around, *args: Any, **kwargs: Any) -> Any:
    ran = False
    try:
        around[0](args, kwargs)
        output = forward(*args, **kwargs)
        ran = True
        return output
    finally:
        around[1](ran)


class Carried(torch.autograd.Function):
    """A layer's output, by `"direct"`: its error goes to the layer, and as it is to what is below."""

    @staticmethod
    def forward(ctx, below: Tensor, hidden: Tensor) -> Tensor:  # type: ignore[override]
        ctx.device, ctx.dtype = below.device, below.dtype
        return hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, delta: Tensor):
        return delta.to(ctx.device, ctx.dtype), delta
