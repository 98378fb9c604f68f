"""Run by test_step_memory.py: what steps take on each of two processes that FSDP2 shards a model over."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import benchmark
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer

LAYERS, EXPERTS = 6, 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# what a step takes most for -> vocabulary, inner neurons, grown experts of a layer, texts, tokens
SHAPES = {"output": (1024, 48, 2, 4, 96), "descent": (64, 96, 2, 4, 96), "update": (64, 192, 8, 1, 16)}
TWO = [
    ("output", "sweep", "Muon"),
    ("descent", "sweep", "Muon"),
    ("descent", "direct", "AdamW"),
    ("update", "LoRA", "AdamW"),
]


def config(shape: str) -> Qwen3MoeConfig:
    words, inner, *_ = SHAPES[shape]
    return Qwen3MoeConfig(
        vocab_size=words, hidden_size=96, num_hidden_layers=LAYERS, num_attention_heads=3, num_key_value_heads=1,
        head_dim=32, moe_intermediate_size=inner, num_experts=EXPERTS, num_experts_per_tok=4, tie_word_embeddings=True,
    )  # fmt: skip


def grown(shape: str, way: str) -> PeftModel:
    model, count = AutoModelForCausalLM.from_config(config(shape), dtype=torch.float32), SHAPES[shape][2]
    if way == "LoRA":
        return get_peft_model(model, LoraConfig(r=16, target_modules=ATTENTION))
    if way == "spawn":
        return benchmark.spawned(0.0)(model, count / EXPERTS)
    return get_peft_model(model, PCGrowConfig(locus={n: [*range(count)] for n in range(LAYERS)}, settle=way))


def stepping(model: PeftModel, shape: str, optimizer: str) -> Callable[[], None]:
    """One step; the first has been taken, and the optimizer's state is there."""
    words, *_, texts, length = SHAPES[shape]
    ids = torch.randint(words, (texts, length))
    stepper = create_pcgrow_optimizer(model, lr=1e-3) if optimizer == "Muon" else benchmark.adamw(model)

    def step() -> None:
        benchmark.step(model.train(), stepper, ids)

    step()
    return step


def here(shape: str, way: str, optimizer: str) -> dict[str, int]:
    """Bytes of weights and buffers on this process, and of a step."""
    model = grown(shape, way)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    step = stepping(fully_shard(model), shape, optimizer)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in (*model.parameters(), *model.buffers())]
    # what gloo's threads let go of is not always seen
    peak = min(benchmark.peak_bytes(step, torch.device("cpu")) for _ in range(2))
    return {"held": sum(p.untyped_storage().nbytes() for p in local), "step": peak}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save({case: here(*case) for case in TWO}, Path(sys.argv[1]) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
