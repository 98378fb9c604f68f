"""Peak memory and time of a training step, by depth: settling against backprop and LoRA, side by side.

Random weights, one optimizer step on the same batch for each arm. Memory is what a step allocates at its peak beyond
what it started with (weights and gradients buffers included, the model itself not): exact from the allocator's own
record. Times are medians of interleaved steps, so that a noisy machine disturbs all arms alike.

    python examples/benchmark.py                                     # CPU, a small MoE of 4 to 32 layers
    python examples/benchmark.py --shape olmoe --depths 16 --device cuda --dtype bfloat16 --length 2048
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

import corpora
from compare import lora
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts, measure_errors

SHAPES = {
    "small": lambda depth: Qwen3MoeConfig(
        vocab_size=4096, hidden_size=192, num_hidden_layers=depth, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, moe_intermediate_size=96, num_experts=16, num_experts_per_tok=2, tie_word_embeddings=True,
    ),
    # OLMoE-1B-7B (arXiv:2409.02060)
    "olmoe": lambda depth: OlmoeConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=depth, num_attention_heads=16,
        num_experts=64, num_experts_per_tok=8,
    ),
}  # fmt: skip


def grown(settle: str, budget: float, top_half: bool = False, packed: str | None = None) -> Callable:
    def build(model: nn.Module):
        layers = [site.layer for site in find_experts(model).sites]
        some = layers[len(layers) // 2 :] if top_half else None
        options = {"settle": settle, "layers_to_transform": some, "base_quantization": packed}
        config = PCGrowConfig(select="random", budget=budget, **options)
        model = get_peft_model(model, config)
        return model, create_pcgrow_optimizer(model, lr=0.02)

    return build


def spawned(budget: float, protect: float) -> Callable:
    def build(model: nn.Module):
        # the lower half of the vocabulary stands for the domain, as in the batch that is timed
        half = model.config.vocab_size // 2
        words = torch.randint(half, (16, 64))
        emap = measure_errors(model, [words], retain=[words + half], gradients=False, progress=False)
        options = {"select": "random", "budget": budget, "gate_fpr": 0.05, "protect": protect}
        model = get_peft_model(model, PCGrowConfig(error_map=emap, grow="spawn", **options))
        return model, create_pcgrow_optimizer(model, lr=0.02)

    return build


def peft_lora(model: nn.Module):
    return lora(rank=8, lr=1e-4, experts=True)(model, 0)


def arms(budget: float) -> dict[str, tuple[Callable, bool]]:
    """Per arm: how to build it, and whether layers are checkpointed."""
    return {
        "sweep": (grown("sweep", budget), False),
        "sweep, top half": (grown("sweep", budget, top_half=True), False),
        "direct": (grown("direct", budget), False),
        "sweep, nf4 base": (grown("sweep", budget, packed="nf4"), False),
        "spawn": (spawned(budget, 0.0), False),
        "spawn, protected": (spawned(budget, 0.8), False),
        "backprop": (grown("backprop", budget), False),
        "backprop, nf4 base": (grown("backprop", budget, packed="nf4"), False),
        "backprop, checkpointed": (grown("backprop", budget), True),
        "LoRA": (peft_lora, False),
        "LoRA, checkpointed": (peft_lora, True),
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def timed(run: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--budget", type=float, default=0.12, help="share of the experts grown, chosen at random")
    parser.add_argument("--arms", nargs="+", choices=arms(0.12), default=list(arms(0.12)))
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each arm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    corpora.emit({"machine": corpora.machine(), **{k: v for k, v in vars(args).items() if k != "json"}}, args.json)
    for depth in args.depths:
        config = SHAPES[args.shape](depth)
        ids = torch.randint(config.vocab_size // 2, (args.batch, args.length), device=device)
        memory: dict[str, int] = {}
        seconds: dict[str, list[float]] = {name: [] for name in args.arms}
        # every arm on the same machine state: round after round, each arm once
        for turn in range(args.steps + 1):
            for name in args.arms:
                build, checkpointed = arms(args.budget)[name]
                torch.manual_seed(0)
                with device:
                    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
                if checkpointed:
                    base.gradient_checkpointing_enable({"use_reentrant": False})
                model, optimizer = build(base)
                model.train()
                step(model, optimizer, ids)  # optimizer state is made here, outside the measurement

                def run(model=model, optimizer=optimizer, ids=ids) -> None:
                    step(model, optimizer, ids)

                if turn == 0:
                    memory[name] = peak_bytes(run, device)
                else:
                    seconds[name].append(timed(run, device))
                del model, optimizer, base, run
                gc.collect()
        for name in args.arms:
            row = {"depth": depth, "arm": name, "peak_mib": memory[name] / 2**20}
            row["seconds_per_step"] = statistics.median(seconds[name])
            corpora.emit(row, args.json)


if __name__ == "__main__":
    main()
