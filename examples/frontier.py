"""Gain against forgetting, all of the curve: newborns behind gates of every strictness against their rivals.

A spawned adapter carries the thresholds of its gates for all false-positive rates, so one training gives a whole curve;
LoRA, full fine-tuning and deepening give one point for each learning rate, and LoRA one more behind a switch for whole
texts (`switch.py`). Gain is the domain's held-out loss before minus after, forgetting the mean rise of the retain
texts' held-out losses, in nats per token; `identical` is the share of the retain texts' tokens whose logits are the
base's to the bit.

    python examples/frontier.py --json > rows.jsonl
    python examples/frontier.py --table rows.jsonl --plot frontier.png
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import compare
import corpora
import donors
import switch
from compare import Setting
from peft_pcgrow import ErrorMap, PCGrowConfig, choose, create_pcgrow_optimizer, export_flat, measure_errors

RATES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
DONORS = ("lowest", "error", "coherent", "contested", "separable", "random")
ARMS = ("lora", "lora-replay", "full", "deepen", "spawn", "spawn-backprop", "donors", "self", "flat")


def spawned(emap: ErrorMap, args: argparse.Namespace, **options: Any) -> Callable:
    lr = options.pop("lr", args.lr)
    options = {"grow": "spawn", "budget": args.budget, "gate_fpr": args.train_fpr, "protect": args.protect, **options}

    def build(model: nn.Module, seed: int):
        peft_model = get_peft_model(model, PCGrowConfig(error_map=emap, seed=seed, **options))
        return peft_model, create_pcgrow_optimizer(peft_model, lr=lr)

    return build


def donor(rule: str, emap: ErrorMap, args: argparse.Namespace) -> dict[str, Any]:
    """What a config says to spawn by one of `DONORS`."""
    if rule in ("error", "random"):
        return {"select": rule}
    rules: dict[str, Callable[[], torch.Tensor]] = {
        "lowest": lambda: donors.lowest(emap),
        "coherent": lambda: emap.coherent,
        "contested": lambda: donors.contested(emap),
        "separable": lambda: donors.separable(emap, args.train_fpr),
    }
    return {"locus": choose(rules[rule](), args.donor_budget, layers=emap.layers)}


def settings(args: argparse.Namespace, emap: ErrorMap, self_map: ErrorMap | None) -> Iterator[Setting]:
    for lr in args.lora_lrs if "lora" in args.arms else ():
        yield Setting("lora", f"r{args.rank} lr {lr:g}", compare.lora(args.rank, lr, experts=True))
    for replay in args.replay if "lora-replay" in args.arms else ():
        for lr in args.replay_lrs:
            name = f"r8 lr {lr:g}, {replay} retain to {args.batch} domain windows"
            yield Setting("lora-replay", name, compare.lora(8, lr, experts=True), replay)
    for lr in args.full_lrs if "full" in args.arms else ():
        yield Setting("full", f"lr {lr:g}", compare.full(lr))
    for lr in args.deepen_lrs if "deepen" in args.arms else ():
        for protect in (0.0, args.protect):
            build = spawned(emap, args, grow="deepen", protect=protect, lr=lr)
            yield Setting("deepen", f"{args.budget:.0%} lr {lr:g}, protect {protect:g}", build)
    for protect in args.protects if "spawn" in args.arms else ():
        yield Setting("spawn", f"{args.budget:.0%}, protect {protect:g}", spawned(emap, args, protect=protect))
    if "spawn-backprop" in args.arms:
        build = spawned(emap, args, settle="backprop")
        yield Setting("spawn-backprop", f"{args.budget:.0%}, protect {args.protect:g}", build)
    for rule in DONORS if "donors" in args.arms else ():
        build = spawned(emap, args, budget=args.donor_budget, **donor(rule, emap, args))
        yield Setting("donors", f"{args.donor_budget:.0%}, {rule}", build)
    if "flat" in args.arms:
        # strict gates: a router row leaks
        yield Setting("flat", f"{args.budget:.0%}, protect {args.protect:g}", spawned(emap, args, router="flat"))
    if self_map is not None:
        yield Setting("self", f"{args.budget:.0%}, protect {args.protect:g}", spawned(self_map, args))


def identical(model: nn.Module, task: corpora.Task, reference: list[torch.Tensor], count: int) -> float:
    """Share of retain tokens whose logits are the base's, bit for bit."""
    model.eval()
    same: list[torch.Tensor] = []
    with torch.no_grad():
        for windows, logits in zip(bit_windows(task, count), reference, strict=True):
            same.append((model(input_ids=windows.to(logits.device)).logits == logits).all(dim=-1).flatten())
    return float(torch.cat(same).float().mean())


