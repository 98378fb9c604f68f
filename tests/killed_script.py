"""Run by test_killed.py: two processes train by transformers' Trainer, are killed, and go on from what was saved.

It forks both anew for each attempt, as a launcher does that has imported everything and grown the model.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from peft_pcgrow import ErrorMapCallback, Muon, PCGrowConfig, RefitGatesCallback, create_pcgrow_optimizer
from peft_pcgrow.training.checkpoints import last_checkpoint
from tiny import build, domain, mixed, retain, spawned, tokens

STEPS, SECONDS = 4, 20
FSDP = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "transformer_layer_cls_to_wrap": "Qwen3MoeDecoderLayer"}


@dataclass(frozen=True)
class Death:
    """Of a process: in the backward of a step, or in the midst of what is written after it."""

    rank: int
    step: int
    writing: bool = False


# each goes on from where the one before was killed; a checkpoint follows each step
DEATHS = [Death(1, 2), Death(0, 3), Death(0, 3, writing=True), Death(1, 4, writing=True)]
CASES = {"ddp spawn": DEATHS, "ddp deepen": DEATHS[:1], "fsdp spawn": DEATHS[::2]}


def grow(how: str) -> PeftModel:
    """With dropout, so that random numbers have to go on too."""
    if how == "deepen":
        config = PCGrowConfig(locus={0: list(range(8)), 1: [1], 2: [1, 3, 6]})
        return get_peft_model(build(num_experts_per_tok=2, attention_dropout=0.1), config)
    torch.manual_seed(0)  # LoRA's first matrices
    return spawned(protect=0.5, lora=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(Trainer):
    """Trains by Muon until `death`."""

    death: Death | None = None

    def create_optimizer(self, model: Any = None) -> Muon:
        self.optimizer = create_pcgrow_optimizer(model or self.model, lr=self.args.learning_rate)
        return self.optimizer

    def dies(self, step: int, writing: bool = False) -> bool:
        return self.death == Death(self.args.process_index, step, writing)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.dies(self.state.global_step + 1):
            attention, calls = next(m.self_attn for m in model.modules() if hasattr(m, "self_attn")), []
            # its second call is that of the backward
            attention.register_forward_pre_hook(lambda *_: kill() if calls else calls.append(1))
        return super().training_step(model, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.process_index == 0 and self.dies(self.state.global_step, writing=True):
            kill()  # the adapter has been written
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.dies(self.state.global_step, writing=True):
            kill()
        super()._save_rng_state(output_dir)


def train(model: PeftModel, folder: Path, case: str, death: Death | None) -> dict[str, Any]:
    """What one process does, from the newest checkpoint on; what is left at the end."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        logging_steps=1,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_timeout=SECONDS,
        **({"fsdp": True, "fsdp_config": dict(FSDP)} if case.startswith("fsdp") else {}),
    )
    rank, callbacks, text = arguments.process_index, [], tokens
    if case.startswith("fsdp"):
        PartialState().distributed_type = DistributedType.MULTI_GPU  # which alone accelerate shards on
    if case.endswith("spawn"):
        text, parted = mixed, [[texts(2, 12, 3 + rank)] for texts in (domain, retain)]
        callbacks.append(RefitGatesCallback(*parted, steps=[2]))
    if folder.name == "whole":  # training goes on as without
        callbacks.append(ErrorMapCallback([tokens(1, 8, rank)], every=2, at_start=False, max_share=1.0))
    data = [{"input_ids": row, "labels": row} for seed in range(2) for row in text(seed=seed)]
    trainer = Mortal(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.death = death
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    held = {name: b for name, b in model.named_buffers() if "pcgrow" in name}
    held |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in held.items()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    maps = [(step, emap.mass) for each in callbacks for step, emap in getattr(each, "maps", ())]
    return {"held": {name: t.detach() for name, t in whole.items()}, "losses": losses, "maps": maps}


def process(rank: int, port: int, folder: Path, model: PeftModel, *told: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    file = os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout.reconfigure(line_buffering=True)
    torch.save(train(model, folder, *told), folder / f"end{rank}.pt")


def attempt(*told: Any) -> dict[str, Any]:
    """How both processes ended, and after how many seconds; what they said and left.

    Args:
        told: folder, model, and what `train` takes beside these.
    """
    folder: Path = told[0]
    folder.mkdir(exist_ok=True)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, began = multiprocessing.get_context("fork"), time.monotonic()
    both = [fork.Process(target=process, args=(rank, port, *told)) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(2 * SECONDS)
    found = {"ended": [each.exitcode for each in both], "seconds": time.monotonic() - began}
    for each in both:
        each.kill()
    ends = [folder / f"end{rank}.pt" for rank in range(2)]
    return found | {
        "said": [(folder / f"said{rank}").read_text(errors="replace") for rank in range(2)],
        "left": sorted(path.name for path in folder.glob("checkpoint-*")),
        "at the end": [torch.load(end) for end in ends] if all(end.exists() for end in ends) else None,
    }


def main(folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", OMP_NUM_THREADS="1")
    gc.freeze()  # what was imported is not looked through again
    models = {how: grow(how) for how in ("deepen", "spawn")}
    found = {}
    for case, deaths in CASES.items():
        model, place = models[case.split()[1]], folder / case.replace(" ", "-")
        alike = [attempt(place, model, case, death) for death in (*deaths, None)]
        found[case] = {"whole": attempt(folder / "whole", model, case, None), "killed": alike}
        (folder / "whole").rename(place / "whole")
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
