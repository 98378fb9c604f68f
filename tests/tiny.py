"""Tiny random language models, built from configs: nothing is downloaded.

All have hidden size 32, 8 experts and 128 words; every width divides by 8, so that `grouped_mm` takes bf16 too. Weights
are larger than a fresh initialisation's and no router bias is left at zero, so that routing is not degenerate.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
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
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_pcgrow import ErrorMap, PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.gates.gate import CERTAIN, LATELY, at_rate

# transformers 5.24 came out before the PEFT that its own integration asks for
needs_native = pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' own add_adapter refuses this PEFT; it asks for {MIN_PEFT_VERSION}",
)
# nodes to grow in any of the models
LOCUS = {1: [1, 4], 2: [0, 3, 7]}
VOCABULARY, HIDDEN, EXPERTS, PAD = 128, 32, 8, 0
# first and last word of the texts to grow on, and of those that must not change
DOMAIN_WORDS, RETAIN_WORDS = (3, 60), (61, 127)
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
    name: str | Callable[..., PreTrainedModel] = "qwen3_moe",
    dtype: torch.dtype = torch.float32,
    implementation: str = "eager",
    seed: int = 0,
    **changes,
) -> PreTrainedModel:
    """A model in evaluation mode; the weights follow from `name` (of an architecture above, or what makes a model) and
    `seed` alone, `changes` go to its config."""
    here = torch.get_default_device()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = (name if callable(name) else ARCHITECTURES[name])(**changes)
        with torch.no_grad():
            for label, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if label.endswith("bias"):
                    tensor.copy_(0.1 * torch.randn_like(tensor))
    for parameter in model.parameters():  # buffers keep fp32, as after from_pretrained
        parameter.data = parameter.data.to(dtype)
    model.set_experts_implementation(implementation)
    return model.to(here).eval()


def dense(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny Llama: no experts."""
    here = torch.get_default_device()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=64)).to(here, dtype).eval()


