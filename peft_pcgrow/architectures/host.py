"""What is needed of transformers that its documentation does not promise, and of what it loads models by.

Each name with why; those that settling needs too are in its own `host`, those of packing alone in that of `packed`.
Classes of packages that may be absent, or costly to import, are looked up among what is loaded: of what is not, there
are no instances. `tests/test_host_transformers.py` and `test_host_bitsandbytes.py` check all of it.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # decodes weights of 4 and of 8 bits
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as IMPLEMENTATIONS  # what a config's name stands for
from transformers.integrations.moe import _batched_linear as batched_linear  # the products of the fast paths, whose
from transformers.integrations.moe import _default_apply_gate as plain_gate  # act_fn(gate) * up of two halves
from transformers.integrations.moe import _grouped_linear as grouped_linear  # bits grown experts keep
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward  # tell which path runs
from transformers.pytorch_utils import Conv1D  # the linear layers of GPT-2 and its kin
from transformers.trainer_callback import CallbackHandler  # calls the reporters: a Trainer has no door to them

from peft_pcgrow.settling import host as settling

# use_experts_implementation sets it on every instance of an experts module, which is found by it; True: sharded
EXPERTS_MARK = "_is_expert_parallel"
# and these: how experts look that follow the contract
CONTRACT = (
    "config",
    "has_gate",
    "has_bias",
    "is_transposed",
    "is_concatenated",
    "has_post_expert_norm",
    "_apply_gate",  # gate times up, by the architecture's own code
)
# on tensors: transformers' loader has read them from a file; on modules: it need not draw their weights
LOADED = "_is_hf_initialized"
# accelerate's hook of a module, and the forward that it runs
HOOK, OLD_FORWARD = "_hf_hook", "_old_forward"
# of such hooks: whether weights are elsewhere until they are needed, and the parts of a hook of several
OFFLOADING = ("offload", "hooks")
# flags of a BitsAndBytesConfig, behind an underscore, by bits
LOADED_IN = {4: "_load_in_4bit", 8: "_load_in_8bit"}
# read of KV caches: their entries and the class of those to come, the part of an encoder-decoder's that counts here
CACHE = ("layers", "layer_class_to_replicate", "self_attention_cache")
# read of their entries: whether there is anything in them, and in those that keep states
ENTRY = ("is_initialized", "has_previous_state", "get_seq_length")
# by this, classes of entries register themselves
ENTRY_KIND = "_layer_type"
# every way of continuous batching begins with this method of models
BATCHING = "init_continuous_batching"
# blocks whose experts do not follow the contract, by class: file below `transformers.models`
BLOCKS = {
    "DbrxFFN": "dbrx.modeling_dbrx",
    "DogeCDMoE": "doge.modeling_doge",
    "JetMoeMoE": "jetmoe.modeling_jetmoe",
    "Llama4TextMoe": "llama4.modeling_llama4",
    "LongcatFlashMoE": "longcat_flash.modeling_longcat_flash",
    "NllbMoeSparseMLP": "nllb_moe.modeling_nllb_moe",
    "Step3p7SparseMoeBlock": "step3p7.modeling_step3p7",
    "SwitchTransformersSparseMLP": "switch_transformers.modeling_switch_transformers",
}
# linear layers of somebody's own whose forward is a product and a bias
LINEARS = {
    "FalconLinear": "transformers.models.falcon.modeling_falcon",
    "Linear4bit": "bitsandbytes.nn",
    "Linear8bitLt": "bitsandbytes.nn",
}
# weights that are decoded when they are read, and what of them says how
BITSANDBYTES = {"Params4bit": "bitsandbytes.nn", "Int8Params": "bitsandbytes.nn"}
QUANTIZED = ("quant_state", "state")
# on a layer of 4 bits, that it may pack its weight anew when it evaluates, and on the weight's state, that it has
REPACKS, REPACKED = "support_avx512bf16_for_cpu", "packing_format_for_cpu"
# what torch makes of modules that it shards, in two generations, and of tensors
FSDP1 = {"FullyShardedDataParallel": "torch.distributed.fsdp"}
FSDP2 = {"FSDPModule": "torch.distributed.fsdp"}
# set on every module whose weights the second gathers: these are other tensors in each forward
MANAGED = "_is_fsdp_managed_module"
# where the hooks are from by which it gathers
GATHERS = "torch.distributed.fsdp"
DTENSOR = {"DTensor": "torch.distributed.tensor"}
# set on parameters that lie in a flat one; on those that DeepSpeed partitions
FLAT, PARTITIONED = ("_fsdp_flattened", "_is_flat_param"), "ds_id"
# DeepSpeed's, around a model that it trains
DEEPSPEED = {"DeepSpeedEngine": "deepspeed.runtime.engine"}
# set by it on parameters of which ZeRO steps a copy
COPIED = "_hp_mapping"
# set on a model that transformers has spread over processes, and the sizes in its config's `distributed_config`
MESH, SIZES = "_mesh_manager", ("tp_size", "ep_size", "pp_size")
# of these, alike and alone, where each process has whole experts and all see the same text
SHARING = ("tp_size", "ep_size")
# Liger's, which take the place of others in transformers' files
LIGER = {"LigerExperts": "liger_kernel.transformers.swiglu"}


def loaded(names: dict[str, str]) -> tuple[type, ...]:
    """The classes of a table above that this process has imported."""
    found = (getattr(sys.modules.get(module), name, None) for name, module in names.items())
    return tuple(kind for kind in found if kind is not None)


def gathers(hook: Any) -> bool:
    """Whether a module's hook is one that gathers its sharded weights."""
    return (getattr(hook, "__module__", None) or "").startswith(GATHERS)


def block_class(name: str) -> type | None:
    """One of `BLOCKS`; None: no such model is loaded."""
    return next(iter(loaded({name: f"transformers.models.{BLOCKS[name]}"})), None)


def plain_forwards() -> list[Callable[..., Any]]:
    """The forwards of linear layers that are a product and a bias."""
    return [kind.forward for kind in (nn.Linear, Conv1D, *loaded(LINEARS))]  # type: ignore[attr-defined]


def gates_by_silu(experts: Any) -> bool:
    """Whether what is between an expert's matrices is SiLU of the first half of what enters it times the second."""
    plain = experts.has_gate and type(experts)._apply_gate is plain_gate
    return plain and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))


def implementation_name(config: Any) -> str | None:
    """How a model of this config runs its experts, by the name that `set_experts_implementation` takes."""
    return getattr(config, settling.EXPERTS, None)
