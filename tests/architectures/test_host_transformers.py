"""What the files called `host` name of transformers and accelerate is there; after an upgrade, look here first."""

import importlib.util

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, LlamaConfig
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import output_capturing

from host_names import missing
from peft_pcgrow.architectures import host
from peft_pcgrow.packed import host as packed
from peft_pcgrow.settling import host as settling
from peft_pcgrow.settling.conditions import own_hooks
from tiny import build, tokens

PRODUCTS, LOADING, QUANTIZERS = (
    "transformers.integrations.moe",
    "transformers.modeling_utils",
    "transformers.quantizers",
)
CALLED = ("self", "hidden_states", "top_k_index", "top_k_weights")
SIGNATURES = {
    f"{PRODUCTS}.ALL_EXPERTS_FUNCTIONS.get": ("key",),
    f"{PRODUCTS}._batched_linear": ("input", "weight", "bias", "is_transposed"),
    f"{PRODUCTS}._grouped_linear": ("input", "weight", "offs", "bias", "is_transposed"),
    f"{PRODUCTS}.batched_mm_experts_forward": CALLED,
    f"{PRODUCTS}.grouped_mm_experts_forward": CALLED,
    "transformers.integrations.bitsandbytes.dequantize_bnb_weight": ("weight", "state"),
    "transformers.integrations.accelerate.load_offloaded_parameter": ("model", "param_name"),
    f"{LOADING}.remove_tied_weights_from_state_dict": ("state_dict", "model"),
    "transformers.GenerationMixin.init_continuous_batching": ("self",),
    f"{LOADING}.PreTrainedModel._hf_peft_config_loaded": None,
    "transformers.pytorch_utils.Conv1D.forward": ("self", "x"),
    "transformers.trainer_callback.CallbackHandler.on_log": ("self", "args", "state", "control", "logs"),
    "transformers.utils.output_capturing._active_collector.get": (),
    "transformers.utils.output_capturing._active_collector.set": ("value",),
    "transformers.utils.output_capturing._active_collector.reset": ("token",),
    f"{QUANTIZERS}.auto.AUTO_QUANTIZATION_CONFIG_MAPPING": None,
    f"{QUANTIZERS}.auto.AUTO_QUANTIZER_MAPPING": None,
    f"{QUANTIZERS}.auto.register_quantization_config": ("method",),
    f"{QUANTIZERS}.auto.register_quantizer": ("name",),
    f"{QUANTIZERS}.base.HfQuantizer._process_model_before_weight_loading": ("self", "model"),
    f"{QUANTIZERS}.base.HfQuantizer._process_model_after_weight_loading": ("self", "model"),
    f"{QUANTIZERS}.base.HfQuantizer._dequantize": ("self", "model", "dtype"),
    f"{QUANTIZERS}.base.HfQuantizer.get_state_dict_and_metadata": ("self", "model"),
    "transformers.cache_utils.CacheLayerMixin._layer_type": None,
    "transformers.cache_utils.DynamicLayer.batch_repeat_interleave": ("self", "repeats"),
    "transformers.cache_utils.DynamicLayer.batch_select_indices": ("self", "indices"),
    "transformers.cache_utils.DynamicLayer.crop": ("self", "tokens_to_remove"),
    "transformers.cache_utils.DynamicLayer.get_seq_length": ("self",),
    "transformers.cache_utils.DynamicLayer.reorder_cache": ("self", "beam_idx"),
    "transformers.cache_utils.DynamicLayer.reset": ("self",),
}
# models that a version does not have yet are not missed
MODELS = {f"transformers.models.{file}": name for name, file in host.BLOCKS.items()}
MODELS["transformers.models.falcon.modeling_falcon"] = "FalconLinear"
SIGNATURES |= {f"{file}.{name}": None for file, name in MODELS.items() if importlib.util.find_spec(file) is not None}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Objects that have what is read and set on such as they are."""
    folder = tmp_path_factory.mktemp("plain")
    build().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
    found = {f"config.{name}": model.config for name in (settling.ATTENTION, settling.EXPERTS)}
    found |= {f"experts.{name}": model.model.layers[0].mlp.experts for name in (host.EXPERTS_MARK, *host.CONTRACT)}
    found |= {f"parameter.{host.LOADED}": next(model.parameters())}
    unset = {"hf_quantizer", "is_quantized", "quantization_method"}  # of quantized models alone
    found |= {f"model.{name}": model for name in packed.MODEL if name not in unset}
    found |= {f"HfQuantizer.{name}": packed.HfQuantizer for name in packed.QUANTIZER}
    found |= {f"cache.{name}": cache for name in ("layers", "layer_class_to_replicate")}
    found |= {f"DynamicLayer.{name}": cache.layers[0] for name in ("is_initialized", "get_seq_length")}
    found |= {"LinearAttentionLayer.has_previous_state": LinearAttentionLayer()}
    bits = BitsAndBytesConfig(load_in_8bit=True)
    return found | {f"BitsAndBytesConfig.{name}": bits for name in host.LOADED_IN.values()}


def test_names(held):
    assert missing("transformers", SIGNATURES, held) == []


def test_names_of_accelerate():
    model = build()
    cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    module = next(m for m in model.modules() if hasattr(m, host.HOOK) and m._hf_hook.offload)
    held = {f"module.{name}": module for name in (host.HOOK, host.OLD_FORWARD)}
    held |= {f"hook.{host.OFFLOADING[0]}": module._hf_hook}
    parts = {"accelerate.hooks.SequentialHook": ("hooks",)}
    assert missing("accelerate", parts, held) == []


def test_a_name_that_is_gone_is_told(held, monkeypatch):
    monkeypatch.delattr(f"{PRODUCTS}._grouped_linear")
    (line,) = missing("transformers", SIGNATURES, held)
    assert line.startswith("transformers ")
    assert line.endswith(
        f" has no {PRODUCTS}._grouped_linear, which peft_pcgrow needs: see peft_pcgrow/architectures/host.py"
    )


def test_other_parameters_are_told(held, monkeypatch):
    monkeypatch.setattr(f"{LOADING}.remove_tied_weights_from_state_dict", lambda state_dict, model, names: None)
    monkeypatch.setattr(f"{PRODUCTS}._batched_linear", lambda rows, weight, bias=None: None)
    lines = missing("transformers", SIGNATURES, held)
    assert len(lines) == 2
    assert "_batched_linear of transformers " in lines[0]
    assert " takes (rows, weight, bias), and peft_pcgrow calls it with ('input', 'weight', 'bias', " in lines[0]
    assert lines[1].endswith(
        " wants names too, and peft_pcgrow calls it with ('state_dict', 'model'): see peft_pcgrow/packed/host.py"
    )


def test_an_attribute_that_is_gone_is_told(held, monkeypatch):
    monkeypatch.delattr(held[f"experts.{host.EXPERTS_MARK}"], host.EXPERTS_MARK)
    (line,) = missing("transformers", SIGNATURES, held)
    assert " has no experts._is_expert_parallel any more" in line
    assert line.endswith("see peft_pcgrow/architectures/host.py")


def test_hooks_that_record_are_known():
    """By the module that they are made in."""
    model = build()
    model(input_ids=tokens(), output_router_logits=True)
    hooks = {key: hook for module in model.modules() for key, hook in module._forward_hooks.items()}
    assert hooks
    assert own_hooks(hooks) == []
    assert output_capturing.__name__ == settling.ONLOOKERS


def test_schema_of_the_fallback():
    schema = packed.grouped_mm_fallback.default._schema
    assert [each.name for each in schema.arguments] == ["input", "weight", "offs"]
