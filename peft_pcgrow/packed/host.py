"""What packing needs of transformers' loaders and quantizers, and of bitsandbytes, that no documentation promises.

Each name with why; `tests/test_host_transformers.py` and `test_host_bitsandbytes.py` check that they are there.
"""

import torch
from transformers.integrations.accelerate import load_offloaded_parameter  # the value of what is on meta
from transformers.modeling_utils import remove_tied_weights_from_state_dict  # as save_pretrained does
from transformers.quantizers.auto import (  # what is known there  # the door for new methods
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

# the product of rows sorted by matrix, where the fast one cannot run
grouped_mm_fallback = torch.ops.transformers.grouped_mm_fallback
# steps of quantizers that ours overrides: before and after a checkpoint is read, and when one is written
QUANTIZER = (
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
    "get_state_dict_and_metadata",
    "_dequantize",
    "requires_calibration",
    "is_serializable",
    "is_trainable",
)
# on a model that has adapters by transformers' own loader, which saves those alone
ADAPTERS_LOADED = "_hf_peft_config_loaded"
# set and read on models as they are
MODEL = (
    "hf_quantizer",  # whom save_pretrained asks for tensors
    "is_quantized",
    "quantization_method",
    "_weight_conversions",  # how names of a file were changed: emptied, so that they are not changed back
    "_keys_to_ignore_on_load_unexpected",  # tensors that are there to make other loaders fail
    "_keys_to_ignore_on_save",
)
# of `bitsandbytes.functional`, which `pcgrow_kernels.lowbit` decodes 4 bits by, without importing anything from here
KERNELS = ("QuantState", "dequantize_4bit")