def tokens(batch: int = 4, length: int = 16, seed: int = 0) -> Tensor:
    """Random words without the special ones, `[batch, length]`."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def words(first: int, last: int, batch: int, length: int, seed: int) -> Tensor:
    """Random words from `first` to `last`, `[batch, length]`."""
    return torch.randint(first, last + 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def domain(batch: int = 8, length: int = 24, seed: int = 0) -> Tensor:
    return words(*DOMAIN_WORDS, batch, length, 2 * seed)


def retain(batch: int = 8, length: int = 24, seed: int = 0) -> Tensor:
    return words(*RETAIN_WORDS, batch, length, 2 * seed + 1)


def mixed(length: int = 24, seed: int = 50) -> Tensor:
    """Three domain texts, three retain texts, one that turns from domain to retain, and one the other way."""
    ours, theirs, half = domain(8, length, seed), retain(8, length, seed), length // 2
    turning = torch.cat([ours[6:8, :half], theirs[6:8, half:]], dim=1)
    turning[1] = torch.cat([theirs[7, :half], ours[7, half:]])
    return torch.cat([ours[:3], theirs[:3], turning])


@cache
def contrast(name: str = "qwen3_moe", window: int = 8) -> ErrorMap:
    """A map of domain text with branch gates against retain text; of the fp32 model, and good for its other dtypes."""
    texts = [domain(64, seed=1), domain(64, seed=2)], [retain(64, seed=1), retain(64, seed=2)]
    return measure_errors(build(name), texts[0], retain=texts[1], window=window, gradients=False, progress=False)


def spawning(name: str = "qwen3_moe", window: int = 8, **changes) -> PCGrowConfig:
    """A config that spawns a newborn under every node of LOCUS."""
    settings = {"error_map": contrast(name, window), "locus": LOCUS, "grow": "spawn", "gate_fpr": 0.05}
    return PCGrowConfig(**{**settings, **changes})


def spawned(
    name: str = "qwen3_moe",
    dtype: torch.dtype = torch.float32,
    implementation: str = "eager",
    autocast: bool = True,
    **changes,
) -> PeftModel:
    """A tiny model with newborns under the nodes of LOCUS; `changes` go to `spawning`."""
    config = spawning(name, **changes)
    return get_peft_model(build(name, dtype, implementation), config, autocast_adapter_dtype=autocast)


@torch.no_grad()
def taken(model: nn.Module, ids: Tensor, adapter: str = "default", **inputs) -> dict[int, Tensor]:
    """Tokens of which a newborn takes a row, `[B, S]` by layer: from a gate's definition, token by token."""
    found, handles = {}, []
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()

    def look(layer: nn.Module, args: tuple) -> None:
        passes = gate_passes(layer, adapter, args[0].view(*ids.shape, -1), real)
        routed = torch.isin(args[1], torch.tensor(layer.births[adapter].spawned)).any(dim=1)
        found[layer.layer_index] = passes & routed.view(ids.shape)

    for site in find_experts(model).sites:
        if adapter in getattr(site.module, "births", ()):
            handles.append(site.module.register_forward_pre_hook(look))
    try:
        model(input_ids=ids, use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def gate_passes(layer: nn.Module, adapter: str, hidden: Tensor, real: Tensor, kind: str = "gate") -> Tensor:
    """Which tokens of `hidden [B, S, H]` have more evidence than an adapter's threshold at a layer, `[B, S]`."""
    return gate_margin(layer, adapter, hidden, real, kind) > 0


def gate_margin(layer: nn.Module, adapter: str, hidden: Tensor, real: Tensor, kind: str = "gate") -> Tensor:
    """Evidence of the tokens of `hidden [B, S, H]` above an adapter's threshold at a layer, `[B, S]` fp64 nats."""
    law, threshold, direction = (
        getattr(layer, f"pcgrow_{kind}_{name}")[adapter] for name in ("law", "threshold", "direction")
    )
    middle, distance, between, within = law.double().tolist()
    birth = layer.births[adapter]
    threshold, window = float(at_rate(threshold, birth.gate_fpr)), birth.window or real.shape[1]
    scores = (hidden.float() * direction).sum(-1).double()
    margin = torch.full(real.shape, float("-inf"), dtype=torch.float64)
    for row, place in real.nonzero().tolist():
        said = []
        for size in (window, min(window, LATELY)):
            span = slice(max(place + 1 - size, 0), place + 1)
            inside = scores[row, span][real[row, span]]
            said.append((float(inside.mean()) - middle) * distance / (between + within / len(inside)))
        certain = abs(said[1]) > CERTAIN
        margin[row, place] = ((max if said[1] > 0 else min)(said) if certain else said[0]) - threshold
    return margin


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


def language_loss(ids: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(input_ids=ids, labels=ids).loss


def oracle(
    base: nn.Module, loss: Callable[[nn.Module], Tensor], locus: Mapping[int, Sequence[int]]
) -> dict[str, Tensor]:
    """Autograd through the whole untouched model: located slices of the gradients of its stacks, by the adapter's
    names."""
    base.train().requires_grad_(True).zero_grad()
    loss(base).backward()
    return {
        f"base_model.model.{site.name}.pcgrow_{name}.default.weight": stack.grad[list(locus[site.layer])]
        for site in find_experts(base).sites
        if site.layer in locus
        for name, stack in expert_stacks(site.base).items()
    }


def train(
    model: nn.Module, steps: int = 3, lr: float = 1e-2, seed: int = 1, texts: Callable[..., Tensor] = tokens
) -> list[float]:
    """Some AdamW steps on all that requires a gradient; the losses. `texts(seed=...)` gives a batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(steps):
        ids = texts(seed=seed + step).to(next(model.parameters()).device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None, **inputs) -> Tensor:
    """Logits of a batch, without a cache; of a fixed one if none is given."""
    was_training = model.training
    model.eval()
    ids = (tokens(seed=99) if ids is None else ids).to(next(model.parameters()).device)
    output = model(input_ids=ids, use_cache=False, **inputs).logits
    model.train(was_training)
    return output
