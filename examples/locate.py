"""Does the error map find where to grow? Six studies.

select     gain at equal trained parameters: the map's choices at two resolutions, against gate score, frequency,
           gradient norm, weight magnitude and chance.
damage     a model that knows a text gets one expert damaged: does the map find it, does deepening it alone repair it?
verdicts   on the domain and on each retain text, held out.
stability  rank correlation between the maps of two halves of the corpus, by their size.
hops       relaxation hops until the errors settle, per layer: text that the model knows against text that it does not.
cost       seconds of a map by each way of settling, against a sweep that carries the errors and nothing else.

Gains are held-out losses before minus after, nats per token. One JSON object a row with --json; medians with --table.

    python examples/locate.py --study select --budgets 0.06 --json > rows.jsonl
    python examples/locate.py --table rows.jsonl
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

import compare
import corpora
from peft_pcgrow import ErrorMap, PCGrowConfig, choose, create_pcgrow_optimizer, find_experts, measure_errors
from peft_pcgrow.settling.layer_stack import LayerStack

STUDIES = ("select", "damage", "verdicts", "stability", "hops", "cost")
# arm: (select, resolution)
MAPS = {
    "removable": ("removable", "expert"),
    "removable, matrix": ("removable", "matrix"),
    "error": ("error", "expert"),
    "gate": ("gate", "expert"),
    "frequency": ("frequency", "expert"),
    "random": ("random", "expert"),
    "random, matrix": ("random", "matrix"),
}
ARMS = (*MAPS, "gradient norm", "magnitude", "all")
DAMAGES = ("permute", "noise", "negate", "zero")
# a damaged expert counts if the loss rises by this share
DAMAGE_RISE = 0.01
# smallest number of rows of an expert that is damaged
ROWS = 300


def magnitude(model: nn.Module) -> torch.Tensor:
    """How large each expert's weights are, squared Frobenius norm, `[L, E]`."""
    norms = []
    for site in find_experts(model).sites:
        stacks = [p.detach() for p in site.base.parameters(recurse=False) if p.dim() == 3]
        norms.append(sum(stack.double().square().sum((1, 2)) for stack in stacks))
    return torch.stack(norms)


