"""What a training step costs, forward, backward and optimizer apart, and its peak memory: growing against LoRA.

Random weights, the same batch for every arm. Every arm is timed with the optimizer that it is used with and with fused
AdamW, so that methods are compared and not optimizers. Before anything is timed, a small copy of the shape must give
the base's outputs at birth, and by settling the gradients of backprop; else there is no report. Memory is what a step
takes at its peak beyond the model. Of `--turns` turns each goes over all arms, so that a noisy machine disturbs them
alike; medians.

    python examples/benchmark.py                                   # CPU, 8 layers of 16 experts
    python examples/benchmark.py --shape wide --arms sweep direct LoRA    # 16 layers of 64 experts
    python examples/benchmark.py --vary experts 8 32 128           # or layers, budget, length: how cost grows
    python examples/benchmark.py --shape olmoe --device cuda --profile sweep direct   # OLMoE-1B-7B's shape; minutes
    python examples/benchmark.py --arms --maps 4                   # what a map of 4 batches costs, in forwards
"""

import argparse
import copy
import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

import corpora
from compare import lora
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts, measure_errors

# share of the largest gradient that those by settling and by backprop may differ by, by the dtype of the weights
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# ways to measure a map
MAPS: dict[str, dict[str, Any]] = {
    "with gradients": {},
    "without": {"gradients": False},
    "direct": {"gradients": False, "settle": "direct"},
}
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of a batch; those that are None are the command's own."""

    make: Callable[..., PreTrainedConfig]
    layers: int
    experts: int
    batch: int
    length: int


def small(layers: int, experts: int) -> PreTrainedConfig:
    return Qwen3MoeConfig(
        vocab_size=4096, hidden_size=192, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, moe_intermediate_size=96, num_experts=experts, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip


def wide(layers: int, experts: int) -> PreTrainedConfig:
    config: Any = small(layers, experts)
    config.num_experts_per_tok = 8
    return config


def olmoe(layers: int, experts: int) -> PreTrainedConfig:
    """OLMoE-1B-7B (arXiv:2409.02060)."""
    return OlmoeConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=16,
        num_experts=experts, num_experts_per_tok=8,
    )  # fmt: skip


