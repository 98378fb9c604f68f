"""Tiny models whose MLPs are nodes: dense ones, and shared ones beside routed experts."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from peft_pcgrow import PCGrowConfig, find_experts
from tiny import COMMON, build, dense

GPT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}


def random_biases(model):
    """No bias at zero, as some architectures start them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def seeded(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random_biases(kind(config)).eval()


def phi3():
    """Gate and up are one linear layer."""
    return seeded(Phi3ForCausalLM, Phi3Config(**COMMON, intermediate_size=64))


def gemma2():
    return seeded(Gemma2ForCausalLM, Gemma2Config(**COMMON, intermediate_size=64, head_dim=8))


def gpt2(**changes):
    """No gate, biases, transposed weights, dropout after the MLP, layers called `h`."""
    return seeded(GPT2LMHeadModel, GPT2Config(n_positions=128, **GPT, **changes))


def neox():
    """No gate, biases; attention and MLP read the same residual stream."""
    return seeded(GPTNeoXForCausalLM, GPTNeoXConfig(intermediate_size=64, max_position_embeddings=128, **GPT))


def apertus():
    """No gate; the activation has parameters."""
    return seeded(ApertusForCausalLM, ApertusConfig(**COMMON, intermediate_size=64))


CASES = {
    "llama": (dense, "dense", ["gate_proj", "up_proj", "down_proj"]),
    "phi3": (phi3, "dense", ["gate_up_proj", "down_proj"]),
    "gemma2": (gemma2, "dense", ["gate_proj", "up_proj", "down_proj"]),
    "gpt2": (gpt2, "dense", ["c_fc", "c_proj"]),
    "neox": (neox, "dense", ["dense_h_to_4h", "dense_4h_to_h"]),
    "qwen2_moe, shared": (lambda: build("qwen2_moe"), "shared", ["gate_proj", "up_proj", "down_proj"]),
    "deepseek_v3, shared": (lambda: build("deepseek_v3"), "shared", ["gate_proj", "up_proj", "down_proj"]),
    "deepseek_v3, dense": (lambda: build("deepseek_v3"), "dense", ["gate_proj", "up_proj", "down_proj"]),
}
every_case = pytest.mark.parametrize("name", CASES)


def made(name, dtype=torch.float32):
    make, nodes, _ = CASES[name]
    return make().to(dtype), nodes


def grown(model, nodes, **changes):
    locus = {site.layer: [0] for site in find_experts(model, nodes).sites}
    return get_peft_model(model, PCGrowConfig(**{"locus": locus, "nodes": nodes, **changes}))


def linears(model, name):
    """An MLP's linear layers, by decoder layer: read from the model, not through what is tested."""
    found = {}
    for path, module in model.named_modules():
        names = CASES[name][2]
        parts = path.split(".")
        shared = any(part.startswith("shared_expert") for part in parts)
        if all(hasattr(module, each) for each in names) and shared == (CASES[name][1] == "shared"):
            found[int(next(part for part in parts if part.isdigit()))] = [getattr(module, each) for each in names]
    return found
