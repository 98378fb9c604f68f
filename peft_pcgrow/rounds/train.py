"""Train what a round has grown, in transformers' own Trainer, until held-out text is predicted no better."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import nn
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peft_pcgrow.adapter.given import GATES
from peft_pcgrow.files import write_whole
from peft_pcgrow.maps.corpus import Text
from peft_pcgrow.rounds.decision import RoundDecision
from peft_pcgrow.rounds.texts import collate
from peft_pcgrow.say import say
from peft_pcgrow.training.checkpoints import STATE, last_checkpoint
from peft_pcgrow.training.muon import create_pcgrow_optimizer

# share of the steps over which the rate rises; afterwards it falls to zero
WARMUP = 1 / 30
BEST = "best.safetensors"


class BestOnHeldOut(TrainerCallback):
    """Keeps what trains as it was at the lowest held-out loss, and ends training when that no longer falls.

    All of it follows from the Trainer's log history, so training that was interrupted goes on alike.

    Args:
        model: whose adapters stay active as they are now; a Trainer that resumes activates the first alone.
        file: what is kept. patience: looks without a lower loss after which training ends.
    """

    def __init__(self, model: PeftModel, file: Path, patience: int):
        self.model, self.file, self.patience = model, file, patience
        self.active = list(model.active_adapters)
        self.trains = [name for name, p in model.named_parameters() if p.requires_grad]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if list(self.model.active_adapters) != self.active:
            self.model.base_model.set_adapter(self.active)  # type: ignore[operator]
        chosen = set(self.trains)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in chosen)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        looks = held_out_losses(state)
        if best_of(looks) == len(looks) - 1:
            named = held_by(self.model)
            gates = (name for name in named if any(f".pcgrow_{kind}_" in name for kind in GATES))
            kept = {name: named[name].detach().cpu().contiguous() for name in (*self.trains, *gates)}
            write_whole(self.file, save(kept, {"step": str(state.global_step)}))
        elif exhausted(looks, self.patience):
            control.should_training_stop = True


def held_by(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def best_of(looks: Sequence[tuple[int, float]]) -> int:
    return min(range(len(looks)), key=lambda place: looks[place][1])


def exhausted(looks: Sequence[tuple[int, float]], patience: int) -> bool:
    """Whether the last `patience` looks have found no lower loss than before."""
    return bool(looks) and len(looks) - 1 - best_of(looks) >= patience


def held_out_losses(state: TrainerState) -> list[tuple[int, float]]:
    """Steps, and the held-out loss after each, in the order of looking."""
    return [(int(entry["step"]), float(entry["eval_loss"])) for entry in state.log_history if "eval_loss" in entry]


def train(
    model: PeftModel,
    decision: RoundDecision,
    lr: float,
    texts: tuple[Sequence[Text], Sequence[Text]],
    folder: Path,
    batch_size: int,
    options: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> list[tuple[int, float]]:
    """Train until the held-out loss no longer falls, and leave what trained as it was when that was lowest.

    Args:
        texts: to train on, and held out. folder: for the Trainer's checkpoints, from which training goes on if there
            are any. options: further `TrainingArguments`.

    Returns:
        Steps, and the held-out loss after each.
    """
    # brings packages that are of no use to whoever does not train
    from transformers import Trainer

    settings: dict[str, Any] = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "report_to": "none",
        "logging_steps": decision.every,
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "dataloader_pin_memory": next(model.parameters()).is_cuda,
        "max_grad_norm": 0.0,
        **options,
        "output_dir": str(folder),
        "max_steps": decision.max_steps,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": decision.every,
        "save_steps": decision.every,
        "save_total_limit": 2,
        "prediction_loss_only": True,
    }
    optimizer = create_pcgrow_optimizer(model, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, total=decision.max_steps))
    keeper = BestOnHeldOut(model, folder / BEST, decision.patience)
    train_on, held_out = texts
    # the Trainer prints its log, and standard output is the user's
    with contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=list(train_on),  # type: ignore[arg-type]
            eval_dataset=list(held_out),  # type: ignore[arg-type]
            data_collator=collate,
            optimizers=(optimizer, schedule),
            callbacks=[keeper, *callbacks],
        )
        if not progress:
            trainer.remove_callback(PrinterCallback)
        last, looks = last_checkpoint(folder), []
        if last is not None:
            looks = held_out_losses(TrainerState.load_from_json(str(Path(last) / STATE)))
            say(f"pcgrow: training goes on from {last}")
            # the Trainer activates the first alone while it loads them: the oldest is no newborn of another's newborn
            oldest_first = sorted(keeper.active, key=list(model.peft_config).index)
            model.base_model.set_adapter(oldest_first)  # type: ignore[operator]
        ended = bool(looks) and looks[-1][0] >= decision.max_steps
        if not ended and not exhausted(looks, decision.patience):
            trainer.train(resume_from_checkpoint=last)
            looks = held_out_losses(trainer.state)
    put_back(model, folder / BEST)
    return looks


def share_of_rate(step: int, total: int) -> float:
    """Of the learning rate, at a step from 0: it rises over the first `WARMUP` of them and falls to zero at `total`."""
    warm = max(1, round(total * WARMUP))
    return min((step + 1) / (warm + 1), max(0.0, (total - step) / max(1, total - warm)))


@torch.no_grad()
def put_back(model: nn.Module, file: Path) -> None:
    """Set parameters, and gates, to what a file keeps of them."""
    named = held_by(model)
    for name, value in load_file(file).items():
        named[name].copy_(value.to(named[name].device))


def steps_of(windows: int, batch_size: int, epochs: float, looks: int, most: int | None) -> tuple[int, int]:
    """How many steps there are at most, and how many between two looks at held-out text: `looks` a pass, and one at the
    end."""
    a_pass = max(1, -(-windows // batch_size))
    total = max(1, round(a_pass * epochs))
    total = total if most is None else min(total, most)
    return total, min(max(1, a_pass // looks), total)
