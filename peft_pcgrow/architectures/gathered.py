"""Weights that `fully_shard` has split, gathered by hand: for whoever runs layers again, where FSDP2's own hooks, which
gather for autograd, would not know of it.

On a process at most one decoder layer is whole at a time, beside what is outside of all of them (words, output head).
Gathering takes all processes: each has to run as many layers as any other, in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_pcgrow.architectures.engines import is_shared_out
from peft_pcgrow.architectures.host import DTENSOR, gathers, loaded
from peft_pcgrow.architectures.sharded import check_whole, fsdp2_engines

# of a layer's index: inside, its weights are whole
Gather = Callable[[int], AbstractContextManager[None]]


def to_gather(model: nn.Module, what: str) -> list[Any]:
    """The modules that `fully_shard` has made gather the weights of a model, whose numbers `what` needs; none: it is
    whole, or its experts are shared out (see `expert_parallel`). ValueError if another engine has sharded it."""
    engines = [] if is_shared_out(model) else fsdp2_engines(model)
    if not engines:
        check_whole(model, what, shared_out=True)
    return engines


@contextmanager
def gathered_by_layer(engines: Sequence[Any], layers: Sequence[nn.Module]) -> Iterator[Gather | None]:
    """Inside, FSDP2's own hooks do nothing: a decoder layer's weights are whole while it is called, or inside of what
    this gives, and others' all the time; None: nothing is sharded.

    Args:
        engines: of a model, by `to_gather`; nothing in it trains, and all processes must enter. layers: its decoder's.
    """
    if not engines:
        yield None
        return
    known = set(engines)
    within = [[each for each in layer.modules() if each in known] for layer in layers]
    outside = known.difference(*within)
    depth = [0] * len(layers)

    def enter(index: int, *_: Any) -> None:
        depth[index] += 1
        for module in within[index] if depth[index] == 1 else ():
            module.unshard()  # type: ignore[operator]

    def leave(index: int, *_: Any) -> None:
        depth[index] -= 1
        for module in within[index] if not depth[index] else ():
            module.reshard()  # type: ignore[operator]

    @contextmanager
    def whole(index: int) -> Iterator[None]:
        try:
            enter(index)
            yield
        finally:
            leave(index)

    with ExitStack() as stack:
        for module in engines:
            stack.enter_context(_without_hooks(module))
        for module in (each for each in engines if each in outside):
            stack.callback(module.reshard)
            module.unshard()
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(partial(enter, index), prepend=True).remove)
            stack.callback(layer.register_forward_hook(partial(leave, index), always_call=True).remove)
        yield whole


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, none of FSDP2's are called."""
    places = module._forward_pre_hooks, module._forward_hooks
    before = [dict(hooks) for hooks in places]
    own = [{key: hook for key, hook in hooks.items() if gathers(hook)} for hooks in places]
    try:
        for hooks, taken in zip(places, own, strict=True):
            for key in taken:
                del hooks[key]
        yield
    finally:
        for hooks, order, taken in zip(places, before, own, strict=True):
            now = {**hooks, **taken}
            hooks.clear()
            hooks.update({key: now[key] for key in (*order, *now) if key in now})


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, and its processes send from; shards may be offloaded."""
    first: Any = next(model.parameters())
    if not isinstance(first, loaded(DTENSOR)) or first.device.type == first.device_mesh.device_type:
        return first.device
    kind = first.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())
