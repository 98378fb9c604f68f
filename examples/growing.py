"""Grow in one call (`peft_pcgrow.grow`), on one domain or one after another, and measure on text that it never saw.

Of every text, `DIR/NAME.train.jsonl` gives windows to grow with; the first windows of a domain's `DIR/NAME.eval.jsonl`
are its held-out text, and all others are what is measured in the end. A later domain goes on from what was grown
before, with the earlier domains among its retain texts, each of which is spared by itself. Gain: fall of a domain's
loss; forgetting: mean rise of the retain texts'; backward transfer: mean, over all domains but the last, of a domain's
loss after its own run minus that at the end (negative: forgotten); nats per token.

    python examples/growing.py --model PATH --domain DIR/A --retain DIR/NAME --retain DIR/OTHER --out FOLDER
    python examples/growing.py --model PATH --domain DIR/A --domain DIR/B --retain DIR/NAME --out FOLDER

In the place of DIR/NAME, `reference` and `source` name Python's language reference and its standard library. The same
command goes on where it was interrupted. The same numbers need the same class of machine, and `--threads`.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpora
from peft_pcgrow import grow

# texts that come with Python, by what they are called in the place of DIR/NAME
NAMED = {"reference": corpora.language_reference, "source": corpora.stdlib_source}
# arguments of grow that are options here
OPTIONS = ("length", "budget", "epochs", "rounds", "max_forgetting", "map_windows", "gate_fpr", "lr")


def read(args: argparse.Namespace, tokenizer: Any) -> dict[str, dict[str, torch.LongTensor]]:
    """Windows by text and use: "train", "heldout" of domains, and "third", which `grow` is not given."""
    found: dict[str, dict[str, torch.LongTensor]] = {}
    for spec in (*args.domain, *args.retain):
        name, count = Path(spec).name, args.heldout if spec in args.domain else 0
        if name in found:
            raise SystemExit(f"two texts are called {name}: rename one")
        train, rest = (
            corpora.windows(tokenizer, NAMED.get(spec, partial(corpora.load_corpus, spec))(split), args.length)
            for split in ("train", "eval")
        )
        most = args.windows if count else args.retain_windows
        if len(rest) <= count:
            raise SystemExit(f"{spec}.eval.jsonl has {len(rest)} windows, and {count} are held out: lower --heldout")
        third = corpora.spread(rest[count:], args.third)  # type: ignore[arg-type]
        found[name] = {"train": train[:most], "heldout": rest[:count], "third": third}  # type: ignore[dict-item]
    return found


def evaluate(model: nn.Module, texts: dict[str, dict[str, torch.LongTensor]]) -> dict[str, float]:
    return {name: corpora.evaluate(model, held["third"]) for name, held in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="PATH", type=Path, required=True, help="model folder")
    add("--domain", metavar="DIR/NAME", action="append", required=True, help="to grow into; repeatable, in order")
    add("--retain", metavar="DIR/NAME", action="append", required=True, help="text that must stay; repeatable")
    add("--out", metavar="FOLDER", type=Path, required=True, help="folder of the runs")
    add("--windows", type=int, default=960, help="of each domain, to train on (default: %(default)s)")
    add("--retain-windows", type=int, default=192, help="of each retain text (default: %(default)s)")
    add("--heldout", type=int, default=64, help="windows of each domain that grow looks at (default: %(default)s)")
    add("--third", type=int, default=64, help="windows of each text to measure on (default: %(default)s)")
    add("--length", type=int, default=192, help="tokens of a window (default: %(default)s)")
    add("--budget", type=float, default=0.5, help="share of the experts that a round grows (default: %(default)s)")
    add("--epochs", type=float, default=2.0, help="of a round (default: %(default)s)")
    add("--rounds", type=int, default=1, help="of a domain, at most (default: %(default)s)")
    add("--max-forgetting", type=float, default=0.03, help="nats per token (default: %(default)s)")
    add("--map-windows", type=int, default=192, help="that maps are measured on (default: %(default)s)")
    add("--protect", type=float, help="share of the retain text's energy that is spared (default: grow's)")
    add("--gate-fpr", type=float, default=0.1, help="of the training (default: %(default)s)")
    add("--lr", type=float, help="of Muon (default: found)")
    add("--threads", type=int, help="of torch (default: its own)")
    add("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = read(args, AutoTokenizer.from_pretrained(args.model))
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    stages = [evaluate(model, texts)]
    domains = [Path(spec).name for spec in args.domain]
    kept = [Path(spec).name for spec in args.retain]
    for place, name in enumerate(domains):
        spared = {other: texts[other]["train"][: args.retain_windows] for other in (*kept, *domains[:place])}
        result = grow(
            model,
            texts[name]["train"],
            heldout=texts[name]["heldout"],
            retain=spared,
            output_dir=args.out / name,
            progress=False,
            config=None if args.protect is None else {"protect": args.protect},
            **{option: getattr(args, option) for option in OPTIONS},
        )
        corpora.note(result)
        model = result.model
        stages.append(evaluate(model, texts))
        rose = {other: stages[-1][other] - stages[0][other] for other in kept}
        row = {"domain": name, "gain": result.gain, "forgetting": result.forgetting}
        row |= {"third text's gain": stages[0][name] - stages[-1][name]}
        row |= {"third text's forgetting": statistics.mean(rose.values())} | rose
        corpora.emit(row | {"result": result.row()} if args.json else row, args.json)
    if domains[1:]:
        moved = [stages[place + 1][name] - stages[-1][name] for place, name in enumerate(domains[:-1])]
        gains = {name: stages[0][name] - stages[-1][name] for name in domains}
        corpora.emit({"backward transfer": statistics.mean(moved)} | gains, args.json)


if __name__ == "__main__":
    main()
