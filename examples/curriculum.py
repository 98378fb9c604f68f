"""Does the order of the examples matter? Located experts trained on the same windows in several orders.

Every run takes as many steps on the same windows; only their order differs. Surprisal is measured before training;
seconds per step include it. Gain and forgetting are as in compare.py.

    python examples/curriculum.py --json > rows.jsonl
    python examples/curriculum.py --table rows.jsonl
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import compare
import corpora
from peft_pcgrow import ErrorMap, measure_errors, order_by_surprisal

# options of order_by_surprisal; {window} examples are sorted at a time
ORDERS: dict[str, dict[str, Any] | None] = {
    "shuffled": None,
    "ascending": {},
    "descending": {"descending": True},
    "ascending in windows": {"window": True},
}


def ordered(arm: str, model, windows: torch.Tensor, args: argparse.Namespace) -> Iterable[torch.Tensor]:
    """The windows `[N, length]`, which come shuffled, one by one."""
    options = ORDERS[arm]
    if options is None:
        return windows
    if "window" in options:
        options = {**options, "window": args.window}
    return order_by_surprisal(list(windows), model, batch_size=2 * args.batch, **options)


def train(arm: str, emap: ErrorMap, task: corpora.Task, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model, optimizer = compare.grown(emap, args.budget, "muon", args.lr)(corpora.new_model(task), seed)
    windows = torch.cat(list(corpora.batches(task.domain_train, args.batch, args.steps, seed)))
    started = time.perf_counter()
    examples = ordered(arm, model, windows, args)
    batches = torch.utils.data.DataLoader(examples, batch_size=args.batch)  # type: ignore[arg-type]
    seconds = compare.descend(model, optimizer, batches)
    return {
        "arm": arm,
        "setting": f"{args.budget:.0%} muon lr {args.lr:g}",
        "seed": seed,
        "steps": len(seconds),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds_per_step": (time.perf_counter() - started) / len(seconds),
        "after": compare.losses(model, task),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    add = parser.add_argument
    add("--arms", nargs="+", choices=list(ORDERS), default=list(ORDERS))
    add("--window", type=int, default=64, help="examples that are sorted at a time (default: %(default)s)")
    add("--budget", type=float, default=0.12, help="share of the experts grown (default: %(default)s)")
    add("--lr", type=float, default=0.02, help="of Muon (default: %(default)s)")
    add("--table", type=Path, metavar="FILE", help="print rows saved with --json as a table, and stop")
    args = parser.parse_args()
    if args.table:
        compare.table(args.table)
        return
    task = corpora.load_task(args)
    model = corpora.new_model(task)
    before = compare.losses(model, task)
    emap = measure_errors(model, task.domain_train[: compare.MAP_WINDOWS].split(args.batch))
    corpora.emit({"machine": corpora.machine(), "before": before, "window": args.window}, args.json)
    for seed in args.seeds:
        for arm in args.arms:
            corpora.emit(compare.finish(train(arm, emap, task, args, seed), before), args.json)


if __name__ == "__main__":
    main()
