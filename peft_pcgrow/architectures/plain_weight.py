"""Tell plain weights from what quantizers, offloading and sharding put in their place.

Banks are copies of experts' weights, maps are about gradients with respect to them, packing rounds them: all of it
needs the numbers themselves, whole, in a floating type of 16 bits or more.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from peft_pcgrow.architectures.host import BITSANDBYTES, HOOK, loaded
from peft_pcgrow.architectures.sharded import how_sharded

# parameters beside a stack that say how its codes are read, whatever the quantizer
_SCALES = re.compile(r"(^|_)(scales?|scale_inv|zeros?|zero_point|qzeros|blocks|absmax|codebook|g_idx|lut)(_|$)")
# how configs call that experts are packed (see `compress.persist`)
PACKED_METHOD = "pcgrow"


def why_not_plain(tensor: Any, sharded: bool = False) -> str | None:
    """What a tensor is, if it is no plain weight; `sharded`: a shard of one will do."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    how = how_sharded(tensor)
    if how is not None and not sharded:
        return how
    if how is None and type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"codes in {str(tensor.dtype).removeprefix('torch.')}"
    return None


def why_not_stacks(module: Any, names: Iterable[str], count: int, sharded: bool = False) -> str | None:
    """Why the parameters `names` of an experts module, one slice for each of `count` experts, are no plain weights."""
    for name in names:
        if name in getattr(module, "parametrizations", ()):
            return f"{name} is computed from other tensors (a parametrization, as of bitsandbytes)"
        if (what := why_not_plain(getattr(module, name, None), sharded)) is not None:
            return f"{name} is {what}"
        if len(getattr(module, name)) != count:
            return f"{name} has {len(getattr(module, name))} slices for {count} experts"
    known = set(names)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in known and (_SCALES.search(name) or why_not_plain(tensor, sharded) is not None):
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
