"""Tiny random models of every mixture-of-experts causal LM that the installed transformers knows.

Nothing is listed by hand: `moe_architectures()` reads transformers' own table of causal LMs and keeps those whose
modeling file defines experts. A config's numbers are replaced by small ones of the same name (`SMALL`), its lists of
layer kinds by short ones that keep every kind; `SETTINGS` holds what an architecture needs beside that. Weights are
larger than a fresh initialisation's, and nothing that routes is left at zero, so that routing is not degenerate. Every
width divides by 8, so that `grouped_mm` takes it in 16 bit too.

    python examples/architectures.py                  # build each of them and say what it is made of
"""

import argparse
import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, HIDDEN, EXPERTS, CHOSEN, LAYERS, PAD = 128, 32, 8, 2, 4, 0
# what a modeling file calls classes that hold many experts
EXPERTS_CLASS = re.compile(r"^class (\w*Experts?\w*|\w*CDMoE)\(", re.MULTILINE)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.15,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "sliding_window": 8,
    "intermediate_size": 24, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24, "dense_intermediate_size": 48, "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "num_experts": EXPERTS, "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
    "num_experts_per_token": CHOSEN, "moe_topk": CHOSEN, "moe_k": CHOSEN, "n_group": 2, "num_expert_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "mlp_only_layers": [0],
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4, "linear_head_dim": 8,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 8, "num_nextn_predict_layers": 0,
}  # fmt: skip
# of the parts of a composite that are not about text
SMALL_SENSES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_heads": 2, "head_dim": 16, "global_head_dim": 16, "out_hidden_size": HIDDEN,
}  # fmt: skip
INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 8, "d_rel": 8,
    "rel_extent": 16, "unpadded_vocab_size": VOCABULARY, "logits_mup_width_multiplier": 1.0, "loop_gate_rank": 8,
    "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "enable_moe_block": True, "top_k_experts": CHOSEN, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8, "global_head_dim": 16, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
LLAMA4: dict[str, Any] = {
    "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 8, "interleave_moe_layer_step": 2,
}  # fmt: skip
QWEN4: dict[str, Any] = {
    "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 16, "heads_per_ngram": 1,
    "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1, "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
}  # fmt: skip
SENSES: dict[str, dict[str, dict[str, Any]]] = {
    "dots3_note": {
        "vision_config": {
            "adapter_in_dim": 32, "adapter_out_dim": HIDDEN, "num_local_experts": EXPERTS, "num_hidden_layers": 2,
            "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"],
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 8},
    },
}  # fmt: skip
# what an architecture needs beside SMALL
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"logit_scale": 1.0},
    "dbrx": {
        "d_model": HIDDEN, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": CHOSEN},
    },
    # one layer that routes by a table, layers with and without compressed keys
    "deepseek_v4": {
        "num_key_value_heads": 1, "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "partial_rotary_factor": 0.5,
        "layer_types": [
            "sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "hc_mult": 2,
        "hc_sinkhorn_iters": 4, "o_groups": 2, "o_lora_rank": 8, "head_dim": 16,
    },
    "doge": {"is_moe": True, "num_experts": 16, "keep_window_size": 128},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "gemma4_text": GEMMA4,
    "granitemoehybrid": {
        "mamba_n_heads": 4, "mamba_chunk_size": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "inkling_text": INKLING,
    "inkling2_text": INKLING,
    "inkling2_loop_text": INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 4},
    "laguna": {"num_attention_heads_per_layer": [4] * LAYERS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": LLAMA4,
    "longcat_flash": {
        "num_layers": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16, "zero_expert_num": 2,
    },
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": 2},  # a third of a head is rotated
    # stacks of experts, of recurrent states and of attention are layers of their own
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe", "full_attention", "moe"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
    },
    "qwen4_exp_text": QWEN4,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "num_key_value_heads": 2},
}  # fmt: skip


@cache
def moe_architectures() -> dict[str, type[PreTrainedModel]]:
    """Model class by model type, for every causal LM whose modeling file defines experts."""
    found = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
        path = inspect.getsourcefile(model)
        if path is not None and EXPERTS_CLASS.search(Path(path).read_text(encoding="utf-8")):
            found[name] = model
    return found


def small_config(name: str, **changes) -> PreTrainedConfig:
    """A config of model type `name` in miniature; `changes` go to the part about text."""
    kind = CONFIG_MAPPING[name]
    parts = {
        part: _small(cls, SMALL_SENSES, SENSES.get(name, {}).get(part, {}))
        for part, cls in kind.sub_configs.items()
        if part != "text_config"
    }
    if "text_config" not in kind.sub_configs:
        return _small_text(kind, changes)
    whole = {"tie_word_embeddings": False, "initializer_range": SMALL["initializer_range"]}
    return _small(kind, whole, parts | {"text_config": _small_text(kind.sub_configs["text_config"], changes)})


def _small_text(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    special = SETTINGS.get(kind.model_type, {}) | changes
    kinds = list(dict.fromkeys(getattr(kind(), "layer_types", None) or ()))
    lists: dict[str, Any] = {"mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)]}
    if kinds:
        lists["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    return _small(kind, SMALL | lists, special)


def _small(kind: type[PreTrainedConfig], small: dict[str, Any], special: dict[str, Any]) -> PreTrainedConfig:
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    return kind(**{key: value for key, value in small.items() if key in known} | special)


def build(
    name: str, dtype: torch.dtype = torch.float32, implementation: str = "eager", seed: int = 0, **changes
) -> PreTrainedModel:
    """A model of type `name` in evaluation mode; its weights follow from `name`, `seed` and `changes` alone.

    Args:
        name: a key of `moe_architectures()`.
        dtype: of the parameters; buffers stay as they are, as after `from_pretrained`.
        implementation: of the experts, where transformers lets choose.
        changes: fields of the config's part about text.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small_config(name, **changes), dtype=torch.float32)
        with torch.no_grad():
            for label, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if label.endswith("tid2eid"):  # the experts of each word in layers that route by a table
                    tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(dim=1)[:, : tensor.shape[1]])
                elif tensor.is_floating_point() and (label.endswith("bias") or not tensor.any()):
                    tensor.copy_(0.1 * torch.randn_like(tensor))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(implementation)
    return model.eval()


def exact_dtype(name: str) -> torch.dtype:
    """fp64, except where the architecture itself casts to fp32 on the way."""
    return torch.float32 if name.startswith("inkling2") else torch.float64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(moe_architectures()), metavar="NAME")
    for name in parser.parse_args().architectures:
        try:
            model = build(name)
            with torch.no_grad():
                spread = float(model(input_ids=torch.arange(3, 19)[None]).logits.std())
            print(f"{name}: {type(model).__name__}, {model.num_parameters():,} parameters, logits' std {spread:.2f}")
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")


if __name__ == "__main__":
    main()
