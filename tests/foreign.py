"""Tiny random models of the architectures whose experts transformers does not mark; see `tiny` for their sizes."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    PreTrainedModel,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
)

from tiny import COMMON, EXPERTS, HIDDEN, VOCABULARY, build


def common(*without: str, **changes) -> dict:
    return {name: value for name, value in (COMMON | changes).items() if name not in without}


def dbrx() -> PreTrainedModel:
    attention = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}
    experts = {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": 3}
    sizes = {"d_model": HIDDEN, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "vocab_size": VOCABULARY}
    words = {name: COMMON[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")}
    return DbrxForCausalLM(DbrxConfig(**sizes, **words, attn_config=attention, ffn_config=experts))


def jetmoe() -> PreTrainedModel:
    """Its attention is a mixture too."""
    sizes = {"intermediate_size": 24, "kv_channels": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return JetMoeForCausalLM(JetMoeConfig(**common(num_key_value_heads=4), **sizes))


def llama4(chosen: int = 1) -> PreTrainedModel:
    """Layers 1 and 3 have experts."""
    sizes = {"head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 48, "attention_chunk_size": 8}
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": chosen, "interleave_moe_layer_step": 2}
    return Llama4ForCausalLM(Llama4TextConfig(**common(num_hidden_layers=5), **sizes, **experts))


def longcat_flash() -> PreTrainedModel:
    """Three more experts hand tokens on as they are; every layer holds two attentions and two MLPs."""
    sizes = {
        "num_layers": 3, "num_key_value_heads": 4, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16,
        "n_routed_experts": EXPERTS, "zero_expert_num": 3, "moe_topk": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    }  # fmt: skip
    return LongcatFlashForCausalLM(LongcatFlashConfig(**common("num_hidden_layers", "num_key_value_heads"), **sizes))


def step3p7() -> PreTrainedModel:
    """Layer 0 is dense, the experts of layer 2 clamp."""
    text = {
        "num_hidden_layers": 4, "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16,
        "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "share_expert_dim": 24, "sliding_window": 8,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "swiglu_limits": [None, None, 0.3, None],
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {name: COMMON[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = Step3p7Config(text_config=common() | text, vision_config=vision, image_token_id=1, **words)
    return Step3p7ForConditionalGeneration(config)


FOREIGN: dict[str, Callable[[], PreTrainedModel]] = {
    "dbrx": dbrx,
    "jetmoe": jetmoe,
    "llama4": llama4,
    "longcat_flash": longcat_flash,
    "step3p7": step3p7,
}
# layers with experts
LAYERS = {"dbrx": [0, 1, 2], "jetmoe": [0, 1, 2], "llama4": [1, 3], "longcat_flash": [0, 1, 2], "step3p7": [1, 2, 3]}


def foreign(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build(FOREIGN[name], dtype)


def own_stacks(name: str, model: PreTrainedModel, of: Callable[[Tensor], Tensor]) -> dict[int, dict[str, Tensor]]:
    """By layer, the experts' matrices in the layout of the contract, read from where the architecture keeps them.

    Args:
        of: what is taken of a parameter: itself, or its gradient.
    """
    found = {}
    for index in LAYERS[name]:
        if name == "dbrx":
            mlp = model.transformer.blocks[index].ffn.experts.mlp
            gate, up, down = (of(weight).view(EXPERTS, -1, HIDDEN) for weight in (mlp.w1, mlp.v1, mlp.w2))
            found[index] = {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down.mT}
            continue
        layers = model.model.language_model.layers if name == "step3p7" else model.model.layers
        block = layers[index].feed_forward if name == "llama4" else layers[index].mlp
        if name == "jetmoe":
            first, last = block.input_linear.weight, block.output_linear.weight
        else:
            first, last = block.experts.gate_up_proj, block.experts.down_proj
        found[index] = {"gate_up_proj": of(first)[:EXPERTS], "down_proj": of(last)}
    return found
