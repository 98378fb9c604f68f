"""Checkpoints of transformers' Trainer: which of them all processes have written to the end."""

import os
import re
import shutil
from pathlib import Path

from transformers import TrainerState

from peft_pcgrow.maps.distributed import from_first, process, together

STATE = "trainer_state.json"
# what a checkpoint needs to be gone on from, beside that and random states: of the Trainer, and of DeepSpeed
PARTS = (("optimizer*", "scheduler.pt"), ("global_step*", "latest"))
CUT_SHORT = "cut-short-"


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint in a Trainer's folder that was written to its end, to be gone on from; None: there is none.

    The Trainer's own `resume_from_checkpoint=True` takes the newest, and fails at one that a process was killed in the
    midst of. One without a state that can be read, which the Trainer writes last, is renamed (`CUT_SHORT` before its
    name): what is written into it, and cut short again, could be taken for whole. All others stay as they are. Under
    torch.distributed, which making `TrainingArguments` begins, all processes must call, and get the same.
    """
    with together("looking for a checkpoint"):
        last = _newest(Path(folder)) if process() == 0 else None
    return from_first(last)


def _newest(folder: Path) -> str | None:
    found = []
    for entry in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", entry.name) is None or not entry.is_dir():
            continue
        try:
            step = TrainerState.load_from_json(str(entry / STATE)).global_step
        except (FileNotFoundError, ValueError, TypeError):
            if not entry.is_symlink():
                aside = entry.with_name(CUT_SHORT + entry.name)
                shutil.rmtree(aside, ignore_errors=True)
                entry.rename(aside)
            continue
        if any(all(any(entry.glob(part)) for part in parts) for parts in PARTS) and _all_processes(entry):
            found.append((step, str(entry)))
    return max(found, default=(0, None))[1]


def _all_processes(entry: Path) -> bool:
    """Whether each has left its state of random numbers; those of the last ones are not missed where there are more
    than two, and cost no more than other random numbers."""
    names = {path.stem.removeprefix("rng_state") for path in entry.glob("rng_state*.pth")}
    ranks = sorted(int(name[1:]) for name in names if re.fullmatch(r"_\d+", name))
    # of nodes with disks of their own, a part
    return ranks == [*range(ranks[0], ranks[0] + len(ranks))] and len(ranks) > 1 if ranks else "" in names
