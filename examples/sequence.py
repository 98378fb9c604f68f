"""Learn one domain after another: newborns on top of newborns against one LoRA that is trained on.

After each stage all texts are evaluated. Backward transfer is the mean, over all domains but the last, of its held-out
loss right after its own stage minus that at the end (negative: forgotten), in nats per token.

    python examples/sequence.py --model PATH --domain DIR/A --then DIR/B --retain DIR/NAME --json > rows.jsonl
    python examples/sequence.py --table rows.jsonl
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn

import compare
import converge
import corpora
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, measure_errors

Domain = tuple[str, torch.Tensor, torch.Tensor]  # name, windows to train on, windows held out


def load_domains(task: corpora.Task, args: argparse.Namespace) -> list[Domain]:
    named = {"reference": corpora.language_reference, "source": corpora.stdlib_source}
    domains: list[Domain] = [(Path(args.domain or "reference").name, task.domain_train, task.domain_eval)]
    for spec in args.then:
        texts = {s: named[spec](s) if spec in named else corpora.load_corpus(spec, s) for s in ("train", "eval")}
        train, held_out = (corpora.windows(task.tokenizer, texts[s], args.length) for s in ("train", "eval"))
        domains.append((Path(spec).name, train, corpora.spread(held_out, args.eval_windows)))
    return domains


def train(
    model: Any, optimizer: torch.optim.Optimizer, windows: torch.Tensor, args, seed: int, gates: Any = None
) -> None:
    """Steps at rates that fall to zero; `gates` are the batches of domain and retain text to fit gates on anew."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 5, 1 - step / args.steps))
    model.train()
    for step, batch in enumerate(corpora.batches(windows, args.batch, args.steps, seed), start=1):
        compare.step(model, optimizer, batch, converge.autocast(args))
        schedule.step()
        if gates is not None and step == args.refit:
            with converge.autocast(args):
                model.refit_gates(*gates)


def evaluate(model: nn.Module, task: corpora.Task, domains: list[Domain], args) -> dict[str, float]:
    texts = {name: held_out for name, _, held_out in domains}
    texts |= {name: held_out for name, held_out in task.held_out.items() if name != "domain"}
    with converge.autocast(args):
        return {name: corpora.evaluate(model, windows) for name, windows in texts.items()}


