"""What the files called `host` name of PEFT is there; after an upgrade, look here first."""

import sys

import pytest
from peft import LoraConfig, get_peft_model
from peft.utils import PeftType

from host_names import missing
from peft_pcgrow.adapter import host
from peft_pcgrow.settling.host import ADAPTERS
from tiny import build

TUNER, LAYER = "peft.tuners.tuners_utils.BaseTuner", "peft.tuners.tuners_utils.BaseTunerLayer"
VARIANT = "peft.tuners.lora.layer.LoraVariant"
CREATED = ("self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name")
SIGNATURES = {
    "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING": None,
    "peft.utils.peft_types.register_peft_method": ("name", "config_cls", "model_cls", "prefix"),
    "peft.tuners._buffer_dict.BufferDict": ("buffers", "persistent"),
    "peft.tuners.tuners_utils._maybe_include_all_linear_layers": ("peft_config", "model"),
    "peft.tuners.tuners_utils.check_adapters_to_merge": ("module", "adapter_names"),
    "peft.utils.other.AuxiliaryTrainingWrapper": None,
    f"{TUNER}._prepare_adapter_config": ("self", "peft_config", "model_config"),
    f"{TUNER}._prepare_model": ("self", "peft_config", "model"),
    f"{TUNER}._check_target_module_exists": ("peft_config", "key"),
    f"{TUNER}._create_and_replace": CREATED,
    f"{TUNER}._replace_module": ("self", "parent", "child_name", "new_module", "child"),
    f"{TUNER}._unload_and_optionally_merge": ("self", "merge", "progressbar", "safe_merge", "adapter_names"),
    f"{TUNER}._get_adapter_state_dict": ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
    f"{TUNER}._remove_adapter_name_from_key": ("key", "adapter_name"),
    f"{TUNER}._remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
    f"{TUNER}.inject_adapter": ("self", "model", "adapter_name", "low_cpu_mem_usage"),
    f"{TUNER}.merge_adapter": ("self", "adapter_names", "safe_merge"),
    f"{TUNER}.set_adapter": ("self", "adapter_name", "inference_mode"),
    f"{LAYER}._get_base_layer_device_and_dtype": ("self", "base_layer"),
    f"{LAYER}._move_adapter_to_device_of_base_layer": ("self", "adapter_name"),
    f"{LAYER}.set_adapter": ("self", "adapter_names", "inference_mode"),
    f"{LAYER}.set_requires_grad": ("self", "adapter_names", "requires_grad"),
    f"{VARIANT}.forward": ("module", "active_adapter", "x", "result"),
    f"{VARIANT}.merge_safe": ("module", "active_adapter", "orig_weight"),
    f"{VARIANT}.merge_unsafe": ("module", "active_adapter", "orig_weight"),
    f"{VARIANT}.supports_lora_conversion": ("self",),
    "torch.Tensor._make_wrapper_subclass": None,
    "peft.LoraModel": ("model", "peft_config", "adapter_name", "low_cpu_mem_usage"),
}


@pytest.fixture(scope="module")
def held():
    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    layer = next(m for m in model.modules() if isinstance(m, host.LoraLayer))
    model.get_base_model().loss_function = max
    found = {f"PreTrainedModel.{host.LOSS}": model.get_base_model()}
    wrapper = next(m for m in model.modules() if isinstance(m, host.AuxiliaryTrainingWrapper))
    found |= {f"BaseTuner.{name}": model.base_model for name in host.TUNER}
    found |= {f"LoraLayer.{name}": layer for name in (*ADAPTERS, *host.LAYER, *host.LORA)}
    found |= {f"AuxiliaryTrainingWrapper.{name}": wrapper for name in host.WRAPPER}
    found |= {f"LoraVariant.{name}": host.LoraVariant for name in host.VARIANT}
    enum = host.ENUM if sys.version_info >= (3, 13) else host.ENUM[:-1]
    found |= {f"PeftType.{name}": PeftType for name in enum}
    return found | {f"PeftType.LORA.{name}": PeftType.LORA for name in host.MEMBER}


def test_names(held):
    assert missing("peft", SIGNATURES, held) == []


def test_a_name_that_is_gone_is_told(held, monkeypatch):
    monkeypatch.delattr("peft.tuners.tuners_utils._maybe_include_all_linear_layers")
    (line,) = missing("peft", SIGNATURES, held)
    assert line.startswith("peft 0.")
    assert line.endswith(
        " has no peft.tuners.tuners_utils._maybe_include_all_linear_layers, which peft_pcgrow needs: see "
        "peft_pcgrow/adapter/host.py"
    )


def test_other_parameters_are_told(held, monkeypatch):
    monkeypatch.setattr(f"{TUNER}._replace_module", lambda self, parent, new_module: None)
    (line,) = missing("peft", SIGNATURES, held)
    assert f"{TUNER}._replace_module of peft 0." in line
    assert " takes (self, parent, new_module), and peft_pcgrow calls it with ('self', 'parent', 'child_name', " in line
    assert line.endswith("see peft_pcgrow/adapter/host.py")


def test_an_attribute_that_is_gone_is_told(held, monkeypatch):
    monkeypatch.delattr(held["AuxiliaryTrainingWrapper._adapters"], "_adapters")
    (line,) = missing("peft", SIGNATURES, held)
    assert " has no AuxiliaryTrainingWrapper._adapters any more" in line
