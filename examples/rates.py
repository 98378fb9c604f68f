"""Which learning rate fits a model: what `find_lr` finds, beside what the size of its weights would say.

For each share of the experts grown it prints the rate found, and the rate at which one step of Muon changes the weights
by a thousandth of their norm. Where the rate that trains best is known (from `compare.py`, `frontier.py` or
`converge.py`), a rule that holds for models of all sizes is off from it by the same factor everywhere.

    python examples/rates.py --model PATH --domain DIR/NAME --budgets 0.12 0.5
"""

import argparse
import time

import torch
from peft import get_peft_model

import corpora
from peft_pcgrow import PCGrowConfig, find_lr, measure_errors
from peft_pcgrow.training.muon import banks_of, update_of


def by_weights(model: torch.nn.Module) -> float:
    """The rate at which a step is a thousandth of the weights' norm, on average over matrices."""
    shares = []
    for bank in banks_of(model):
        weight = bank.detach()
        update = update_of(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight))
        shares.append((weight.norm(dim=(1, 2)) / update.norm(dim=(1, 2))).mean())
    return 1e-3 * float(torch.stack(shares).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.12, 0.5], help="shares of the experts grown")
    parser.add_argument("--find-batches", type=int, default=4, help="batches that a rate is found on")
    args = parser.parse_args()
    task = corpora.load_task(args)
    corpora.emit({"machine": corpora.machine()}, args.json)
    emap = measure_errors(corpora.new_model(task), corpora.spread(task.domain_train, 64).split(args.batch))
    for budget in args.budgets:
        for seed in args.seeds:
            model = get_peft_model(corpora.new_model(task), PCGrowConfig(error_map=emap, budget=budget))
            started = time.perf_counter()
            found = find_lr(model, list(corpora.batches(task.domain_train, args.batch, args.find_batches, seed)))
            seconds = time.perf_counter() - started
            row = {"budget": budget, "seed": seed, "found": found, "by weights": by_weights(model), "seconds": seconds}
            corpora.emit(row, args.json)


if __name__ == "__main__":
    main()
