"""Run by test_engines.py in two processes, a part at a time, and imported by it for the same in one process."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_pcgrow import (
    PCGrowConfig,
    compress,
    create_pcgrow_optimizer,
    find_lr,
    measure_errors,
    order_by_surprisal,
)
from tiny import build, domain, grown, logits, mixed, retain, spawned, spawning, tokens

STEPS, ROWS = 20, 4
ZERO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": ROWS // 2,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def banks(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains, by name below any wrapper."""
    held = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {name[name.index("base_model.") :]: p.contiguous() for name, p in held.items()}


def tried(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """What each call raises."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = f"nothing: {str(call())[:80]}"
        except (ValueError, RuntimeError, TypeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def share(batches: list[Tensor], rank: int, world: int) -> Iterable[Tensor]:
    """As uneven as it can be: of several processes the first has all."""
    return batches if rank == 0 or world == 1 else []


def together(rank: int = 0, world: int = 1) -> dict[str, Any]:
    """What is worked out of text that processes share unevenly."""
    ours, theirs = [domain(4, 24, seed=s) for s in range(5)], [retain(4, 24, seed=s) for s in range(5)]
    parted = {"retain": share(theirs, rank, world), "window": 4, "progress": False}
    emap = measure_errors(build(), share(ours, rank, world), **parted)
    plan = compress.plan(build(), target=0.35, retain=share(ours[:3], rank, world), progress=False)
    model: nn.Module = grown()
    rate = find_lr(model, share(ours, rank, world))
    split = find_lr(model, ours if world == 1 else (ours[:4] if rank == 0 else ours[4:]))
    texts = [text for batch in ours for text in batch][:5]
    wrapped = DistributedDataParallel(model) if world > 1 else model
    order = order_by_surprisal(texts, wrapped, batch_size=2, return_surprisal=True, progress=False)[1]
    assert emap.separation is not None
    stepping = grown().train()
    parallel = DistributedDataParallel(stepping) if world > 1 else stepping
    optimizer = create_pcgrow_optimizer(stepping, lr=0.02)
    for step in range(2):
        ids = tokens(ROWS, 8, seed=step)[rank::world]
        parallel(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "muon": torch.cat([p.flatten() for p in banks(stepping).values()]),
        "map": emap.mass,
        "down": emap.gradient["down_proj"],
        "gate": emap.separation.direction,
        "forms": [(node.layer, node.expert, str(node.form)) for node in plan.nodes],
        "rates": torch.tensor([rate, split], dtype=torch.float64),
        "order": order,
    }


def split(folder: Path) -> dict[str, Any]:
    """What is said of a model whose matrices transformers has split, and that it is the same model."""
    from transformers.distributed import DistributedConfig

    def load(name: str) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_size=2))

    model, ids = load("base"), tokens(2, 8)
    said = tried(
        {
            "map": lambda: measure_errors(model, [ids], progress=False),
            "map by direct": lambda: measure_errors(model, [ids], settle="direct", progress=False),
            "deepen": lambda: get_peft_model(model, PCGrowConfig(locus={1: [1]})),
            "dense": lambda: get_peft_model(model, PCGrowConfig(nodes="dense", locus={1: [0]})),
            "spawn": lambda: get_peft_model(model, spawning(protect=0.5)),
            "load": lambda: PeftModel.from_pretrained(model, str(folder / "adapter")),
            "order": lambda: order_by_surprisal(list(ids), model, progress=False),
            "plan": lambda: compress.plan(model, target=0.5, retain=[ids], progress=False),
        }
    )
    merged: Any = load("merged")
    written = merged.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    return {"said": said, "kinds": [type(p).__name__ for p in model.parameters()], "written": written}


def dying(rank: int) -> str:
    """What is raised here when process 1 ends in the midst of its text."""

    def text() -> Iterable[Tensor]:
        yield tokens()
        if rank == 1:
            os._exit(0)
        yield tokens()

    return tried({"map": lambda: measure_errors(build(), text(), progress=False)})["map"]


def stepped(model: nn.Module, engine: Any = None, steps: int = 2, spawn: bool = False) -> dict[str, Any]:
    """Plain SGD steps at a rate of 1: a bank moves by its gradient."""
    rank, world = (dist.get_rank(), 2) if engine is not None else (0, 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before, moved, maps, text = banks(model), [], [], [tokens(2, 8, seed=9)]
    for step in range(steps):
        ids = (mixed(seed=step) if spawn else tokens(ROWS, 8, seed=step))[rank::world]
        loss = (engine or model)(input_ids=ids, labels=ids).loss
        if engine is None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
        after = banks(model)
        moved.append({name: before[name] - after[name] for name in after})
        before = after
        maps.append(measure_errors(model, text, gradients=False, progress=False).mass / world)
    return {"gradients": moved, "maps": maps, "logits": logits(model)}


def engine_of(model: nn.Module, stage: int, optimizer: torch.optim.Optimizer | None = None, **more: Any) -> Any:
    import deepspeed

    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    config = {**ZERO, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, **more}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def trained(folder: Path, world: int, resume: bool = False, **options: Any) -> dict[str, Any]:
    """20 steps of transformers' Trainer; `resume`: the last ten again, from the checkpoint that was written."""
    model = grown()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // world,
        learning_rate=0.1,
        max_grad_norm=0.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in tokens(ROWS, 8, seed=step)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(folder / "trainer" / f"checkpoint-{STEPS // 2}") if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "banks": banks(model), "logits": logits(model)}


