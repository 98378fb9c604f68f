"""Engines that spread a model's weights, or what trains them, over processes: which is at work, and what it rules out.

Of torch's own (DDP, FSDP) others know. Here are DeepSpeed's ZeRO and the plans of transformers' `DistributedConfig`.
"""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_pcgrow.architectures.host import (
    COPIED,
    DEEPSPEED,
    EXPERTS_MARK,
    MESH,
    PARTITIONED,
    SHARING,
    SIZES,
    loaded,
)

SPREAD = (
    "{} is spread over processes by transformers ({}): of its experts, the indices of its router or its layers only a "
    "part is here, and {}. {}Load it without these (distributed_config=None) and train under DDP or DeepSpeed's "
    "ZeRO-2; what was merged, or exported, loads with them"
)
UNKNOWN = (
    "nothing that measures, grows or reads them knows of the others",
    "What can grow is DistributedConfig(tp_size=N, ep_size=N) on N processes, which each hold some experts whole. ",
)
ELSEWHERE = (
    "what was called needs the others too",
    "measure_errors, get_peft_model, find_lr, order_by_surprisal, training by a loop of one's own, refit_gates, "
    "save_pretrained, from_pretrained and generate work on it. ",
)
PARTED = (
    "{} is partitioned by DeepSpeed (ZeRO-3), which leaves empty tensors between the calls of modules: layers that run "
    "again, banks and files need whole ones. Use zero_optimization.stage 2, which trains the same, or DDP"
)
PROTECTED = (
    "{} steps flat copies of the weights, where no updates can be kept off directions: adapter {!r} has protect=, and "
    "would train without it. Use DDP, or spawn with protect=0.0"
)
TAKEN = "{} takes gradients away as they come: call {} before the model is prepared for it"
# what DeepSpeed's own optimizers are called together
ZERO = "DeepSpeed's ZeRO"


def inside(model: Any) -> Any:
    """The model that DDP or DeepSpeed is wrapped around: their own forwards wait for the other processes."""
    while isinstance(model, (DistributedDataParallel, *loaded(DEEPSPEED))):
        model = model.module
    return model


def check_engine(model: nn.Module, shared_out: bool = False) -> None:
    """Raise ValueError if a model's experts, matrices or layers lie on several processes by a plan of transformers', or
    its parameters are partitioned by DeepSpeed.

    Args:
        shared_out: whether whole experts may (see `is_shared_out`).
    """
    for module in model.modules():
        if found := _sizes(module):
            said = ", ".join(f"{name}={size}" for name, size in found.items())
            if not is_shared_out(module):
                raise ValueError(SPREAD.format(type(module).__name__, said, *UNKNOWN))
            if not shared_out:
                raise ValueError(SPREAD.format(type(module).__name__, said, *ELSEWHERE))
    parted = next((name for name, p in model.named_parameters() if hasattr(p, PARTITIONED)), None)
    if parted is not None:
        raise ValueError(PARTED.format(parted))


def is_shared_out(model: nn.Module) -> bool:
    """Whether expert parallelism has given each process some whole experts of a model, for text that all see."""
    for module in model.modules():
        if sizes := _sizes(module):
            marked = [held for held in module.modules() if EXPERTS_MARK in vars(held)]
            alike = {*sizes} == {*SHARING} and dist.is_initialized() and {*sizes.values()} == {dist.get_world_size()}
            return alike and bool(marked) and all(getattr(held, EXPERTS_MARK) for held in marked)
    return False


def _sizes(module: nn.Module) -> dict[str, int]:
    """Over how many processes transformers has spread a model, by what; none of what is inside of it."""
    sizes: Any = getattr(module.config, "distributed_config", None) if MESH in vars(module) else None
    return {name: size for name in SIZES if (size := getattr(sizes, name, None) or 1) > 1}


def stepped_by(model: nn.Module) -> str | None:
    """What of DeepSpeed steps copies of a model's weights; None: nothing does, or an optimizer of torch's itself."""
    kinds = loaded(DEEPSPEED)
    for each in gc.get_objects() if kinds else ():
        # others are not asked for their class, which proxies answer by failing
        if issubclass(type(each), kinds) and any(module is model for module in each.modules()):
            optimizer = each.optimizer
            return None if isinstance(optimizer, torch.optim.Optimizer) else f"{ZERO} ({type(optimizer).__name__})"
    return None


def is_copied(weight: nn.Parameter) -> bool:
    """Whether ZeRO steps a copy of a weight; told at once, by a mark of DeepSpeed's."""
    return hasattr(weight, COPIED)
