"""What is needed of PEFT that its documentation does not promise, and of Python's enums where PEFT's grows by a member.

Each name with why; `tests/test_host_peft.py` checks that they are there. Where PEFT's layers keep what they are set to,
settling needs too: see its own `host`.
"""

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # files may call a method by another name than the enum does
from peft.tuners._buffer_dict import BufferDict  # gates: tensors of an adapter's that do not train
from peft.tuners.lora.layer import (
    LoraLayer,  # LoRA beside grown experts is switched and saved with them
    LoraVariant,  # the place where LoRA can be put behind a gate
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as spelled_out  # "all-linear" without experts
from peft.utils.other import AuxiliaryTrainingWrapper  # what modules_to_save and trainable tokens sit in
from peft.utils.peft_types import register_peft_method

# where transformers' models keep a loss function that they are given
LOSS = "_loss_function"
# a tensor without numbers, whose operations are somebody's own
wrapper_of = torch.Tensor._make_wrapper_subclass
# steps of a tuner that ours overrides or asks
TUNER = (
    "_prepare_adapter_config",
    "_prepare_model",  # before anything is wrapped: where a locus is resolved
    "_check_target_module_exists",  # target_modules, exclude_modules and layers_to_transform of one name
    "_create_and_replace",
    "_replace_module",  # PEFT's own copies a weight, which experts do not have
    "_unload_and_optionally_merge",  # in all layers or in none
    "_get_adapter_state_dict",  # on the way to a file: seals are closed
    "_remove_adapter_name_from_key",
    "_remap_adapter_state_dict_for_load",  # on the way from a file: seals are compared
    "tuner_layer_cls",  # layers whose adapters it switches and deletes
)
# of its layers
LAYER = (
    "adapter_layer_names",  # what trains, and is saved
    "other_param_names",  # what is saved and does not train
    "_get_base_layer_device_and_dtype",  # by default a weight's
    "_move_adapter_to_device_of_base_layer",
)
# of LoRA's layers
LORA = ("lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling")
# of what modules_to_save sit in: the names that it has copies for, and the module without them
WRAPPER = ("_adapters", "original_module")
# steps of a variant of LoRA
VARIANT = ("forward", "merge_safe", "merge_unsafe", "supports_lora_conversion")
# where enums keep their members; the last one since Python 3.13
ENUM = ("_member_names_", "_member_map_", "_value2member_map_", "_hashable_values_")
# and what a member knows of itself
MEMBER = ("_name_", "_value_", "_sort_order_")
