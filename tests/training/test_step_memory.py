"""What a step is said to take, against the allocator's own record of one."""

from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DeepseekV3Config, OlmoeConfig, Qwen3MoeConfig

import benchmark
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts
from peft_pcgrow.training.step_memory import StepMemory, step_memory

LAYERS, EXPERTS = 6, 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# what a step takes most for -> vocabulary, inner neurons, grown experts of a layer, texts, tokens
SHAPES = {"output": (1024, 48, 2, 4, 96), "descent": (64, 96, 2, 4, 96), "update": (64, 192, 8, 1, 16)}
CASES = [
    *(("descent", way, "Muon") for way in ("sweep", "direct", "backprop", "spawn")),
    ("descent", "LoRA", "AdamW"),
    ("output", "sweep", "AdamW"),
    ("output", "backprop", "Muon"),
    ("update", "sweep", "Muon"),
]  # AdamW's update takes nothing that the way down has not


def config(shape: str) -> Qwen3MoeConfig:
    words, inner, *_ = SHAPES[shape]
    return Qwen3MoeConfig(
        vocab_size=words, hidden_size=96, num_hidden_layers=LAYERS, num_attention_heads=3, num_key_value_heads=1,
        head_dim=32, moe_intermediate_size=inner, num_experts=EXPERTS, num_experts_per_tok=4, tie_word_embeddings=True,
    )  # fmt: skip


@cache
def told(shape: str) -> dict[tuple[str, str], StepMemory]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(shape), dtype=torch.float32)
    *_, grown, texts, length = SHAPES[shape]
    rows = step_memory(model, find_experts(model), dict.fromkeys(range(LAYERS), grown), texts, length, "cpu")
    return {(row.way, row.optimizer): row for row in rows}


def measured(shape: str, way: str, optimizer: str) -> int:
    """Of the second step, when the optimizer's state is there."""
    *_, grown, texts, length = SHAPES[shape]
    model = AutoModelForCausalLM.from_config(config(shape), dtype=torch.float32)
    ids = torch.randint(SHAPES[shape][0], (texts, length))
    if way == "LoRA":
        model = get_peft_model(model, LoraConfig(r=16, target_modules=ATTENTION))
    elif way == "spawn":
        model = benchmark.spawned(0.0)(model, grown / EXPERTS)
    else:
        locus = {layer: [*range(grown)] for layer in range(LAYERS)}
        model = get_peft_model(model, PCGrowConfig(locus=locus, settle=way))
    stepper = create_pcgrow_optimizer(model, lr=1e-3) if optimizer == "Muon" else benchmark.adamw(model)

    def step() -> None:
        benchmark.step(model.train(), stepper, ids)

    step()
    return benchmark.peak_bytes(step, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.cpu("kernels of a GPU take other memory on the way")
@pytest.mark.parametrize(("shape", "way", "optimizer"), CASES)
def test_as_measured(shape, way, optimizer):
    row = told(shape)["sweep" if way == "spawn" else way, optimizer]
    assert row.step == getattr(row, shape)
    assert row.step == pytest.approx(measured(shape, way, optimizer), rel=0.1)


def test_what_is_held():
    """The base, banks in fp32, and the optimizer's state, to the byte."""
    model = AutoModelForCausalLM.from_config(config("descent"))
    storages = {held.untyped_storage().data_ptr(): held.untyped_storage() for held in model.state_dict().values()}
    storages |= {held.untyped_storage().data_ptr(): held.untyped_storage() for held in model.buffers()}
    weights = sum(storage.nbytes() for storage in storages.values())
    experts = model.model.layers[0].mlp.experts
    one = 4 * (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel())
    lora = get_peft_model(model, LoraConfig(r=16, target_modules=ATTENTION)).get_nb_trainable_parameters()[0]
    for (way, optimizer), row in told("descent").items():
        adapter = 4 * lora if way == "LoRA" else LAYERS * 2 * one
        held = row.base, row.adapter, row.state
        assert held == (weights, adapter, adapter * (1 if optimizer == "Muon" else 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [OlmoeConfig, DeepseekV3Config, Qwen3MoeConfig])
def test_whole_models(kind):
    """At their real sizes, and by a GPU's kernels: sweeping takes less than backprop, and what a step takes grows with
    its tokens."""
    found = []
    for length in (256, 512):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind(), dtype=torch.bfloat16)
        tree = find_experts(model)
        rows = step_memory(model, tree, {site.layer: 2 for site in tree.sites}, 2, length)
        found.append({(row.way, row.optimizer): row for row in rows})
    short, long = found
    assert long["sweep", "Muon"].step < long["backprop", "Muon"].step
    for name, row in long.items():
        assert short[name].output < row.output < 2.01 * short[name].output
        assert short[name].base == row.base