def builder(arm: str, budget: float, emap: ErrorMap, args: argparse.Namespace) -> Callable:
    def build(model: nn.Module, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        options: dict[str, Any] = {"settle": args.settle, "seed": seed}
        if arm in ("magnitude", "gradient norm"):
            scores = magnitude(model) if arm == "magnitude" else emap.coherent
            options["locus"] = choose(scores, budget, layers=emap.layers)
        elif arm == "all":
            options |= {"error_map": emap, "budget": 1.0}
        else:
            select, resolution = MAPS[arm]
            options |= {"error_map": emap, "budget": budget, "select": select, "resolution": resolution}
        lr = args.all_lr if arm == "all" else args.lr
        grown = get_peft_model(model, PCGrowConfig(**options))
        return grown, create_pcgrow_optimizer(grown, lr=lr)

    return build


def select(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    before = compare.losses(corpora.new_model(task), task)
    known: dict[tuple, dict[str, Any]] = {}
    for seed in args.seeds:
        shuffled = next(corpora.batches(task.domain_train, args.map_windows, 1, seed))
        emap = measure_errors(corpora.new_model(task), shuffled.split(args.batch), progress=False)
        for budget in args.budgets:
            for arm in args.arms:
                if arm == "all" and budget != args.budgets[0]:
                    continue
                setting = compare.Setting(arm, f"{budget:.0%}", builder(arm, budget, emap, args))
                # arms that choose the same nodes train the same model
                model, _ = setting.build(corpora.new_model(task), seed)
                config = model.peft_config["default"]
                key = (seed, arm == "all", json.dumps([config.locus, config.parts]))
                if key not in known:
                    known[key] = compare.finish(compare.train(setting, task, args, seed), before)
                yield {**known[key], "study": "select", "arm": arm, "budget": budget, "locus": config.locus}


def damaged(model: nn.Module, node: tuple[int, int], kind: str, seed: int) -> nn.Module:
    """A copy of the model with one expert's weights broken."""
    broken = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    base = next(site.base for site in find_experts(broken).sites if site.layer == node[0])
    with torch.no_grad():
        for name, stack in base.named_parameters(recurse=False):
            weights = stack[node[1]]
            if kind == "noise" and stack.dim() == 3:
                weights += 2 * weights.std() * torch.randn(weights.shape, generator=generator)
            elif name == "down_proj" and kind == "permute":
                axis = 0 if base.is_transposed else 1
                order = torch.randperm(weights.shape[axis], generator=generator)
                weights.copy_(weights.index_select(axis, order))
            elif name == "down_proj" and kind != "noise":
                weights.mul_({"negate": -1.0, "zero": 0.0}[kind])
    return broken


def damage(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Damage one expert at a time; the domain must be text that the model knows (default: its training text)."""
    if args.domain is None:
        train, held_out = next(iter(task.retain.values()))
        task = replace(task, domain_train=train, domain_eval=held_out)
    model = corpora.new_model(task)
    batches = task.domain_train[: args.map_windows].split(args.batch)
    healthy = measure_errors(model, batches, progress=False)
    before = compare.losses(model, task)
    nodes = [(healthy.layers[l], e) for l, e in (healthy.count >= ROWS).nonzero().tolist()]
    for seed in args.seeds:
        chosen = random.Random(seed)
        found = 0
        while found < args.damages:
            node, kind = chosen.choice(nodes), chosen.choice(DAMAGES)
            broken = damaged(model, node, kind, seed)
            after = compare.losses(broken, task)
            if after["domain"] < (1 + DAMAGE_RISE) * before["domain"]:
                continue
            found += 1
            emap = measure_errors(broken, batches, progress=False)
            row: dict[str, Any] = {"study": "damage", "seed": seed, "kind": kind, "node": node}
            row |= {"verdict": emap.diagnosis.verdict, "verdict with reference": emap.diagnose(healthy).verdict}
            excess = emap.removable().estimate - healthy.removable().estimate
            for name, score in (
                ("removable", emap.removable().estimate),
                ("removable beyond the healthy map", excess),
                ("error", emap.score("error")),
                ("gradient norm", emap.coherent),
                ("frequency", emap.score("frequency")),
            ):
                place = emap.layers.index(node[0]), node[1]
                row[f"rank by {name}"] = int((score > score[place]).sum())
            repaired = repair(broken, node, task, args, seed)
            row |= {"healthy": before["domain"], "damaged": after["domain"], "repaired": repaired}
            yield row


def repair(broken: nn.Module, node: tuple[int, int], task: corpora.Task, args: argparse.Namespace, seed: int) -> float:
    """Held-out loss after deepening one expert alone."""
    grown = get_peft_model(broken, PCGrowConfig(locus={node[0]: [node[1]]}, settle=args.settle))
    setting = compare.Setting("repair", "", lambda *_: (grown, create_pcgrow_optimizer(grown, lr=args.lr)))
    model, _ = compare.fit(setting, task, argparse.Namespace(**{**vars(args), "steps": args.repair_steps}), seed)
    return corpora.evaluate(model, task.domain_eval)


def ranks(score: torch.Tensor) -> torch.Tensor:
    return score.flatten().argsort().argsort().double()


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def verdicts(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = corpora.new_model(task)
    for name, windows in task.held_out.items():
        diagnosis = measure_errors(model, windows.split(args.batch), progress=False).diagnosis
        yield {"study": "verdicts", "text": name, **{k: v for k, v in vars(diagnosis).items() if k != "nodes"}}


def stability(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = corpora.new_model(task)
    for seed in args.seeds:
        for tokens in args.tokens:
            count = tokens // args.length
            drawn = next(corpora.batches(task.domain_train, 2 * count, 1, seed))
            halves = [measure_errors(model, half.split(args.batch), progress=False) for half in drawn.chunk(2)]
            row: dict[str, Any] = {"study": "stability", "seed": seed, "tokens": tokens}
            for statistic in ("removable", "error", "coherent", "frequency"):
                row[statistic] = correlation(*(half.score(statistic) for half in halves))
            row["matrix"] = correlation(*(half.removable("matrix").estimate for half in halves))
            bounds = [half.removable().interval for half in halves]
            means = [half.removable().estimate for half in halves]
            inside = (bounds[0][0] <= means[1]) & (means[1] <= bounds[0][1])
            row["other half within the interval"] = float(inside.double().mean())
            yield row


def hops(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = corpora.new_model(task)
    texts = {"domain": task.domain_train, **{name: train for name, (train, _) in task.retain.items()}}
    for seed in args.seeds:
        for name, windows in texts.items():
            drawn = next(corpora.batches(windows, args.map_windows, 1, seed)).split(args.batch)
            emap = measure_errors(model, drawn, settle="relax", settle_tol=args.tol, gradients=False, progress=False)
            assert emap.hops is not None
            mean = (emap.hops * torch.arange(emap.hops.shape[1])).sum(1) / emap.hops.sum(1)
            yield {
                "study": "hops",
                "seed": seed,
                "text": name,
                "loss": emap.loss / emap.labels,
                "tol": args.tol,
                "mean hops, bottom layer first": [round(value, 3) for value in mean.tolist()],
            }


def cost(task: corpora.Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = corpora.new_model(task)
    batches = task.domain_train[: args.map_windows].split(args.batch)
    layers = find_experts(model).layers

    def sweep() -> None:
        # the embedding's gradient needs the errors of all layers and nothing else of them
        model.requires_grad_(False).train()
        model.get_input_embeddings().requires_grad_(True)
        with LayerStack(layers):
            for ids in batches:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        model.requires_grad_(False)

    ways: dict[str, dict[str, Any]] = {
        "sweep": {},
        "sweep, no gradients": {"gradients": False},
        "direct": {"settle": "direct"},
        "direct, gradients": {"settle": "direct", "gradients": True},
        "relax": {"settle": "relax"},
    }
    maps: dict[str, ErrorMap] = {}
    seconds: dict[str, list[float]] = {}
    for _ in args.seeds:
        for name, options in {"errors only": None, **ways}.items():
            started = time.perf_counter()
            if options is None:
                sweep()
            else:
                maps[name] = measure_errors(model, batches, progress=False, **options)
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    unit = statistics.median(seconds["errors only"])
    for name, taken in seconds.items():
        row = {"study": "cost", "way": name, "seconds": statistics.median(taken)}
        row["relative"] = row["seconds"] / unit
        for score in ("error", "removable"):
            if name in maps and (score == "error" or maps[name].has_parts):
                row[f"rank correlation, {score}"] = correlation(maps[name].score(score), maps["sweep"].score(score))
        yield row


def table(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "gain" in row:
            groups.setdefault((row["budget"], row["arm"]), []).append(row)
    print("| budget | arm | seeds | gain | forgetting | trained |\n|---|---|---|---|---|---|")
    for (budget, arm), group in sorted(groups.items(), key=lambda item: (item[0][0], -median(item[1], "gain"))):
        trained = f"{group[0]['trained_parameters']:,}"
        gain, forgetting = median(group, "gain"), median(group, "forgetting")
        print(f"| {budget:.0%} | {arm} | {len(group)} | {gain:.3f} | {forgetting:.3f} | {trained} |")
    found = [row for row in rows if row.get("study") == "damage"]
    for name in [key for key in (found[0] if found else {}) if key.startswith("rank by")]:
        print(f"{name}: first in {sum(row[name] == 0 for row in found)} of {len(found)}")


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    parser.set_defaults(seeds=[0, 1, 2, 3, 4])
    add = parser.add_argument
    add("--study", choices=STUDIES, default="select")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--budgets", type=float, nargs="+", default=[0.03, 0.06, 0.12, 0.25], help="shares of the expert parameters")
    add("--lr", type=float, default=0.03, help="Muon's learning rate (default: %(default)s)")
    add("--all-lr", type=float, default=0.02, help="the same where all experts train (default: %(default)s)")
    add("--settle", default="sweep", help="sweep, or backprop: the same gradients (default: %(default)s)")
    add("--map-windows", type=int, default=64, help="windows that a map is measured on (default: %(default)s)")
    add("--damages", type=int, default=4, help="experts damaged a seed (default: %(default)s)")
    add("--repair-steps", type=int, default=80)
    add("--tokens", type=int, nargs="+", default=[4096, 16384, 65536], help="of each half, for stability")
    add("--tol", type=float, default=0.1, help="tolerance of the relaxation (default: %(default)s)")
    add("--table", type=Path, metavar="FILE", help="print rows saved with --json as a table, and stop")
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return
    task = corpora.load_task(args)
    corpora.emit({"machine": corpora.machine(), "study": args.study}, args.json)
    studies = {study.__name__: study for study in (select, damage, verdicts, stability, hops, cost)}
    for row in studies[args.study](task, args):
        corpora.emit(row, args.json)


if __name__ == "__main__":
    main()
