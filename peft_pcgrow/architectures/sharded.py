"""Weights that lie on several processes: by which engine, and what of a tensor is here.

FSDP2 (`fully_shard`) makes DTensors of parameters, split along their first axis, and gathers them by hooks of modules:
of a bank a process holds whole experts. Training knows of it. What reads or writes weights by itself needs all of them,
and other engines are refused by name.
"""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_pcgrow.architectures.engines import is_shared_out
from peft_pcgrow.architectures.host import DTENSOR, FLAT, FSDP1, FSDP2, PARTITIONED, loaded

FIRST = "do it before the model is sharded (by fully_shard, Accelerator.prepare or Trainer.train)"
INSTEAD = (
    "growing on it is not supported yet, and would train on wrong gradients. Shard by fully_shard (FSDP2; accelerate: "
    "fsdp_version: 2), or keep the model whole on each process, as DDP does"
)


def how_sharded(tensor: Any) -> str | None:
    """What a tensor is a shard of, if it is one."""
    if isinstance(tensor, loaded(DTENSOR)):
        return "a DTensor (sharded by fully_shard, or by tensor or expert parallelism)"
    if any(getattr(tensor, name, False) for name in FLAT):
        return "part of a flat parameter (sharded by FullyShardedDataParallel, FSDP1)"
    if hasattr(tensor, PARTITIONED):
        return "partitioned by DeepSpeed (ZeRO-3)"
    return None


def check_whole(model: nn.Module, what: str, shared_out: bool = False) -> None:
    """Raise ValueError if parameters of a model are sharded, by themselves or by a wrapper around it; `what` needs all
    of their numbers here.

    Args:
        shared_out: whether whole experts may be in other processes (see `engines.is_shared_out`).
    """
    if shared_out and is_shared_out(model):
        return
    named = ((name, how_sharded(parameter)) for name, parameter in model.named_parameters())
    found = next((f"{name} is {how}" for name, how in named if how is not None), None)
    if found is None and (engines := _engines(model)):
        # while they are gathered for a forward, parameters do not tell
        found = f"the model is inside of {type(engines[0]).__name__}"
    if found is not None:
        raise ValueError(f"{found}, and {what} needs its weights whole on each process: {FIRST}")


def is_by_fsdp2(model: nn.Module) -> bool:
    """Whether `fully_shard` has sharded a model that is about to train.

    Raises:
        ValueError: another engine has, or one beside it.
    """
    return bool(fsdp2_engines(model))


def fsdp2_engines(model: nn.Module) -> list[Any]:
    """The modules around or inside of a model that `fully_shard` has made gather its weights; ValueError as for
    `is_by_fsdp2`."""
    engines = _engines(model)
    if (one := next((each for each in engines if isinstance(each, loaded(FSDP1))), None)) is not None:
        raise ValueError(f"the model is inside of {type(one).__name__} (FSDP1): {INSTEAD}")
    managed = {id(p) for engine in engines for p in engine.parameters()}
    for name, parameter in model.named_parameters():
        how = how_sharded(parameter)
        if how is not None and (id(parameter) not in managed or not isinstance(parameter, loaded(DTENSOR))):
            raise ValueError(f"{name} is {how}: {INSTEAD}")
        if how is not None and sum(not placed.is_replicate() for placed in parameter.placements) > 1:  # type: ignore
            raise ValueError(f"{name} is sharded by tensor or expert parallelism beside fully_shard: {INSTEAD}")
    return engines


def reshard(model: nn.Module) -> None:
    """Let the weights that an optimizer holds stand in the model again, where FSDP2 has gathered them for a forward."""
    for module in model.modules():
        if isinstance(module, loaded(FSDP2)):
            module.reshard()  # type: ignore


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process, in place; all of it, if it is not sharded."""
    if not isinstance(tensor, loaded(DTENSOR)):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore


def first_slice(tensor: Any) -> int:
    """The place, along axis 0 of the whole tensor, where its local part begins.

    Raises:
        ValueError: it is split along another axis.
    """
    start = 0
    for dim, placed in enumerate(tensor.placements if isinstance(tensor, loaded(DTENSOR)) else ()):
        if placed.is_shard():
            if placed.dim != 0:
                raise ValueError(
                    f"a stack of experts of shape {tuple(tensor.shape)} is split along axis {placed.dim}: a process "
                    "must hold whole experts, so leave shard_placement_fn out for banks (fully_shard splits axis 0)"
                )
            # as torch.chunk does, whose pieces but the last are alike
            each = -(-len(tensor) // tensor.device_mesh.size(dim))
            start = min(each * tensor.device_mesh.get_local_rank(dim), len(tensor))
    return start


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered; all processes must call, with each in the same order."""
    if not isinstance(tensor, loaded(DTENSOR)):
        return tensor
    # offloaded shards are gathered where the processes can send
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor().to(tensor.device)  # type: ignore


def like(tensor: Tensor, placed: Any) -> Tensor:
    """A whole tensor, of which every process has a copy, sharded as `placed` is."""
    if not isinstance(placed, loaded(DTENSOR)) or isinstance(tensor, loaded(DTENSOR)):
        return tensor
    copies = type(placed).from_local(tensor.to(placed.device), placed.device_mesh, run_check=False)  # type: ignore
    return copies.redistribute(placements=placed.placements)


def largest(value: Tensor, tensor: Any) -> Tensor:
    """The largest that a number is in the processes that `tensor` is spread over; all of them must call."""
    if isinstance(tensor, loaded(DTENSOR)):
        value = value.detach().to(tensor.device_mesh.device_type, copy=True)
        for dim in range(tensor.device_mesh.ndim):
            dist.all_reduce(value, dist.ReduceOp.MAX, group=tensor.device_mesh.get_group(dim))
    return value


def _engines(model: nn.Module) -> list[Any]:
    """The modules around or inside of a model that gather weights for it, by whatever engine."""
    if not (dist.is_available() and dist.is_initialized() and (kinds := loaded(FSDP1 | FSDP2))):
        return []
    inside = [each for each in model.modules() if isinstance(each, kinds)]
    # others are not asked for their class, which proxies answer by failing
    found = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    return inside + [each for each in found if each is not model and model in set(each.modules())]