def bit_windows(task: corpora.Task, count: int) -> Iterator[torch.Tensor]:
    for _, held_out in task.retain.values():
        yield from corpora.spread(held_out, count).split(8)


def measured(task: corpora.Task, args: argparse.Namespace, seed: int, retain: Any = None) -> ErrorMap:
    """A map of windows drawn by `seed`, with as many of all retain texts together."""
    shuffled = next(corpora.batches(task.domain_train, args.map_windows, 1, seed))
    if retain is None:
        each = args.map_windows // len(task.retain)
        texts = [next(corpora.batches(train, each, 1, seed)) for train, _ in task.retain.values()]
        retain = torch.cat(texts)[torch.randperm(each * len(texts), generator=torch.Generator().manual_seed(seed))]
        retain = retain.split(args.batch)
    return measure_errors(corpora.new_model(task), shuffled.split(args.batch), retain=retain)


def rows(
    setting: Setting, task: corpora.Task, args: argparse.Namespace, seed: int, before: dict, reference: list
) -> Iterator[dict[str, Any]]:
    """One row, or one for each false-positive rate if the setting has gates."""
    model, row = compare.fit(setting, task, args, seed)
    gated = setting.arm in ("spawn", "spawn-backprop", "donors", "self", "flat")
    for rate in args.rates if gated else (None,):
        extra: dict[str, Any] = {}
        if rate is not None:
            model.set_gate_fpr(rate)  # type: ignore[operator]
            extra = {"gate_fpr": rate, "identical": identical(model, task, reference, args.bit_windows)}
        yield compare.finish({**row, **extra, "after": compare.losses(model, task)}, before)
    if setting.arm == "lora":
        switched = switch.losses(model, task, args.map_windows)
        yield compare.finish({**row, "arm": "lora-switch", **switched}, before)
    if setting.arm == "flat":
        yield compare.finish({**row, **exported(model, task, args)}, before)


def exported(model: nn.Module, task: corpora.Task, args: argparse.Namespace) -> dict[str, Any]:
    """The same as a plain checkpoint with flat routing."""
    texts = [next(corpora.batches(task.domain_train, 24, 1, 0))]
    texts += [next(corpora.batches(train, 8, 1, 0)) for train, _ in task.retain.values()]
    with tempfile.TemporaryDirectory() as folder:
        report = export_flat(model, Path(folder) / "flat", torch.cat(texts).split(args.batch))
        plain = AutoModelForCausalLM.from_pretrained(Path(folder) / "flat", dtype=torch.float32)
    corpora.note(report)
    return {"arm": "flat, exported", "kl": report.kl, "after": compare.losses(plain, task)}


def medians(path: Path) -> list[dict[str, Any]]:
    """Medians over seeds of each arm, setting and rate."""
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    groups: dict[tuple, list[dict]] = {}
    for row in found:
        if "gain" in row:
            groups.setdefault((row["arm"], row["setting"], row.get("gate_fpr")), []).append(row)
    return [
        {
            "arm": arm,
            "setting": setting,
            "gate_fpr": rate,
            "seeds": len(group),
            **{
                key: statistics.median(row[key] for row in group)
                for key in ("gain", "forgetting", "identical", "seconds_per_step")
                if key in group[0]
            },
        }
        for (arm, setting, rate), group in groups.items()
    ]