def lora(task: corpora.Task, domains: list[Domain], args, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    torch.manual_seed(seed)
    model, optimizer = compare.lora(args.rank, args.lora_lr, experts=True)(corpora.new_model(task), seed)
    for _, windows, _ in domains:
        train(model, optimizer, windows, args, seed)
        yield "lora", evaluate(model, task, domains, args)


def spawn(task: corpora.Task, domains: list[Domain], args, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each domain gets an adapter of its own; the earlier ones stay active and frozen."""
    torch.manual_seed(seed)
    model: Any = corpora.new_model(task)
    folder = args.keep / f"seed-{seed}" if args.keep else None
    for stage, (name, _, _) in enumerate(domains):
        names = [other for other, _, _ in domains[: stage + 1]]
        if folder is not None and (folder / name / CONFIG_NAME).exists():
            model = kept(model, folder, names)
        else:
            model = grown(model, task, domains[: stage + 1], args, seed)
            if folder is not None:
                model.save_pretrained(folder, selected_adapters=[name])
        for rate in args.gate_fpr:
            model.set_gate_fpr(rate)
            losses = evaluate(model, task, domains, args)
            yield f"spawn, gate_fpr {rate:g}, oldest first", losses
            # whose gate is asked first: the same newborns in the other order
            model.base_model.set_adapter(names[::-1])
            yield f"spawn, gate_fpr {rate:g}, newest first", evaluate(model, task, domains, args) if stage else losses
            model.base_model.set_adapter(names)
        model.set_gate_fpr(args.train_fpr)


def kept(model: Any, folder: Path, names: list[str]) -> Any:
    """The model with the adapter of the last name, from where an earlier run put it, beside the others."""
    if len(names) == 1:
        model = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0])
    else:
        model.load_adapter(folder / names[-1], adapter_name=names[-1])
    model.base_model.set_adapter(names, inference_mode=True)
    return model


def grown(model: Any, task: corpora.Task, domains: list[Domain], args, seed: int) -> Any:
    """The model with newborns that have learned the last domain, beside those of the domains before."""
    *before, (name, windows, _) = domains
    earlier = [held for _, held, _ in before]
    domain, retain = converge.gate_texts(args, task, windows, args.map_windows, seed, None, earlier)
    # whose newborns take rows from which earlier ones is told by errors
    emap = measure_errors(model, domain, retain=retain, **converge.map_options(args.budget, bool(before)))
    options: dict[str, Any] = {"budget": args.budget, "gate_fpr": args.train_fpr, "protect": args.protect}
    options |= {"settle": args.settle, "select": "error" if args.budget == 1 else None}
    if args.beside:
        rank = args.beside
        options["lora"] = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=compare.ATTENTION)
    config = PCGrowConfig(error_map=emap, grow="spawn", **options)
    if not before:
        model = get_peft_model(model, config, adapter_name=name)
    else:
        model.add_adapter(name, config)
        names = [other for other, _, _ in before]
        model.base_model.set_adapter([*names, name])
        model.set_requires_grad(names, False)
    optimizer = create_pcgrow_optimizer(model, lr=args.lr, lora_lr=args.beside_lr)
    count, length = args.refit_windows, converge.BEGINNING
    again = converge.gate_texts(args, task, windows, count, seed, length, earlier) if args.refit else None
    train(model, optimizer, windows, args, seed, again)
    return model


def transfer(stages: list[dict[str, float]], domains: list[str]) -> float:
    return statistics.mean(stages[i][name] - stages[-1][name] for i, name in enumerate(domains[:-1]))


def table(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if "arm" in row]
    names = rows[0]["domains"]
    others = [name for name in rows[0]["before"] if name not in names]
    print("| arm | seeds | " + " | ".join(f"gain on {name}" for name in names) + " | backward transfer | forgetting |")
    print("|---|---|" + "---|" * (len(names) + 2))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        gains = [statistics.median(r["before"][n] - r["stages"][-1][n] for r in mine) for n in names]
        back = statistics.median(transfer(row["stages"], names) for row in mine)
        lost = statistics.median(
            statistics.mean(row["stages"][-1][name] - row["before"][name] for name in others) for row in mine
        )
        print(
            f"| {arm} | {len(mine)} | " + " | ".join(f"{gain:.3f}" for gain in gains) + f" | {back:.4f} | {lost:.4f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    add = parser.add_argument
    add("--then", action="append", default=[], metavar="DIR/NAME", help="a later domain, or reference or source")
    add("--arms", nargs="+", choices=("lora", "spawn"), default=["lora", "spawn"])
    add("--rank", type=int, default=16, help="of LoRA (default: %(default)s)")
    add("--lora-lr", type=float, default=6e-3)
    add("--budget", type=float, default=0.5, help="share of the experts that each domain grows")
    add("--lr", type=float, default=0.02, help="of Muon on newborns (default: %(default)s)")
    add("--train-fpr", type=float, default=0.1, help="gate_fpr of the training (default: %(default)s)")
    add("--gate-fpr", type=float, nargs="+", default=[0.02], help="gate_fpr of the evaluation (default: %(default)s)")
    add("--protect", type=float, default=0.8)
    add("--settle", default="sweep", help="as in PCGrowConfig (default: %(default)s)")
    add("--beside", type=int, default=0, help="rank of LoRA on the attention beside newborns, behind gates; 0: none")
    add("--beside-lr", type=float, default=3e-3, help="its rate (default: %(default)s)")
    add("--autocast", action="store_true", help="compute in bf16 where torch.autocast does (weights stay in fp32)")
    add("--map-windows", type=int, default=192, help="windows of each side that gates are fitted on")
    add("--refit-windows", type=int, default=768, help="windows of each side whose beginnings they are fitted on anew")
    add("--refit", type=int, default=0, help="step of a stage after which its gates are fitted anew (default: none)")
    add("--keep", type=Path, metavar="DIR", help="save newborns here after each stage; stages found here are loaded")
    add("--table", type=Path, metavar="FILE", help="print rows saved with --json as a table, and stop")
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return
    if not args.then:
        parser.error("name at least one more domain with --then DIR/NAME (or --then reference, --then source)")
    task = corpora.load_task(args)
    domains = load_domains(task, args)
    before = evaluate(corpora.new_model(task), task, domains, args)
    corpora.emit({"machine": corpora.machine(), "before": before}, args.json)
    for seed in args.seeds:
        for arm in args.arms:
            stages: dict[str, list[dict[str, float]]] = {}
            for name, losses in {"lora": lora, "spawn": spawn}[arm](task, domains, args, seed):
                stages.setdefault(name, []).append(losses)
                corpora.note(f"seed {seed}, {name}, stage {len(stages[name])}: {losses}")
            for name, found in stages.items():
                row = {"arm": name, "seed": seed, "domains": [domain[0] for domain in domains]}
                corpora.emit({**row, "before": before, "stages": found}, args.json)


if __name__ == "__main__":
    main()