def zero2(folder: Path) -> dict[str, Any]:
    """DeepSpeed's ZeRO-2: what comes out, and what is refused."""
    found: dict[str, Any] = {}
    options = {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}, "optim": "sgd"}
    found["trained"] = trained(folder, 2, **options)
    found["resumed"] = trained(folder, 2, resume=True, **options)
    for name, model in (("deepen", grown()), ("spawn", spawned())):
        engine = engine_of(model.train(), 2)
        found[name] = stepped(model.train(), engine, spawn=name == "spawn")
    engine.save_checkpoint(str(folder / "zero"))
    with_loaded = PeftModel.from_pretrained(build(), str(folder / "trainer" / f"checkpoint-{STEPS}"))
    found["loaded"] = logits(with_loaded)
    found["written"] = engine.module.generate(input_ids=tokens(2, 8), max_new_tokens=6, do_sample=False)
    half = spawned().train()
    gates = {n: b.clone() for n, b in half.named_buffers() if "pcgrow_gate" in n}
    engine_of(half, 2, bf16={"enabled": True})
    found["gates"] = all(torch.equal(b, gates[n]) for n, b in half.named_buffers() if n in gates)
    protected, muon = spawned(protect=0.5).train(), grown().train()
    find_lr(protected, [domain(4, 24, seed=1), domain(4, 24, seed=2)])  # it has trained before
    watched = engine_of(protected, 2)
    orthogonal = engine_of(muon, 2, create_pcgrow_optimizer(muon, lr=0.1))
    ids = tokens(ROWS // 2, 8)
    orthogonal.backward(orthogonal(input_ids=ids, labels=ids).loss)
    found["said"] = tried(
        {
            "protect": lambda: watched(input_ids=ids, labels=ids),
            "muon": orthogonal.step,
            "find_lr": lambda: find_lr(muon, [ids, ids]),
        }
    )
    return found


def zero3(folder: Path) -> dict[str, Any]:
    """ZeRO-3, which nothing trains under."""
    model, ids = grown().train(), tokens(ROWS // 2, 8)
    engine = engine_of(model, 3)
    return {
        "said": tried(
            {
                "deepen": lambda: engine(input_ids=ids, labels=ids),
                "spawn": lambda: get_peft_model(model.get_base_model(), spawning()),
                "map": lambda: measure_errors(model, [ids], progress=False),
                "order": lambda: order_by_surprisal(list(ids), model, progress=False),
                "find_lr": lambda: find_lr(model, [ids, ids]),
                "save": lambda: model.save_pretrained(str(folder / "empty")),
            }
        ),
        "logits": logits(model.eval()),
        "written": model.generate(input_ids=tokens(2, 8), max_new_tokens=6, do_sample=False),
    }


PARTS: dict[str, Callable[[Path], Any]] = {
    "together": lambda _: together(dist.get_rank(), 2),
    "tp": lambda folder: split(folder),
    "dying": lambda _: dying(dist.get_rank()),
    "zero2": zero2,
    "zero3": zero3,
}


def main(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    for name in names:
        torch.save(PARTS[name](folder), folder / f"{name}{dist.get_rank()}.pt")
    if "dying" in names:
        os._exit(0)  # there is nobody to say goodbye to


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
