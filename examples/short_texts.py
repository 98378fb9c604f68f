"""Do short texts pass a gate? The share of tokens that pass at each stage of a text, mean over layers.

Gates are fitted as for newborns, which need no training to be asked. Beside them, the same gates with one threshold for
all tokens of long windows at the same rate, taken from the retain texts' held-out windows. Rows: held-out windows of
all texts, the facts of `facts.tsv`, sentences of a dozen tokens, and chat prompts of some thirty.

    python examples/short_texts.py --model PATH --domain DIR/NAME --retain DIR/NAME --facts 150
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import abilities
import corpora
from peft_pcgrow import find_experts, measure_errors
from peft_pcgrow.architectures.find import adopt
from peft_pcgrow.gates.gate import Rows, at_rate
from peft_pcgrow.gates.separation import Separation
from peft_pcgrow.maps.sample import sample_text

Evidence = list[Tensor]  # of each layer, `[N, S]`


@torch.no_grad()
def evidence(model: nn.Module, separation: Separation, texts: Sequence[Tensor]) -> tuple[Evidence, Tensor]:
    """What every gate says of each token, and which are no padding, `[N, S]`."""
    inputs = abilities.padded([text.tolist() for text in texts], left=False, device=torch.device("cpu"))
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    tree = adopt(find_experts(model))
    found: list[list[Tensor]] = [[] for _ in tree.sites]
    rows: Rows

    def entered(row: int, x: Tensor) -> None:
        gate = separation.gate(row)[0]
        found[row].append(gate.evidence(gate.scores(x.view(*rows.real.shape, -1)), rows)[0])

    handles = [
        site.module.register_forward_pre_hook(lambda _, args, row=row: entered(row, args[0]))
        for row, site in enumerate(tree.sites)
    ]
    for some, mask in zip(ids.split(16), real.split(16), strict=True):
        rows = Rows(mask)
        model(input_ids=some, attention_mask=mask.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in found], real


def passing(heard: Evidence, limits: Sequence[Tensor], mask: Tensor) -> float:
    return sum(float((e > limit)[mask].float().mean()) for e, limit in zip(heard, limits, strict=True)) / len(heard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    add = parser.add_argument
    add("--map-windows", type=int, default=192, help="windows of each side (default: %(default)s)")
    add("--rates", type=float, nargs="+", default=[0.1, 0.02])
    add("--facts", type=int, default=0, help="sentences of facts.tsv beside the texts (default: %(default)s)")
    add("--instructions", action="store_true", help="the chat prompts of abilities.py beside the texts")
    add(
        "--itself",
        type=int,
        default=0,
        metavar="TEXTS",
        help="fit on texts that the model writes, not on the retain texts",
    )
    args = parser.parse_args()
    task = corpora.load_task(args)
    model = corpora.new_model(task)
    if args.itself:
        retain = torch.cat(sample_text(model, args.itself, args.length))
    else:
        each = args.map_windows // len(task.retain)
        retain = torch.cat([next(corpora.batches(train, each, 1, 0)) for train, _ in task.retain.values()])
        retain = retain[torch.randperm(len(retain), generator=torch.Generator().manual_seed(0))]
    domain = next(corpora.batches(task.domain_train, args.map_windows, 1, 0))
    emap = measure_errors(
        model, domain.split(args.batch), retain=retain.split(args.batch), settle="direct", gradients=False
    )
    separation = emap.separation
    assert separation is not None
    texts: dict[str, Sequence[Tensor]] = {**task.held_out}
    if args.facts:
        facts = abilities.read_facts()
        chosen = facts[:: max(1, len(facts) // args.facts)]
        texts["facts"] = [torch.tensor(task.tokenizer(" ".join(fact))["input_ids"]) for fact in chosen]
    if args.instructions:
        texts["instructions"] = [torch.tensor(ids) for ids in abilities.chat_prompts(task.tokenizer)]
    heard = {name: evidence(model, separation, windows) for name, windows in texts.items()}
    layers = range(len(separation.threshold))
    for rate in args.rates:
        kept = [torch.cat([heard[name][0][row].flatten() for name in task.retain]) for row in layers]
        limits = {
            "at every stage": [at_rate(separation.threshold[row], rate) for row in layers],
            "of all tokens alone": [torch.quantile(values, 1 - rate) for values in kept],
        }
        for how, limit in limits.items():
            for name, (said, real) in heard.items():
                place = real.cumsum(1)
                row = {"rate": rate, "holds": how, "text": name, "all": passing(said, limit, real)}
                for first in (2**i for i in range(int(place.max()).bit_length())):
                    stage = real & (place >= first) & (place < 2 * first)
                    row[f"from {first}"] = passing(said, limit, stage)
                corpora.emit({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, args.json)


if __name__ == "__main__":
    main()
