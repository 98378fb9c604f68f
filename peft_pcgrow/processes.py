"""Several processes at work on one corpus (torch.distributed): what each found, put together."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peft_pcgrow.batches import Batch, moved
from peft_pcgrow.error_map import COUNTERS, OPTIONAL, SUMS, ErrorMap
from peft_pcgrow.gate import Rows


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """This one's rank."""
    return dist.get_rank() if processes() > 1 else 0


def over_processes(emap: ErrorMap, device: torch.device) -> ErrorMap:
    """The map of what all processes measured, the same on each; all must call.

    Args:
        device: of the model, where the process group may need its tensors.
    """
    if processes() == 1:
        return emap

    def summed(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, copy=True)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    counters = summed(
        torch.tensor([float(getattr(emap, name)) for name in COUNTERS], dtype=torch.float64, device="cpu")
    ).tolist()
    return replace(
        emap,
        **{name: summed(getattr(emap, name)) for name in (*SUMS, "fold_labels")},
        gradient={name: summed(gradient) for name, gradient in emap.gradient.items()},
        newborns=emap.newborns.changed({name: summed(held) for name, held in emap.newborns.tensors().items()}),
        **{name: summed(held) for name in OPTIONAL if (held := getattr(emap, name)) is not None},
        **{name: type(getattr(emap, name))(value) for name, value in zip(COUNTERS, counters, strict=True)},
    )


def everywhere(batches: list[Batch], device: torch.device) -> list[Batch]:
    """The batches of all processes, in the order of their ranks, on this one's device; all must call."""
    if processes() == 1:
        return batches
    here = [_moved(batch, torch.device("cpu")) for batch in batches]
    gathered: list[Any] = [None] * processes()
    dist.all_gather_object(gathered, here)
    return [_moved(batch, device) for share in gathered for batch in share]


def _moved(batch: Batch, device: torch.device) -> Batch:
    start = moved(batch.rows.start, device)
    return Batch(moved(batch.inputs, device), batch.target.to(device), Rows(batch.real.to(device), start))
