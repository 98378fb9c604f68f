"""One way to fine-tune, until the held-out loss of the domain stops falling, measured on all that counts.

Trains for some passes over the domain's text (warm-up, then a rate that falls to zero), looks after each pass, keeps
the best and measures that: held-out losses of the domain and of the retain texts, accuracy, bits a byte, facts and
instructions that the base got right and are still right (`abilities.py`), texts whose second half changes domain, and
the domain's first tokens, which come before anything can know what text it is. Arms are run one at a time, or many at
once on one card:

    python examples/converge.py --model PATH --domain DIR/german --retain DIR/wiki --arm lora --lr 1e-3 --json >> rows
    python examples/converge.py --model PATH --domain DIR/german --retain DIR/wiki --arm spawn --json >> rows
    python examples/converge.py --table rows

What has trained can be kept (`--save`), and measured by another command, on another machine (`--measure`).
Gain is the domain's held-out loss before minus after, forgetting the mean rise of the retain texts' held-out losses,
in nats per token.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import abilities
import compare
import corpora
import frontier
import switch
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts, measure_errors

ARMS = ("lora", "full", "deepen", "spawn")
# settings that a row is grouped by in the table
SHOWN = ("arm", "setting", "gate_fpr")
# tokens of a window that gates are fitted anew on: what tells texts apart early needs many texts, not long ones
BEGINNING = 128
# beside a kept adapter: what is known of its training
ROW = "converge.json"


def setting_of(args: argparse.Namespace) -> str:
    """What sets this run apart from others of its arm."""
    named = {"lr": args.lr}
    if args.arm == "lora":
        named = {"r": args.rank, **named}
    elif args.arm != "full":
        named = {"budget": args.budget, args.optimizer: args.lr, "protect": args.protect}
        named |= {"by": args.select} if args.select else {}
        named |= {"lora": args.rank, "lora lr": args.lora_lr} if args.rank else {}
        named |= {"layers": f"{args.layers[0]}-{args.layers[1]}"} if args.layers else {}
        named |= {"settle": args.settle} if args.settle != "sweep" else {}
        named |= {"errors of": args.carry_tokens} if args.carry_tokens < 1 else {}
        named |= {"depth": args.settle_depth} if args.settle_depth else {}
        named |= {"refit": args.refit} if args.refit else {}
    if args.replay:
        named["replay"] = args.replay
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in named.items()
    )


def build(args: argparse.Namespace, task: corpora.Task) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = corpora.new_model(task)
    if args.arm == "full":
        return compare.full(args.lr)(model, args.seed)
    if args.arm == "lora":
        return compare.lora(args.rank, args.lr, experts=True)(model, args.seed)
    emap = measured(args, task)
    config = PCGrowConfig(
        error_map=emap,
        grow=args.arm,
        budget=args.budget,
        select=args.select or ("error" if args.budget == 1 else None),
        gate_fpr=args.train_fpr,
        protect=args.protect,
        settle=args.settle,
        settle_depth=args.settle_depth,
        seed=args.seed,
        layers_to_transform=[*range(args.layers[0], args.layers[1] + 1)] if args.layers else None,
        lora=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=compare.ATTENTION) if args.rank else None,
    )
    model = get_peft_model(model, config)
    if args.optimizer == "muon":
        return model, create_pcgrow_optimizer(model, lr=args.lr, lora_lr=args.lora_lr)
    lora = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    groups = [{"params": others, "lr": args.lr}, {"params": lora, "lr": args.lora_lr}]
    return model, torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def measured(args: argparse.Namespace, task: corpora.Task) -> Any:
    """A map of the domain, with gates if they are needed."""
    domain, retain = gate_texts(args, task, task.domain_train, args.map_windows, args.seed)
    texts = retain if args.arm == "spawn" or args.protect else None
    return measure_errors(
        corpora.new_model(task), domain, retain=texts, progress=False, **map_options(args.budget, bool(args.layers))
    )


def map_options(budget: float, exact: bool) -> dict[str, Any]:
    """For `measure_errors`: who grows everything asks a map for its gates alone, unless its errors have to be exact."""
    return {"settle": "direct", "gradients": False} if budget == 1 and not exact else {}


def gate_texts(
    args: argparse.Namespace,
    task: corpora.Task,
    domain: Tensor,
    count: int,
    seed: int,
    length: int | None = None,
    earlier: Sequence[Tensor] = (),
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Batches of `count` windows of a domain, and of all retain texts together besides half as many of each earlier
    domain, in an order drawn by the seed; of each its first `length` tokens."""
    each = max(1, count // len(task.retain))
    others = [corpora.spread(train, each) for train, _ in task.retain.values()]
    others += [corpora.spread(text, max(1, count // 2)) for text in earlier]
    mixed, domain = torch.cat(others), corpora.spread(domain, count)
    drawn = [torch.randperm(len(text), generator=torch.Generator().manual_seed(seed)) for text in (domain, mixed)]
    return domain[drawn[0], :length].split(args.batch), mixed[drawn[1], :length].split(args.batch)


def descend(
    args: argparse.Namespace, task: corpora.Task, model: nn.Module, optimizer: Any
) -> Iterator[tuple[int, float]]:
    """Train; after each pass its number and the median seconds of a step."""
    passes = len(task.domain_train) // args.batch
    total = passes * args.epochs
    warm = max(1, total // 30)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))
    )
    replays = compare.mixed_replay(task, args.replay, total, args.seed)
    steps = corpora.batches(task.domain_train, args.batch, total, args.seed)
    seconds = []
    model.train()
    for step, ids in enumerate(steps, start=1):
        ids = torch.cat([ids, next(replays)]) if args.replay else ids
        seconds.append(compare.step(model, optimizer, ids, autocast(args)))
        schedule.step()
        if step == args.refit and args.arm == "spawn":
            with autocast(args):
                texts = gate_texts(args, task, task.domain_train, args.refit_windows, args.seed, BEGINNING)
                model.refit_gates(*texts)  # type: ignore[operator]
        if step % passes == 0:
            yield step // passes, statistics.median(seconds)
            model.train()


class OfSome(torch.autograd.Function):
    """At a decoder layer's output y: errors go back through the layer for tokens that have the largest, and past it,
    along the residual stream x, for all others. What carrying errors for some tokens only would give, at full cost."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, share: float) -> Tensor:  # type: ignore[override]
        ctx.share = share
        return y.view_as(y)

    @staticmethod
    def backward(ctx, delta: Tensor):  # type: ignore[override]
        norms = delta.float().norm(dim=-1)
        limit = norms.flatten().kthvalue(max(1, int((1 - ctx.share) * norms.numel()))).values
        some = (norms > limit).unsqueeze(-1)
        return torch.where(some, delta, 0), torch.where(some, 0, delta), None


def carry_some(model: nn.Module, share: float) -> None:
    """Let every decoder layer hand errors down for a share of the tokens only; for settle="backprop"."""
    for layer in find_experts(model).layers:

        def handed(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return OfSome.apply(output, args[0], share) if output.requires_grad else output

        layer.register_forward_hook(handed)


def autocast(args: argparse.Namespace) -> Any:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16) if args.autocast else nullcontext()


def turned(task: corpora.Task) -> dict[str, Tensor]:
    """Windows of two halves: the domain's after a retain text's, and the other way, `[N, length]`."""
    retain = torch.cat([held for _, held in task.retain.values()])
    count = min(len(task.domain_eval), len(retain))
    ours, theirs = corpora.spread(task.domain_eval, count), corpora.spread(retain, count)
    half = ours.shape[1] // 2
    return {
        "to domain": torch.cat([theirs[:, :half], ours[:, half:]], dim=1),
        "to retain": torch.cat([ours[:, :half], theirs[:, half:]], dim=1),
    }


def halves(losses: dict[str, Tensor]) -> dict[str, float]:
    """Mean loss of the second halves of turned texts, and of the first tokens of the domain's."""
    found = {name: float(loss[:, loss.shape[1] // 2 + 1 :].mean()) for name, loss in losses.items() if name != "domain"}
    return {**found, "first tokens": float(losses["domain"][:, : switch.SEEN - 1].mean())}


def look(args: argparse.Namespace, task: corpora.Task, model: nn.Module) -> dict[str, Any]:
    """All measures of a model as it is."""
    with autocast(args), torch.no_grad():
        model.eval()
        row: dict[str, Any] = {"after": compare.losses(model, task)}
        texts = {"domain": task.domain_eval, **turned(task)}
        row["halves"] = halves({name: switch.token_losses(model, windows) for name, windows in texts.items()})
        if args.abilities:
            row["measures"] = {
                name: abilities.measures(model, windows, task.tokenizer) for name, windows in task.held_out.items()
            }
            row["cloze"] = abilities.cloze(model, task.tokenizer, abilities.read_facts(), batch=128)
            row["instructions"] = abilities.instructions(model, task.tokenizer, batch=128)
    return row


def finish(row: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A row with what is compared with the base."""
    row = compare.finish(row, before["after"])
    ours, theirs = row.get("halves"), before["halves"]
    if ours:
        row["halves"] = {name: theirs[name] - ours[name] for name in ours}  # gains
    for name in ("cloze", "instructions"):
        if name in row:
            row[f"{name} kept"] = abilities.kept(before[name], row.pop(name))
    return row


def kept(folder: Path, task: corpora.Task) -> tuple[nn.Module, dict[str, Any]]:
    """What `trained` gave, from where `--save` put it."""
    return PeftModel.from_pretrained(corpora.new_model(task), folder), json.loads((folder / ROW).read_text())


def trained(args: argparse.Namespace, task: corpora.Task) -> tuple[nn.Module, dict[str, Any]]:
    """The model after its best pass, and what is known of that."""
    torch.manual_seed(args.seed)
    model, optimizer = build(args, task)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    row = {"arm": args.arm, "setting": setting_of(args), "seed": args.seed}
    row["trained_parameters"] = sum(p.numel() for p in trains.values())
    if args.carry_tokens < 1:
        carry_some(model, args.carry_tokens)
    best, copies = float("inf"), {}
    for passed, seconds in descend(args, task, model, optimizer):
        with autocast(args):
            loss = corpora.evaluate(model, task.domain_eval)
        corpora.note(f"{row['setting']} seed {args.seed} pass {passed}: domain {loss:.4f}, {seconds:.3f} s a step")
        if loss < best:
            best = loss
            row |= {"passes": passed, "seconds_per_step": seconds}
            copies = {name: p.detach().to("cpu", copy=True) for name, p in trains.items()}
    with torch.no_grad():
        for name, p in trains.items():
            p.copy_(copies[name])
    return model, row


def run(args: argparse.Namespace, task: corpora.Task) -> None:
    base = corpora.new_model(task)
    before = look(args, task, base)
    with torch.no_grad(), autocast(args):
        windows = frontier.bit_windows(task, args.bit_windows)
        reference = [base(input_ids=ids.to(task.device)).logits for ids in windows]
    shown = {key: sum(value) if key in ("cloze", "instructions") else value for key, value in before.items()}
    corpora.emit({"arm": "base", **shown, "machine": corpora.machine()}, args.json)
    del base
    model, row = trained(args, task) if args.measure is None else kept(args.measure, task)
    if args.save is not None:
        model.save_pretrained(args.save)
        (args.save / ROW).write_text(json.dumps(row))
    for rate in args.rates if row["arm"] == "spawn" else (None,):
        extra: dict[str, Any] = {}
        if rate is not None:
            model.set_gate_fpr(rate)
            with autocast(args):
                extra = {"gate_fpr": rate, "identical": frontier.identical(model, task, reference, args.bit_windows)}
        corpora.emit(finish({**row, **extra, **look(args, task, model)}, before), args.json)
    if row["arm"] == "lora":
        with autocast(args):
            switched = switch.losses(model, task, args.map_windows)
        corpora.emit(compare.finish({**row, "arm": "lora-switch", **switched}, before["after"]), args.json)
    if args.samples:
        with autocast(args):
            prompts = [task.tokenizer.decode(ids[:24]) for ids in corpora.spread(task.domain_eval, args.samples)]
            for prompt, text in zip(prompts, abilities.samples(model, task.tokenizer, prompts), strict=True):
                corpora.note(f"--- {row['setting']}\n{prompt} |>{text}")


def table(path: Path) -> None:
    """Print rows as Markdown: medians over seeds of each setting."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "gain" in row:
            groups.setdefault(tuple(row.get(key) for key in SHOWN), []).append(row)
    columns = (
        "gain",
        "forgetting",
        "forgetting, unseen",
        "identical",
        "cloze kept",
        "instructions kept",
        "seconds_per_step",
    )
    halved = ("first tokens", "to domain", "to retain")
    print("| arm | setting | gate_fpr | seeds | passes | " + " | ".join((*columns, *halved)) + " | parameters |")
    print("|---" * (6 + len(columns) + len(halved)) + "|")
    for (arm, setting, rate), group in groups.items():
        shown = [statistics.median(row[key] for row in group) if key in group[0] else None for key in columns]
        shown += [
            statistics.median(r["halves"][key] for r in group) if "halves" in group[0] else None for key in halved
        ]
        numbers = " | ".join("" if value is None else f"{value:.3f}" for value in shown)
        passes = statistics.median(row["passes"] for row in group)
        parameters = f"{group[0]['trained_parameters']:,}"
        print(f"| {arm} | {setting} | {rate or ''} | {len(group)} | {passes:g} | {numbers} | {parameters} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    add = parser.add_argument
    add("--arm", choices=ARMS, default="spawn")
    add("--seed", type=int, default=0, help="of the order of the text and of what is drawn (default: %(default)s)")
    add("--epochs", type=int, default=3, help="passes over the domain's text (default: %(default)s)")
    add("--train-windows", type=int, help="of the domain's text (default: all)")
    add("--lr", type=float, default=0.004, help="peak rate of what trains; of Muon on experts (default: %(default)s)")
    add("--rank", type=int, default=16, help="of LoRA; 0: none beside grown experts (default: %(default)s)")
    add("--lora-lr", type=float, default=1e-3, help="of LoRA beside grown experts (default: %(default)s)")
    add("--replay", type=int, default=0, help="retain windows added to each step (default: %(default)s)")
    add("--budget", type=float, default=0.5, help="share of the experts grown (default: %(default)s)")
    add("--select", help="as in PCGrowConfig (default: %(default)s)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of grown experts (default: %(default)s)")
    add("--protect", type=float, default=0.0, help="as in PCGrowConfig (default: %(default)s)")
    add("--settle", default="sweep", help="as in PCGrowConfig (default: %(default)s)")
    add("--settle-depth", type=int, default=0, help="as in PCGrowConfig (default: %(default)s)")
    add("--carry-tokens", type=float, default=1.0, help="share of tokens that errors go through layers for")
    add("--layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="decoder layers that may grow (default: all)")
    add("--train-fpr", type=float, default=0.1, help="gate_fpr of the training (default: %(default)s)")
    add("--rates", type=float, nargs="+", default=[0.1, 0.02, 0.005], help="gate_fpr in evaluation")
    add("--refit", type=int, default=0, help="step after which newborns' gates are fitted anew (default: none)")
    add("--refit-windows", type=int, default=768, help="windows of each side whose beginnings they are fitted on")
    add("--map-windows", type=int, default=192, help="windows of each side for map and gates (default: %(default)s)")
    add("--bit-windows", type=int, default=16, help="windows of each retain text compared bit by bit")
    add("--abilities", action="store_true", help="measure facts, instructions, accuracy and bits a byte too")
    add("--samples", type=int, default=0, help="texts to write, to read (default: %(default)s)")
    add("--autocast", action="store_true", help="compute in bf16 where torch.autocast does (weights stay in fp32)")
    add("--save", type=Path, metavar="DIR", help="keep the adapter that has trained, before it is measured")
    add("--measure", type=Path, metavar="DIR", help="measure what --save kept instead of training; --arm is its own")
    add("--table", type=Path, metavar="FILE", help="print rows saved with --json as a table, and stop")
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return
    if args.save is not None and args.arm == "full":
        parser.error("--save keeps adapters, and --arm full trains none")
    task = corpora.load_task(args)
    if args.train_windows:
        task.domain_train = corpora.spread(task.domain_train, args.train_windows)
    run(args, task)


if __name__ == "__main__":
    main()
