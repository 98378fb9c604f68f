"""What a gated bank, or packed experts, cost at inference: tokens per second against the base, prefill and decode.

Newborns are at random nodes (time does not depend on their weights). "open" reads the domain's text, which the gates
let pass, "closed" the retain text, which they do not. Base and grown model take turns in one run; the numbers are
medians of the turns' ratios.

    python examples/inference.py --shares 0 0.1 0.5 --packed int8 nf4
    python examples/inference.py --shape olmoe --shares 0.12 --device cuda    # random weights and texts of that shape
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

import benchmark
import corpora
from peft_pcgrow import PCGrowConfig, compress, measure_errors


def now(windows: torch.Tensor) -> float:
    """Seconds, once the device of `windows` has nothing left to do."""
    if windows.is_cuda:
        torch.cuda.synchronize(windows.device)
    return time.perf_counter()


@torch.no_grad()
def prefill(model: nn.Module, windows: torch.Tensor, new: int) -> float:
    started = now(windows)
    model(input_ids=windows, use_cache=True)
    return windows.numel() / (now(windows) - started)


@torch.no_grad()
def decode(model: nn.Module, windows: torch.Tensor, new: int) -> float:
    """Tokens per second after the prompt, greedily, one call each."""
    output = model(input_ids=windows, use_cache=True)
    started = now(windows)
    for _ in range(new):
        chosen = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
    return len(windows) * new / (now(windows) - started)


def compared(base: nn.Module, other: nn.Module, windows: torch.Tensor, args: argparse.Namespace, row: dict) -> None:
    windows = windows.to(next(base.parameters()).device)
    for what in (prefill, decode):
        ratios, speeds = [], []
        for _ in range(args.turns + 1):
            bare, mine = what(base, windows, args.new), what(other, windows, args.new)
            ratios.append(mine / bare)
            speeds.append(bare)
        numbers = {"base tokens/s": round(statistics.median(speeds[1:])), "ratio": statistics.median(ratios[1:])}
        corpora.emit({**row, "phase": what.__name__, **numbers}, args.json)


Texts = dict[str, torch.Tensor]  # by what gates make of them


def random_task(args: argparse.Namespace) -> tuple[Callable[[], Any], Texts, Texts]:
    """A model of random weights, texts to fit gates on, and texts to read, of either half of the vocabulary."""
    shape = benchmark.SHAPES[args.shape]
    config: Any = shape.make(shape.layers, shape.experts)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    half = config.vocab_size // 2

    def new_model() -> Any:
        return benchmark.new_model(config, torch.device(args.device), dtype).eval()

    words, texts = torch.randint(half, (16, 128)), torch.randint(half, (args.batch, args.length))
    return new_model, {"open": words, "closed": words + half}, {"open": texts, "closed": texts + half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.1, 0.5], help="shares of the nodes grown")
    parser.add_argument("--deepened", type=float, nargs="*", default=[], help="shares of the nodes deepened")
    parser.add_argument("--shape", choices=benchmark.SHAPES, help="of random weights, instead of a model")
    parser.add_argument("--packed", nargs="*", default=[], help="ungrown, with experts packed: int8, nf4, 3bit or 2bit")
    parser.add_argument("--turns", type=int, default=9, help="of base and grown model (default: %(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded a turn (default: %(default)s)")
    args = parser.parse_args()
    if args.shape:
        new_model, words, texts = random_task(args)
    else:
        task = corpora.load_task(args)
        new_model, each = partial(corpora.new_model, task), 64 // len(task.retain)
        words = {
            "open": task.domain_train[:64],
            "closed": torch.cat([train[:each] for train, _ in task.retain.values()]),
        }
        texts = {"open": task.domain_eval[: args.batch], "closed": next(iter(task.retain.values()))[1][: args.batch]}
    base = new_model()
    emap = measure_errors(
        base, words["open"].split(args.batch), retain=words["closed"].split(args.batch), gradients=False
    )
    corpora.emit({"machine": corpora.machine()}, args.json)
    for grow, share in [("spawn", share) for share in args.shares] + [("deepen", share) for share in args.deepened]:
        grown = new_model()
        if share:
            nodes = benchmark.random_nodes(grown, share)
            grown = get_peft_model(grown, PCGrowConfig(error_map=emap, locus=nodes, grow=grow, gate_fpr=0.01))
        grown.eval()
        for text, windows in texts.items() if share and grow == "spawn" else [("open", texts["open"])]:
            gates = text if share and grow == "spawn" else "none"
            compared(base, grown, windows, args, {"nodes grown": share, "by": grow, "gates": gates})
        del grown
    for to in args.packed:
        packed: Any = new_model()
        compress.quantize_experts(packed, to)
        compared(base, packed.eval(), texts["open"], args, {"packed": to})


if __name__ == "__main__":
    main()
