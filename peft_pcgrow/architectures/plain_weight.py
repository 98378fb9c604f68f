"""Tell plain weights from what quantizers, offloading and sharding put in their place.

Banks are copies of experts' weights, maps are about gradients with respect to them, packing rounds them: all of it
needs the numbers themselves, whole, in a floating type of 16 bits or more.
"""

import gc
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.host import BITSANDBYTES, DTENSOR, FLAT, HOOK, PARTITIONED, SHARDED, loaded

# parameters beside a stack that say how its codes are read, whatever the quantizer
_SCALES = re.compile(r"(^|_)(scales?|scale_inv|zeros?|zero_point|qzeros|blocks|absmax|codebook|g_idx|lut)(_|$)")
# how configs call that experts are packed (see `compress.persist`)
PACKED_METHOD = "pcgrow"


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if parameters of a model are sharded, by themselves or by a wrapper around it."""
    named = ((name, how_sharded(parameter)) for name, parameter in model.named_parameters())
    found = next(((name, how) for name, how in named if how is not None), None)
    if found is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        # while they are gathered for a forward, parameters do not tell
        sharded = _instances(loaded(SHARDED))
        around = next((type(each).__name__ for each in sharded if model in set(each.modules())), None)
        found = None if around is None else ("the model", f"inside of {around}")
    if found is not None:
        raise ValueError(
            f"{found[0]} is {found[1]}: growing on sharded parameters is not supported yet, and would train on wrong "
            "gradients. Keep the model whole on each process, as DDP does"
        )


def _instances(kinds: tuple[type, ...]) -> Iterator[Any]:
    """All objects of these classes; others are not asked for theirs, which proxies answer by failing."""
    return (each for each in gc.get_objects() if issubclass(type(each), kinds))


def how_sharded(tensor: Any) -> str | None:
    """What a tensor is a shard of, if it is one."""
    if isinstance(tensor, loaded(DTENSOR)):
        return "a DTensor (sharded by fully_shard, or by tensor or expert parallelism)"
    if any(getattr(tensor, name, False) for name in FLAT):
        return "part of a flat parameter (sharded by FullyShardedDataParallel)"
    if hasattr(tensor, PARTITIONED):
        return "partitioned by DeepSpeed (ZeRO-3)"
    return None


def why_not_plain(tensor: Any) -> str | None:
    """What a tensor is, if it is no plain weight."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    if (sharded := how_sharded(tensor)) is not None:
        return sharded
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"codes in {str(tensor.dtype).removeprefix('torch.')}"
    return None


def why_not_stacks(module: Any, names: Iterable[str], count: int) -> str | None:
    """Why the parameters `names` of an experts module, one slice for each of `count` experts, are no plain weights."""
    for name in names:
        if name in getattr(module, "parametrizations", ()):
            return f"{name} is computed from other tensors (a parametrization, as of bitsandbytes)"
        if (what := why_not_plain(getattr(module, name, None))) is not None:
            return f"{name} is {what}"
        if len(getattr(module, name)) != count:
            return f"{name} has {len(getattr(module, name))} slices for {count} experts"
    known = set(names)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in known and (_SCALES.search(name) or why_not_plain(tensor) is not None):
            return f"beside its weights there is {name}"
    return None


def why_not_linear(layer: Any) -> str | None:
    """Why a linear layer's weight cannot be read: neither plain nor quantized by bitsandbytes."""
    if hasattr(layer, "parametrizations"):
        return "have parametrized weights"
    weight = getattr(layer, "weight", None)
    what = None if isinstance(weight, loaded(BITSANDBYTES)) else why_not_plain(weight)
    return None if what is None else f"have weights that are {what}"


def loaded_quantized(config: Any) -> bool:
    """Whether a model of this config was loaded quantized; that some of its experts are packed does not count."""
    noted = getattr(config, "quantization_config", None)
    return noted is not None and getattr(noted, "quant_method", None) != PACKED_METHOD


def way_out(config: Any) -> str:
    """What to do about weights that are no plain ones, in a model of this config."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return "load the model in bf16 or fp32, whole on each process, without offloading it"
    if hasattr(quantization, "dequantize"):
        how = f"load the model with quantization_config={type(quantization).__name__}(dequantize=True)"
    else:
        how = "load a checkpoint of the model in bf16 or fp32"
    return f"{how}; PCGrowConfig(base_quantization='nf4') packs its experts in 4 bits once the adapter has its copies"


def is_offloaded(module: Any) -> bool:
    """Whether accelerate keeps a module's weights elsewhere until it runs."""
    hook = getattr(module, HOOK, None)
    return any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ())))
