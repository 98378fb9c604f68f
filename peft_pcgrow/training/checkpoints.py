"""Checkpoints of transformers' Trainer: which of them all processes have written to the end."""

import os
import shutil
from pathlib import Path

from transformers import TrainerState

from peft_pcgrow.maps.distributed import from_first, process, together

STATE, CHECKPOINT = "trainer_state.json", "checkpoint-"
# what a checkpoint needs to be gone on from, whatever engine wrote it; its state comes last, from the first process
PARTS = (STATE, "optimizer*", "scheduler.pt", "rng_state*.pth")


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint in a Trainer's folder that was written to its end, to be gone on from; None: there is none.

    The Trainer's own `resume_from_checkpoint=True` takes the newest, and fails at one that a process was killed in the
    midst of. These are deleted: what is written into one of them, and cut short again, could be taken for whole. Under
    torch.distributed, which making `TrainingArguments` begins, all processes must call, and get the same.
    """
    with together("looking for a checkpoint"):
        last = _newest(Path(folder)) if process() == 0 else None
    return from_first(last)


def _newest(folder: Path) -> str | None:
    found = []
    for entry in filter(Path.is_dir, folder.glob(f"{CHECKPOINT}*")):
        try:
            if not all(any(entry.glob(part)) for part in PARTS) or not _all_processes(entry):
                raise FileNotFoundError(entry)
            found.append((TrainerState.load_from_json(str(entry / STATE)).global_step, str(entry)))
        except (FileNotFoundError, ValueError, TypeError):
            shutil.rmtree(entry)
    return max(found, default=(0, None))[1]


def _all_processes(entry: Path) -> bool:
    """Whether each has left its state of random numbers; that of the last alone is not missed where there are more than
    two, and costs no more than other random numbers."""
    ranks = {path.stem.removeprefix("rng_state") for path in entry.glob("rng_state*.pth")}
    return ranks == {""} or (len(ranks) > 1 and ranks == {f"_{rank}" for rank in range(len(ranks))})
