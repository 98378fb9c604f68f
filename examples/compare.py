"""Compare growing with its rivals: gain on a domain against forgetting of retain texts, side by side.

Gain is the domain's held-out loss before minus after, forgetting the mean rise of the retain texts' held-out losses,
both in nats per token. An arm with a grid of settings is tuned on the first seed by its gain; every row of the grid is
printed, and the best setting is run on the other seeds.

    python examples/compare.py --arms lora sweep random --json > rows.jsonl
    python examples/compare.py --table rows.jsonl
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import corpora
from peft_pcgrow import ErrorMap, PCGrowConfig, choose, create_pcgrow_optimizer, find_experts, measure_errors

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
MAP_WINDOWS = 64


@dataclass(frozen=True)
class Setting:
    """One way to train: `build(model, seed)` gives the model to train and its optimizer."""

    arm: str
    name: str
    build: Callable[[nn.Module, int], tuple[nn.Module, torch.optim.Optimizer]]
    # retain windows mixed into each step's domain windows
    replay: int = 0


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def lora(rank: int, lr: float, experts: bool) -> Callable:
    def build(model: nn.Module, seed: int):
        tree = find_experts(model)
        stacks = {p for site in tree.sites for p in expert_paths(site)} if experts else set()
        modules = [*ATTENTION, *(MLP if experts and tree.nodes == "dense" else ())]
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=modules, target_parameters=sorted(stacks) or None
        )
        peft_model = get_peft_model(model, config)
        return peft_model, adamw(peft_model, lr)

    return build


def expert_paths(site) -> Iterator[str]:
    suffix = ".".join(site.name.split(".")[-2:])
    yield from (f"{suffix}.{name}" for name, p in site.base.named_parameters(recurse=False) if p.dim() == 3)


def grown(emap: ErrorMap, budget: float, optimizer: str, lr: float, settle: str = "sweep", select: str = "error"):
    def build(model: nn.Module, seed: int):
        options: dict[str, Any] = {"budget": budget, "select": select}
        if select == "coherent":
            options = {"locus": choose(emap.coherent, budget, layers=emap.layers)}
        config = PCGrowConfig(error_map=emap, settle=settle, seed=seed, **options)
        peft_model = get_peft_model(model, config)
        if optimizer == "muon":
            return peft_model, create_pcgrow_optimizer(peft_model, lr=lr)
        return peft_model, adamw(peft_model, lr)

    return build


def full(lr: float) -> Callable:
    def build(model: nn.Module, seed: int):
        return model, adamw(model, lr)

    return build


def settings(args: argparse.Namespace, emap: ErrorMap) -> dict[str, list[Setting]]:
    """Tuning groups of the arms asked for: within a group, the setting with the highest gain wins."""
    groups: dict[str, list[Setting]] = {}

    def add(arm: str, group: str, name: str, build: Callable, replay: int = 0) -> None:
        if arm in args.arms:
            groups.setdefault(group, []).append(Setting(arm, name, build, replay))

    for rank in args.ranks:
        for lr in args.lora_lrs:
            add("lora", "lora", f"r{rank} lr {lr:g}", lora(rank, lr, experts=True))
            add("lora-attention", "lora-attention", f"r{rank} lr {lr:g}", lora(rank, lr, experts=False))
            for replay in args.replay:
                name = f"r{rank} lr {lr:g}, {replay} retain to {args.batch} domain windows"
                add("lora-replay", f"lora-replay {replay}", name, lora(rank, lr, experts=True), replay)
    for budget in args.budgets:
        for optimizer, lrs in (("adamw", args.adam_lrs), ("muon", args.muon_lrs)):
            if optimizer not in args.optimizers:
                continue
            for lr in lrs:
                name = f"{budget:.0%} {optimizer} lr {lr:g}"
                for arm in ("sweep", "direct", "backprop"):
                    add(arm, f"{arm} {budget:.0%} {optimizer}", name, grown(emap, budget, optimizer, lr, settle=arm))
                for arm in ("coherent", "gate", "frequency", "random"):
                    build = grown(emap, budget, optimizer, lr, select=arm)
                    add(arm, f"{arm} {budget:.0%} {optimizer}", name, build)
    for lr in args.full_lrs:
        add("full", "full", f"lr {lr:g}", full(lr))
    return groups


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, context: AbstractContextManager | None = None
) -> float:
    """One clipped step on a batch `[B, S]`, its forward inside `context`; its seconds."""
    started, ids = time.perf_counter(), ids.to(next(model.parameters()).device)
    with context or nullcontext():
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[torch.Tensor]) -> list[float]:
    """A step on each batch; the seconds of each."""
    model.train()
    return [step(model, optimizer, ids) for ids in batches]


def fit(setting: Setting, task: corpora.Task, args: argparse.Namespace, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Train one setting with one seed: the model, and what is known of the run without evaluating."""
    torch.manual_seed(seed)
    model, optimizer = setting.build(corpora.new_model(task), seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    replays = mixed_replay(task, setting.replay, args.steps, seed)
    steps = corpora.batches(task.domain_train, args.batch, args.steps, seed)
    seconds = descend(model, optimizer, (torch.cat([b, next(replays)]) if setting.replay else b for b in steps))
    return model, {
        "arm": setting.arm,
        "setting": setting.name,
        "seed": seed,
        "steps": args.steps,
        "trained_parameters": trained,
        "seconds_per_step": statistics.median(seconds),
    }


def train(setting: Setting, task: corpora.Task, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one setting with one seed and measure after."""
    model, row = fit(setting, task, args, seed)
    return {**row, "after": losses(model, task)}


def mixed_replay(task: corpora.Task, count: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """`count` retain windows a step, from the retain texts in turn."""
    texts = [corpora.batches(train, 1, count * steps, seed) for train, _ in task.retain.values()]
    turn = 0
    while count:
        chosen = []
        for _ in range(count):
            chosen.append(next(texts[turn % len(texts)]))
            turn += 1
        yield torch.cat(chosen)


def losses(model: nn.Module, task: corpora.Task) -> dict[str, float]:
    return {name: corpora.evaluate(model, windows) for name, windows in task.held_out.items()}


def finish(row: dict[str, Any], before: dict[str, float]) -> dict[str, Any]:
    rises = {name: row["after"][name] - before[name] for name in before if name != "domain"}
    unseen = [rise for name, rise in rises.items() if name.endswith(corpora.UNSEEN)]
    return {
        **row,
        "gain": before["domain"] - row["after"]["domain"],
        "forgetting": statistics.mean(rise for name, rise in rises.items() if not name.endswith(corpora.UNSEEN)),
        **({"forgetting, unseen": statistics.mean(unseen)} if unseen else {}),
        "rises": rises,
    }


def table(path: Path) -> None:
    """Print rows as Markdown: medians over seeds for each setting, best gain of each arm's setting first."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if "gain" in row]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["setting"]), []).append(row)
    print("| arm | setting | seeds | gain | forgetting | s/step | trained |\n|---|---|---|---|---|---|---|")
    for (arm, setting), group in groups.items():
        gain, forgetting, seconds = (
            statistics.median(row[key] for row in group) for key in ("gain", "forgetting", "seconds_per_step")
        )
        trained = f"{group[0]['trained_parameters']:,}"
        print(f"| {arm} | {setting} | {len(group)} | {gain:.3f} | {forgetting:.3f} | {seconds:.2f} | {trained} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    known = ("lora", "lora-replay", "lora-attention", "sweep", "direct", "backprop", "coherent")
    known += ("gate", "frequency", "random", "full")
    parser.add_argument("--arms", nargs="+", choices=known, default=["lora", "lora-replay", "sweep", "random"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.12, 0.25], help="shares of the experts grown")
    parser.add_argument("--optimizers", nargs="+", choices=("adamw", "muon"), default=["adamw", "muon"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16], help="ranks of LoRA")
    parser.add_argument("--lora-lrs", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3, 1e-2, 1.5e-2])
    parser.add_argument("--adam-lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--muon-lrs", type=float, nargs="+", default=[0.02, 0.03, 0.045])
    parser.add_argument("--full-lrs", type=float, nargs="+", default=[3e-4, 1e-3, 2e-3])
    parser.add_argument("--replay", type=int, nargs="+", default=[2, 8], help="retain windows a step of lora-replay")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print rows saved with --json as a table, and stop")
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return
    task = corpora.load_task(args)
    model = corpora.new_model(task)
    before = losses(model, task)
    started = time.perf_counter()
    emap = measure_errors(model, task.domain_train[:MAP_WINDOWS].split(args.batch))
    corpora.note(emap)
    corpora.emit(
        {"machine": corpora.machine(), "before": before, "map_seconds": time.perf_counter() - started}, args.json
    )
    for group in settings(args, emap).values():
        best: tuple[float, Setting] | None = None
        for setting in group:
            row = finish(train(setting, task, args, args.seeds[0]), before)
            corpora.emit(row, args.json)
            if best is None or row["gain"] > best[0]:
                best = row["gain"], setting
        for seed in args.seeds[1:] if best else ():
            corpora.emit(finish(train(best[1], task, args, seed), before), args.json)


if __name__ == "__main__":
    main()