SHAPES = {
    "small": Shape(small, 8, 16, 8, 192),
    "wide": Shape(wide, 16, 64, 8, 192),
    "olmoe": Shape(olmoe, 16, 64, 4, 2048),
}


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        build: gives the model to train, from the base and a budget. muon: what it is used with; else AdamW.
        checkpointed: whether layers are. trains: False: a forward alone. inside: whether Muon steps inside the sweep.
    """

    build: Callable[[Any, float], nn.Module]
    muon: bool = True
    checkpointed: bool = False
    trains: bool = True
    inside: bool = False


def grown(**options: Any) -> Callable[[Any, float], nn.Module]:
    def build(model: Any, budget: float) -> nn.Module:
        return get_peft_model(model, PCGrowConfig(select="random", budget=budget, **options))

    return build


def top_half(**options: Any) -> Callable[[Any, float], nn.Module]:
    def build(model: Any, budget: float) -> nn.Module:
        layers = [site.layer for site in find_experts(model).sites]
        return grown(layers_to_transform=layers[len(layers) // 2 :], **options)(model, budget)

    return build


def random_nodes(model: Any, budget: float) -> dict[int, list[int]]:
    """That share of all experts, by layer: gates, which cannot tell random texts apart, would leave most alone."""
    every = [(site.layer, expert) for site in find_experts(model).sites for expert in range(site.module.num_experts)]
    chosen = sorted(random.Random(0).sample(every, max(1, round(budget * len(every)))))
    return {layer: [e for at, e in chosen if at == layer] for layer in dict(chosen)}


def spawned(protect: float) -> Callable[[Any, float], nn.Module]:
    def build(model: Any, budget: float) -> nn.Module:
        # the lower half of the vocabulary stands for the domain, as in the batch that is timed
        half = model.config.vocab_size // 2
        words = torch.randint(half, (16, 64))
        emap = measure_errors(model, [words], retain=[words + half], gradients=False, progress=False)
        nodes = random_nodes(model, budget)
        return get_peft_model(
            model, PCGrowConfig(error_map=emap, locus=nodes, grow="spawn", gate_fpr=0.05, protect=protect)
        )

    return build


def peft_lora(experts: bool) -> Callable[[Any, float], nn.Module]:
    def build(model: Any, budget: float) -> nn.Module:
        return lora(rank=8, lr=1e-4, experts=experts)(model, 0)[0]

    return build


ARMS = {
    "forward": Arm(lambda model, budget: model, trains=False),
    "sweep": Arm(grown()),
    "sweep, activations kept": Arm(grown(keep_activations=10**4)),
    "sweep, top half": Arm(top_half()),
    "sweep, top half, activations kept": Arm(top_half(keep_activations=10**4)),
    "sweep, stepped inside": Arm(grown(), inside=True),
    "sweep, no logits": Arm(grown(keep_logits=False)),
    "sweep, no logits, stepped inside": Arm(grown(keep_logits=False), inside=True),
    "direct": Arm(grown(settle="direct")),
    "spawn": Arm(spawned(0.0)),
    "spawn, protected": Arm(spawned(0.8)),
    "backprop": Arm(grown(settle="backprop")),
    "backprop, checkpointed": Arm(grown(settle="backprop"), checkpointed=True),
    "sweep, nf4 base": Arm(grown(base_quantization="nf4")),
    "backprop, nf4 base": Arm(grown(settle="backprop", base_quantization="nf4")),
    "LoRA": Arm(peft_lora(experts=True), muon=False),
    "LoRA, checkpointed": Arm(peft_lora(experts=True), muon=False, checkpointed=True),
    "LoRA on attention": Arm(peft_lora(experts=False), muon=False),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True)


def new_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def counts(run: Callable[[], None], device: torch.device) -> dict[str, int]:
    """What a step asks of the device: kernels launched and waits of the host for it; on a CPU, operations of torch."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        run()
    found = Counter(event.name for event in profiled.events())
    if not cuda:
        return {"operations": sum(times for name, times in found.items() if name.startswith("aten::"))}
    launches = sum(times for name, times in found.items() if "LaunchKernel" in name)
    waits = sum(times for name, times in found.items() if name in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    return {"launches": launches, "synchronisations": waits}


class Clock:
    """Seconds of each phase, turn after turn."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds.setdefault(phase, []).append(time.perf_counter() - began)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def median(self, phase: str) -> float:
        return statistics.median(self.seconds[phase]) if phase in self.seconds else 0.0


@dataclass
class Runner:
    """An arm that is set up: its model, its own optimizer, and AdamW."""

    arm: Arm
    model: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    clock: Clock
    ids: Tensor

    @classmethod
    def of(cls, arm: Arm, config: PreTrainedConfig, budget: float, ids: Tensor, dtype: torch.dtype) -> "Runner":
        base = new_model(config, ids.device, dtype)
        if arm.checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = arm.build(base, budget)
        optimizers: dict[str, torch.optim.Optimizer] = {}
        if arm.muon and arm.trains:
            optimizers["Muon"] = create_pcgrow_optimizer(model, lr=1e-3, inside_sweep=arm.inside)
        if arm.trains and not arm.inside:
            optimizers["AdamW"] = adamw(model)
        runner = cls(arm, model.train(arm.trains), optimizers, Clock(ids.device), ids)
        runner.turn(timed=False)  # the state of optimizers is made outside of what is measured
        return runner

    def turn(self, timed: bool = True) -> None:
        clock = self.clock if timed else Clock(self.ids.device)
        if not self.arm.trains:
            with torch.no_grad(), clock.of("forward"):
                loss_of(self.model, self.ids)
            return
        with clock.of("forward"):
            loss = loss_of(self.model, self.ids)
        with clock.of("backward"):
            loss.backward()
        for name, optimizer in self.optimizers.items():
            with clock.of(f"optimizer {name}"):
                optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def own_step(self) -> None:
        if self.arm.trains:
            step(self.model, next(iter(self.optimizers.values())), self.ids)
        else:
            self.turn(timed=False)

    def rows(self) -> Iterator[dict[str, Any]]:
        both = {phase: 1000 * self.clock.median(phase) for phase in ("forward", "backward")}
        for name in self.optimizers or ("none",):
            taken = 1000 * self.clock.median(f"optimizer {name}")
            row = {**both, "optimizer": taken, "step": sum(both.values()) + taken}
            yield {"with": name, **{f"{phase} ms": value for phase, value in row.items()}}


def check(shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Raise SystemExit unless a small copy of the shape computes what it must."""
    config = shape.make(2, shape.experts)
    ids = torch.randint(config.vocab_size // 2, (2, 64), device=device)
    base = new_model(config, device, dtype).eval()
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
        born = ARMS["sweep"].build(base, 0.2).eval()(input_ids=ids).logits
    off = float((born - wanted).abs().max() / wanted.abs().max())
    gradients: dict[str, dict[str, Tensor]] = {}
    for name in ("sweep", "backprop"):
        model = ARMS[name].build(new_model(config, device, dtype), 0.2).train()
        loss_of(model, ids).backward()
        gradients[name] = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in gradients["backprop"].values())
    apart = max(float((g - gradients["backprop"][n]).abs().max()) for n, g in gradients["sweep"].items()) / largest
    if not (off <= CLOSE[dtype] and apart <= CLOSE[dtype]):
        raise SystemExit(
            f"no report: at birth outputs differ from the base's by {off:.2g} of the largest, gradients by settling "
            f"from backprop's by {apart:.2g}, and {CLOSE[dtype]:g} is allowed"
        )


def measure(config: PreTrainedConfig, ids: Tensor, budget: float, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each arm and optimizer."""
    dtype = getattr(torch, args.dtype)
    # a GPU is quiet, and holds one such model
    for group in [[name] for name in args.arms] if ids.is_cuda else [args.arms]:
        runners, beside = {name: Runner.of(ARMS[name], config, budget, ids, dtype) for name in group}, {}
        for name, runner in runners.items():
            beside[name] = {"peak MiB": peak_bytes(runner.own_step, ids.device) / 2**20}
            beside[name] |= counts(runner.own_step, ids.device) if name in args.profile else {}
        for _ in range(args.turns):
            for runner in runners.values():
                runner.turn()
        for name, runner in runners.items():
            yield from ({"arm": name, **row, **beside[name]} for row in runner.rows())
        del runners, runner
        gc.collect()


def maps(config: PreTrainedConfig, ids: Tensor, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What maps of `--maps` batches cost, in forwards that give losses."""
    model = new_model(config, ids.device, getattr(torch, args.dtype)).eval()

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(args.maps):
            loss_of(model, ids)

    ways: dict[str, Callable[[], Any]] = {"forwards": forwards}
    for name, options in MAPS.items():
        ways[name] = partial(measure_errors, model, [ids] * args.maps, progress=False, **options)
    clock = Clock(ids.device)
    for turn in range(args.turns + 1):
        for name, run in ways.items():
            with (clock if turn else Clock(ids.device)).of(name):
                run()
    base = clock.median("forwards")
    for name in MAPS:
        yield {"map": name, "ms": 1000 * clock.median(name), "forwards": clock.median(name) / base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="small")
    for name in ("layers", "experts", "batch", "length"):
        add(f"--{name}", type=int, help="instead of the shape's own")
    add("--vocabulary", type=int, help="instead of the shape's own")
    add("--budget", type=float, default=0.12, help="share of the experts grown, chosen at random")
    add("--vary", nargs="+", default=[], metavar="NAME", help="layers, experts, length or budget, and its values")
    add("--maps", type=int, default=0, help="batches of maps to time too, 4 or more: fewer are cut")
    add("--arms", nargs="*", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    add("--profile", nargs="*", choices=ARMS, default=[], metavar="ARM", help="count what these ask of the device")
    add("--turns", type=int, default=3, help="timed steps of each arm")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of the base (default: float32 on a CPU, else bfloat16)")
    add("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    shape = SHAPES[args.shape]
    check(shape, device, getattr(torch, args.dtype))
    card = {"card": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    corpora.emit(
        {"machine": corpora.machine(), **card, **{k: v for k, v in vars(args).items() if k != "json"}}, args.json
    )
    name, *values = args.vary or ["", ""]
    for value in values:
        given = {n: getattr(args, n) or getattr(shape, n) for n in ("layers", "experts", "batch", "length")}
        given["budget"] = args.budget
        if name:
            given[name] = type(given[name])(value)
        config: Any = shape.make(given["layers"], given["experts"])
        config.vocab_size = args.vocabulary or config.vocab_size
        ids = torch.randint(config.vocab_size // 2, (given["batch"], given["length"])).to(device)
        for row in chain(measure(config, ids, given["budget"], args), maps(config, ids, args) if args.maps else ()):
            corpora.emit({**({name: given[name]} if name else {}), **row}, args.json)


if __name__ == "__main__":
    main()
