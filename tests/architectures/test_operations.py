"""Operations counted from shapes are those that torch counts while it computes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flops import counted
from mlp_models import gpt2, phi3
from pcgrow_kernels.orthogonalize import STEPS, orthogonalize
from peft_pcgrow import find_experts, measure_errors
from peft_pcgrow.architectures.operations import Shapes, orthogonalization
from tiny import build, dense, tokens

BATCH, LENGTH = 4, 24
SIZE = BATCH * LENGTH, BATCH * LENGTH * LENGTH
# shared experts, dense layers below, latent attention, biases, MLPs as nodes
MODELS = {name: (lambda name=name: build(name)) for name in ("qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss")}
MODELS |= {"dense": dense, "gpt2": gpt2, "phi3": phi3}


def made(name):
    model = MODELS[name]()
    model.set_attn_implementation("eager")
    return model, Shapes.of(model, find_experts(model))


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_full_training(name):
    model, shapes = made(name)
    ids = tokens(BATCH, LENGTH)
    with torch.no_grad():
        assert counted(lambda: model(input_ids=ids, use_cache=False)) == shapes.forward(*SIZE)
    model.train().requires_grad_(True)
    assert counted(lambda: model(input_ids=ids, labels=ids).loss.backward()) == shapes.full(*SIZE)


@pytest.mark.parametrize("gradients", [True, False])
def test_measuring(gradients):
    """In the lowest layer the error goes a step into the experts, which is left out."""
    model, shapes = made("qwen3_moe")
    ids, trained = tokens(BATCH, LENGTH), sum(shapes.routed) * gradients
    found = counted(lambda: measure_errors(model, [ids], gradients=gradients, progress=False))
    assert shapes.sweep(*SIZE, 0, trained) == pytest.approx(found, rel=0.02)


def test_lora():
    """What enters the lowest layer needs no gradient, which is left out."""
    model, shapes = made("phi3")
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    grown = get_peft_model(model, LoraConfig(r=16, target_modules=names)).train()
    ids = tokens(BATCH, LENGTH)
    assert sum(p.numel() for p in grown.parameters() if p.requires_grad) == 16 * shapes.sides
    found = counted(lambda: grown(input_ids=ids, labels=ids).loss.backward())
    first = model.model.layers[0].self_attn.qkv_proj
    left_out = 2 * SIZE[0] * (first.weight.numel() + 16 * first.in_features)
    assert shapes.lora(*SIZE, 16) == found + left_out


@pytest.mark.parametrize("shape", [(3, 8, 12), (12, 8)])
def test_orthogonalization(shape):
    found = counted(lambda: orthogonalize(torch.randn(shape)))
    assert orthogonalization(shape, STEPS) == found
