"""Notices, before a step of a model that `fully_shard` has sharded, that gradients went nowhere."""

from collections.abc import Iterable, Set

from torch import nn

from peft_pcgrow.architectures.sharded import how_sharded


def check_none_lost(model: nn.Module, banks: Iterable[nn.Parameter], stepped: Set[int]) -> bool:
    """Called at the first step after a training forward.

    Args:
        stepped: ids of what the optimizer holds.

    Returns:
        Whether it holds a bank.

    Raises:
        RuntimeError: weights that train have no gradient, or were not sharded with the others.
    """
    held = {id(weight) for weight in banks} & stepped
    for name, parameter in model.named_parameters() if held else ():
        if not parameter.requires_grad or id(parameter) not in stepped:
            continue
        if how_sharded(parameter) is None:
            raise RuntimeError(
                f"{name} trains beside parameters that fully_shard has sharded and is none of them: processes would "
                "move it apart. Call fully_shard on the whole model too, without ignored_params that train"
            )
        if id(parameter) in held and parameter.grad is None:
            raise RuntimeError(
                f"{name} has no gradient in this process after a training forward of a model that fully_shard has "
                "sharded: call backward() with gradients synchronized (set_requires_gradient_sync) before step()"
            )
    return bool(held)
