"""Run by test_distributed.py with accelerate, twice, and imported by it for the same steps in one process."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_pcgrow import ErrorMap, ErrorMapCallback, PCGrowConfig, compress, measure_errors, order_by_surprisal
from peft_pcgrow.maps.map_tensors import COUNTERS, to_tensors
from peft_pcgrow.maps.newborns import SUMS
from tiny import build, domain, mixed, retain, spawned, spawning, tokens

LOCUS = {0: list(range(8)), 2: [1, 6]}
STEPS, ROWS, COEFFICIENT = 4, 4, 0.001


def grow() -> PeftModel:
    return get_peft_model(
        build(num_experts_per_tok=1, router_aux_loss_coef=COEFFICIENT), PCGrowConfig(locus=LOCUS)
    ).train()


def banks(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.detach().clone().contiguous()
        for name, p in model.named_parameters()
        if "pcgrow_" in name
    }


def batch(step: int) -> Tensor:
    """The whole batch of a step: few words, so that some experts get rows on one process only."""
    return tokens(ROWS, 5, seed=step)


def newborns() -> PeftModel:
    return spawned(protect=0.5).train()


def loop(accelerator: Accelerator | None, spawn: bool = False) -> dict:
    """Plain SGD steps on this process's share of each batch."""
    model = newborns() if spawn else grow()
    counts = []
    experts = model.base_model.tuner_layers()[0]
    experts.register_forward_pre_hook(lambda _, args: counts.append(torch.bincount(args[1].flatten(), minlength=8)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    rank, world = 0, 1
    if accelerator is not None:
        rank, world = accelerator.process_index, accelerator.num_processes
        model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        ids = (mixed(seed=50 + step) if spawn else batch(step))[rank::world]
        if spawn:
            loss = model(input_ids=ids, labels=ids).loss
        else:
            output = model(input_ids=ids, labels=ids, output_router_logits=True)
            # of the model's own load-balancing loss, halves of a batch do not make up that of the whole
            squares = [logits.logsumexp(dim=-1).square().mean() for logits in output.router_logits]
            loss = output.loss - output.aux_loss * COEFFICIENT + 0.1 * sum(squares)
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return {"banks": banks(model), "rows": counts[0]}


def poisoned(accelerator: Accelerator) -> str:
    """What is raised here when the loss of process 1 alone is NaN."""
    model = grow()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = banks(model)
    ids = batch(0)[accelerator.process_index :: 2]
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss * float("nan") if accelerator.process_index == 1 else loss)
    try:
        optimizer.step()
    except FloatingPointError as error:
        after = banks(model)
        return str(error) if all(torch.equal(before[name], after[name]) for name in before) else "a weight changed"
    return "nothing"


def train(folder: Path, each: int, callbacks: list[TrainerCallback] | None = None) -> dict:
    """The same with transformers' Trainer, `each` rows per process and batch."""
    model = grow()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=each,
        gradient_accumulation_steps=2,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for step in range(2 * STEPS) for row in batch(step)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"banks": banks(model), "losses": losses}


class BySomeClocks(ErrorMapCallback):
    """Process 1 finds measuring too slow, process 0 does not."""

    def _time_share(self) -> float:
        return float(dist.get_rank())


