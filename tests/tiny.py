"""Tiny random language models, built from configs: nothing is downloaded.

All have hidden size 32, 8 experts and 128 words; every width divides by 8, so that `grouped_mm` takes bf16 too. Weights
are larger than a fresh initialisation's and no router bias is left at zero, so that routing is not degenerate.
"""

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_pcgrow import PCGrowConfig

# nodes to grow in any of the models
LOCUS = {1: [1, 4], 2: [0, 3, 7]}
VOCABULARY, HIDDEN, EXPERTS, PAD = 128, 32, 8, 0
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def qwen3_moe(**changes) -> PreTrainedModel:
    settings = {
        "head_dim": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**COMMON, **settings, **changes}))


def olmoe(**changes) -> PreTrainedModel:
    settings = {"intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 3}
    return OlmoeForCausalLM(OlmoeConfig(**{**COMMON, **settings, **changes}))


def mixtral(**changes) -> PreTrainedModel:
    settings = {"intermediate_size": 24, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**{**COMMON, **settings, **changes}))


def qwen2_moe(**changes) -> PreTrainedModel:
    """With a shared expert and its gate."""
    settings = {
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**COMMON, **settings, **changes}))


def deepseek_v3(**changes) -> PreTrainedModel:
    """Layer 0 is dense; experts are chosen within one of two groups, by scores with a correction bias."""
    settings = {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**COMMON, **settings, **changes}))


def gpt_oss(**changes) -> PreTrainedModel:
    """Transposed stacks with biases, interleaved gates, a sliding window on every second layer."""
    settings = {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "intermediate_size": 16,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return GptOssForCausalLM(GptOssConfig(**{**COMMON, **settings, **changes}))


ARCHITECTURES = {
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}


def build(
    name: str = "qwen3_moe",
    dtype: torch.dtype = torch.float32,
    implementation: str = "eager",
    seed: int = 0,
    **changes,
) -> PreTrainedModel:
    """A model in evaluation mode; the weights follow from `name` and `seed` alone, `changes` go to its config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[name](**changes)
        with torch.no_grad():
            for label, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if label.endswith("bias"):
                    tensor.copy_(0.1 * torch.randn_like(tensor))
    for parameter in model.parameters():  # buffers keep fp32, as after from_pretrained
        parameter.data = parameter.data.to(dtype)
    model.set_experts_implementation(implementation)
    return model.eval()


def dense(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny Llama: no experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=64)).to(dtype).eval()


def tokens(batch: int = 4, length: int = 16, seed: int = 0) -> Tensor:
    """Random words without the special ones, `[batch, length]`."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and persistent buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, changed


def grown(**changes) -> PeftModel:
    """A tiny model with an adapter on LOCUS; changes by `build`'s names go there, the rest to the config."""
    build_names = {"name", "dtype", "implementation", "seed"}
    model = build(**{key: changes.pop(key) for key in list(changes) if key in build_names})
    autocast = changes.pop("autocast_adapter_dtype", True)
    return get_peft_model(model, PCGrowConfig(**{"locus": LOCUS, **changes}), autocast_adapter_dtype=autocast)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def backward(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of one batch by parameter name; everything that trains must get one."""
    model.train()
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainable(model).items()}
    assert all(bool(gradient.any()) for gradient in gradients.values())
    return gradients


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2, seed: int = 1) -> list[float]:
    """Some AdamW steps on all that requires a gradient; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(steps):
        ids = tokens(seed=seed + step).to(next(model.parameters()).device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module, **inputs) -> Tensor:
    """Logits of a fixed batch, without a cache."""
    was_training = model.training
    model.eval()
    ids = tokens(seed=99).to(next(model.parameters()).device)
    output = model(input_ids=ids, use_cache=False, **inputs).logits
    model.train(was_training)
    return output