def table(found: list[dict[str, Any]]) -> None:
    print("| arm | setting | gate_fpr | seeds | gain | forgetting | identical tokens | s/step |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        rate = "" if row["gate_fpr"] is None else f"{row['gate_fpr']:g}"
        same = f"{row['identical']:.1%}" if "identical" in row else ""
        numbers = f"{row['gain']:.3f} | {row['forgetting']:.4f} | {same} | {row['seconds_per_step']:.2f}"
        print(f"| {row['arm']} | {row['setting']} | {rate} | {row['seeds']} | {numbers} |")


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Gain over forgetting, the latter on a logarithmic axis; one line for each curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[dict]] = {}
    for row in found:
        if row["arm"].partition(",")[0] not in ("donors", "self", "flat"):
            name = row["arm"]
            if name in ("spawn", "deepen"):
                name += ", " + row["setting"].rpartition(", ")[2]
            elif name == "lora-replay":
                name += ", " + row["setting"].rpartition(", ")[2].replace(" domain windows", "")
            curves.setdefault(name, []).append(row)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in curves.items():
        points.sort(key=lambda row: row["forgetting"])
        style = {"marker": "o", "linewidth": 2.2} if name.startswith("spawn,") else {"marker": "s", "linestyle": "--"}
        axes.plot([p["forgetting"] for p in points], [p["gain"] for p in points], label=name, markersize=4, **style)
    axes.set_xscale("log")
    axes.set(xlabel="forgetting (mean rise of the retain losses, nats/token)", ylabel="gain (nats/token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    add = parser.add_argument
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS[:6]))
    add("--budget", type=float, default=0.5, help="share of the experts grown (default: %(default)s)")
    add("--donor-budget", type=float, default=0.12, help="the same, where donor rules are compared")
    add("--lr", type=float, default=0.02, help="of Muon on newborns (default: %(default)s)")
    add("--train-fpr", type=float, default=0.1, help="gate_fpr of the training (default: %(default)s)")
    add("--protect", type=float, default=0.8, help="where it is not varied (default: %(default)s)")
    add("--protects", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9], help="of the spawn arm")
    add("--rates", type=float, nargs="+", default=list(RATES), help="gate_fpr in evaluation")
    add("--rank", type=int, default=16, help="of LoRA (default: %(default)s)")
    add("--lora-lrs", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3, 1e-2])
    add("--replay", type=int, nargs="+", default=[2, 8], help="retain windows a step of lora-replay")
    add("--replay-lrs", type=float, nargs="+", default=[3e-3, 6e-3, 1e-2])
    add("--full-lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    add("--deepen-lrs", type=float, nargs="+", default=[0.01, 0.02])
    add("--map-windows", type=int, default=192, help="windows of each side that gates are fitted on")
    add("--bit-windows", type=int, default=24, help="windows of each retain text compared with the base's bit by bit")
    add("--table", type=Path, metavar="FILE", help="print rows saved with --json as a table, and stop")
    add("--plot", type=Path, metavar="PNG", help="with --table: draw them too")
    args = parser.parse_args()
    if args.table:
        found = medians(args.table)
        table(found)
        if args.plot:
            plot(found, args.plot)
        return
    task = corpora.load_task(args)
    base = corpora.new_model(task)
    before = compare.losses(base, task)
    with torch.no_grad():
        reference = [base(input_ids=windows.to(task.device)).logits for windows in bit_windows(task, args.bit_windows)]
    corpora.emit({"machine": corpora.machine(), "before": before}, args.json)
    for seed in args.seeds:
        emap = measured(task, args, seed)
        self_map = measured(task, args, seed, retain="self") if "self" in args.arms else None
        for setting in settings(args, emap, self_map):
            for row in rows(setting, task, args, seed, before, reference):
                corpora.emit(row, args.json)


if __name__ == "__main__":
    main()