def mapped(folder: Path, rank: int) -> dict:
    """The Trainer's steps, and the steps that this process measured its own text after."""
    callback = BySomeClocks([batch(10 + rank)], every=2, save_to=folder / "maps")
    found = train(folder, ROWS // 2, [callback])
    return found | {"steps": [step for step, _ in callback.maps], "map": callback.maps[0][1].mass}


def mapped_whole(rank: int = 0, world: int = 1) -> ErrorMap:
    """A map, with gates, of this process's share of a text."""
    shares = [texts(16, seed=5).split(2)[rank * 8 // world : (rank + 1) * 8 // world] for texts in (domain, retain)]
    return measure_errors(build(), shares[0], retain=shares[1], window=4, max_tokens=10_000, progress=False)


def tensors(emap: ErrorMap) -> dict[str, Tensor]:
    named = {name: getattr(emap, name) for name in (*SUMS, "fold_labels")}
    named |= {"direction": emap.separation.direction, "down": emap.gradient["down_proj"]}
    return named | {"labels": torch.tensor([emap.labels, emap.tokens, emap.batches])}


def parts(emap: ErrorMap) -> dict[str, Tensor]:
    """All tensors of a map and of its held-out text, and its counters."""
    found, facts = to_tensors(emap)
    counters = [facts[name] for name in COUNTERS] + [facts["heldout"][name] for name in COUNTERS]
    return found | {"counters": torch.tensor(counters)}


def without_text(rank: int = 0, **options) -> ErrorMap:
    """A map of text that only process 0 has; of held-out text, that only process 1 has."""
    shares = [tokens(6, 9).split(2), ()]
    heldout = shares[1 - rank] if dist.is_initialized() else list(shares[0])
    return measure_errors(build(), shares[rank], heldout=heldout, progress=False, **options)


def examples() -> list[Tensor]:
    return [tokens(1, 4 + i % 5, seed=i)[0] for i in range(21)]


def ordered() -> Tensor:
    """Places of the examples in their order, and their surprisals in it."""
    data = [{"input_ids": text, "place": i} for i, text in enumerate(examples())]
    found, surprisal = order_by_surprisal(data, build(), window=10, batch_size=2, return_surprisal=True, progress=False)
    return torch.stack([torch.tensor([float(each["place"]) for each in found]).double(), surprisal])


def refused(rank: int) -> dict[str, str]:
    """What is raised here where the processes do not fit together, or one of them fails."""

    def broken() -> Iterator[Tensor]:
        yield tokens()
        if rank == 1:
            raise OSError("the disk is gone")

    trained = grow().eval()
    with torch.no_grad():
        next(iter(p for p in trained.parameters() if p.requires_grad)).add_(float(rank))
    ids = tokens(8).split(2)
    calls = {
        "other base": lambda: measure_errors(build(seed=rank), ids, progress=False),
        "other weights": lambda: measure_errors(trained, ids, progress=False),
        "other options": lambda: measure_errors(build(), ids, gradients=bool(rank), progress=False),
        "no text": lambda: measure_errors(build(), [], progress=False),
        "broken": lambda: measure_errors(build(), broken(), progress=False),
        "no number": lambda: measure_errors(build(), ids, max_tokens=-rank, progress=False),
        "retain": lambda: measure_errors(build(), ids, retain=broken(), progress=False),
        "order": lambda: order_by_surprisal(examples(), build(seed=rank), progress=False),
        "example": lambda: order_by_surprisal([*examples(), [3]], build(), batch_size=1, progress=False),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError, OSError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def planned(rank: int = 0, world: int = 1) -> dict:
    """What compressing and shrinking by this process's share of a text make of a model and of an adapter."""
    share = [batch(20 + step) for step in range(4)][rank * 4 // world : (rank + 1) * 4 // world]
    model = build()
    plan = compress.plan(model, target=0.35, retain=share, progress=False)
    model, report = compress.apply(model, plan, max_loss_rise=1e-4, progress=False)
    torch.manual_seed(0)
    adapted = get_peft_model(build(), PCGrowConfig(locus=LOCUS, init_weights=False))
    shrunk = compress.shrink_adapter(adapted, target=0.22, batches=share)
    held = {**model.state_dict(), **{name: t for name, t in adapted.state_dict().items() if "pcgrow_" in name}}
    return {
        "forms": [(node.layer, node.expert, str(node.form), node.predicted) for node in plan.nodes],
        "numbers": [*plan.losses, *report.before, *report.after, report.done, shrunk.loss_after],
        "stopped": report.stopped,
        "tensors": {name: t.clone() for name, t in held.items()},
    }


def main(folder: Path) -> None:
    spawning()  # its map is of one process's text, and kept: of both it would be of each text twice
    accelerator = Accelerator(cpu=True)
    found = {
        "loop": loop(accelerator),
        "spawn": loop(accelerator, spawn=True),
        "poisoned": poisoned(accelerator),
        "trainer": train(folder, ROWS // 2),
        "mapped": mapped(folder, accelerator.process_index),
        "planned": planned(accelerator.process_index, 2),
        "whole": tensors(mapped_whole(accelerator.process_index, 2)),
        "without text": parts(without_text(accelerator.process_index)),
        "without text, relaxed": parts(without_text(accelerator.process_index, settle="relax", settle_tol=1e-9)),
        "ordered": ordered(),
        "refused": refused(accelerator.process_index),
    }
    torch.save(found, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
