"""Grow a domain into a small MoE, end to end: measure, locate, deepen in a Trainer, save, reload, merge.

Without options: the embedded model, trained on the Python standard library's sources, grows the prose of the Python
language reference and must keep held-out source code. With --grow spawn, newborns take the domain's tokens and the
source code keeps its experts.
"""

import argparse
import contextlib
import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import Trainer, TrainingArguments

import corpora
from peft_pcgrow import Locus, PCGrowConfig, create_pcgrow_optimizer, measure_errors

MAP_WINDOWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_arguments(parser)
    parser.set_defaults(steps=160)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the experts to grow (default: 0.5)")
    parser.add_argument("--grow", choices=("deepen", "spawn", "auto"), default="deepen", help="how (default: deepen)")
    parser.add_argument("--gate-fpr", type=float, default=0.01, help="share of retain tokens that newborns may take")
    parser.add_argument("--protect", type=float, default=0.0, help="share of the retain inputs' energy to protect")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of Muon on the banks (default: 0.01)")
    parser.add_argument("--out", type=Path, default=Path("pcgrow-quickstart"), help="where map and adapter go")
    args = parser.parse_args()
    started = time.perf_counter()
    task = corpora.load_task(args)
    torch.manual_seed(args.seeds[0])
    model = corpora.new_model(task)
    untouched = {name: p.detach().clone() for name, p in model.named_parameters()}

    retain = None
    if args.grow != "deepen" or args.protect:
        # in turns, so that the texts that gates are fitted on and those they are measured on are alike
        shares = [train[: MAP_WINDOWS // len(task.retain)] for train, _ in task.retain.values()]
        retain = torch.stack([window for turn in zip(*shares, strict=False) for window in turn])
    # the verdict is about text that is not trained on
    texts = {"heldout": task.domain_eval, "retain": retain, "batch_size": args.batch}
    emap = measure_errors(model, task.domain_train[:MAP_WINDOWS], **texts)
    corpora.note(f"\n{emap}\n")
    emap.save(args.out / "map")
    before = losses(model, task)

    config = PCGrowConfig(
        error_map=str(args.out / "map"),
        budget=args.budget,
        grow=args.grow,
        gate_fpr=args.gate_fpr,
        protect=args.protect,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    map_png = args.out / "map.png"
    emap.plot(map_png, locus=Locus(config.locus))
    emap.page(map_png.with_suffix(".html"), locus=Locus(config.locus))
    train(model, task, args)
    after = losses(model, task)
    grown_map = measure_errors(model, task.domain_train[:MAP_WINDOWS], **texts)
    corpora.note(f"\nafter training: {grown_map.diagnosis}\n")
    for suffix in (".png", ".html"):
        grown_map.page(args.out / f"after{suffix}", before=emap, locus=Locus(config.locus))
    model.save_pretrained(args.out / "adapter")

    sample = task.domain_eval[:2]
    with torch.no_grad():
        grown = model.eval()(input_ids=sample).logits
        reloaded = AutoPeftModelForCausalLM.from_pretrained(args.out / "adapter", dtype=torch.float32)
        reload_difference = float((reloaded(input_ids=sample).logits - grown).abs().max())
        merge_difference = None  # newborns cannot be merged
        if not config.spawned:
            merged = copy.deepcopy(model).merge_and_unload()
            merge_difference = float((merged(input_ids=sample).logits - grown).abs().max())
    now = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    trained, total = model.get_nb_trainable_parameters()
    for name, windows in task.held_out.items():
        corpora.note(f"{name}: unigram entropy of the held-out text {corpora.unigram_entropy(windows):.3f} nats/token")
    corpora.note(
        f"\ndomain loss {before['domain']:.3f} -> {after['domain']:.3f}, retain loss {before['retain']:.3f} -> "
        f"{after['retain']:.3f} nats/token; reload differs by {reload_difference:g}, merge by {merge_difference}\n"
        f"map: {map_png} and .html, before and after: {args.out / 'after.html'}   adapter: {args.out / 'adapter'}"
    )
    corpora.emit(
        {
            "domain_loss_before": before["domain"],
            "domain_loss_after": after["domain"],
            "retain_loss_before": before["retain"],
            "retain_loss_after": after["retain"],
            "reload_max_abs_diff": reload_difference,
            "merge_max_abs_diff": merge_difference,
            "base_bit_identical": all(torch.equal(now[name], p) for name, p in untouched.items()),
            "trained_parameters": trained,
            "total_parameters": total,
            "seconds": time.perf_counter() - started,
            "map_png": str(map_png),
        },
        args.json,
    )


def train(model: torch.nn.Module, task: corpora.Task, args: argparse.Namespace) -> None:
    """An ordinary Trainer: nothing in it knows of growing."""
    # the Trainer prints its log: standard output is for the result
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        settings = TrainingArguments(
            output_dir=scratch,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            seed=args.seeds[0],
            save_strategy="no",
            logging_steps=max(1, args.steps // 8),
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(
            model=model,
            args=settings,
            train_dataset=[{"input_ids": window, "labels": window} for window in task.domain_train],
            optimizers=(create_pcgrow_optimizer(model, lr=args.lr), None),
        ).train()


def losses(model: torch.nn.Module, task: corpora.Task) -> dict[str, float]:
    retain = [corpora.evaluate(model, windows) for _, windows in task.retain.values()]
    return {"domain": corpora.evaluate(model, task.domain_eval), "retain": sum(retain) / len(retain)}


if __name__ == "__main__":
    main()
