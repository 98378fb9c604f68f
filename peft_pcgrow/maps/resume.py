"""What an unfinished measurement may go on by: the weights in use, the way of measuring, and the text read so far."""

import hashlib
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.engines import is_shared_out
from peft_pcgrow.architectures.sharded import local, whole
from peft_pcgrow.maps import map_file
from peft_pcgrow.maps.distributed import gathered
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.settling.conditions import adapters_in_use

# numbers summed at a time: their products take 8 bytes each
CHUNK = 2**22
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
STALE = "{0} holds a measurement {1}: remove it, or give another folder as checkpoint="


def weights_in_use(model: nn.Module) -> str:
    """Digest of all parameters and buffers, of modules' numbers (experts per token, say), and of which adapters are in
    use; reads every weight once.

    Of weights that are offloaded only the names and shapes are known; sharded ones are gathered, one at a time, and all
    processes must call. Layers of adapters that were deleted, which PEFT leaves around modules, are passed over.
    """
    digest = hashlib.sha256()
    wrappers, gone = _left_behind(model)
    held = [*model.named_parameters(), *model.named_buffers()]
    # a device is asked once it has summed everything, not for each piece
    read = local if is_shared_out(model) else whole
    sums = [None if tensor.is_meta else torch.stack([*_sums(read(tensor.detach()))]) for _, tensor in held]
    for (name, tensor), pieces in zip(held, sums, strict=True):
        name = _without(name, wrappers)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        for piece in () if pieces is None else pieces.tolist():
            digest.update(repr(piece).encode())
    for name, module in model.named_modules():
        if name in gone:
            continue
        name = _without(name, wrappers)
        numbers = {key: value for key, value in vars(module).items() if type(value) in (int, float) and key[0] != "_"}
        digest.update(f"{name} {sorted(numbers.items())}".encode())
        if used := adapters_in_use(module):
            digest.update(f"{name} {used}".encode())
    found = digest.hexdigest()[:32]
    # of other experts in other processes
    return hashlib.sha256("".join(gathered(found)).encode()).hexdigest()[:32] if is_shared_out(model) else found


def _left_behind(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of layers that no adapter is left in, and of these and the empty places in layers of adapters."""
    wrappers, places = set(), set()
    for name, module in model.named_modules():
        if "base_layer" in module._modules and hasattr(module, "adapter_layer_names"):
            held_in = [getattr(module, place, ()) for place in module.adapter_layer_names]  # type: ignore[union-attr]
            if not any(len(held) for held in held_in if isinstance(held, Sized)):
                wrappers.add(name)
            inside = module.named_children()
            places |= {f"{name}.{key}" for key, held in inside if isinstance(held, Sized) and not len(held)}
    return wrappers, wrappers | places


def _without(name: str, wrappers: set[str]) -> str:
    """The name of a module or tensor if these were not around it."""
    parts = name.split(".")
    inside = [place for place, part in enumerate(parts) if part == "base_layer" and ".".join(parts[:place]) in wrappers]
    return ".".join(part for place, part in enumerate(parts) if place not in inside)


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """Sum and weighted sum of the bits, as integers: exact, so the same in any order of summing and on any device."""
    bits = tensor.contiguous().reshape(-1).view(WHOLE[tensor.element_size()])
    for chunk in bits.split(CHUNK):
        wide = chunk.long()
        place = torch.arange(1, len(wide) + 1, device=wide.device)
        yield torch.stack([wide.sum(), (wide * place).sum()])


@dataclass
class Checkpoint:
    """Where a measurement is saved on the way.

    Attributes:
        folder: None: nothing is saved. every: batches between two savings.
        run: what must agree for going on: digest of the weights, and the options.
    """

    folder: Path | None
    every: int
    run: dict[str, Any]

    def load(self) -> ErrorMap | None:
        """The map so far; ValueError if it is of other weights, or was measured in another way."""
        if self.folder is None or not map_file.exists(self.folder):
            return None
        found = ErrorMap.load(self.folder)
        unlike = [name for name, value in self.run.items() if found.run.get(name) != value]
        if "weights" in unlike:
            raise self.stale("of other weights (another model, other adapters in use, or trained since)")
        if unlike:
            ways = ", ".join(f"{name}={found.run.get(name)!r}, now {self.run[name]!r}" for name in unlike)
            raise self.stale(f"in another way ({ways})")
        return found

    def save(self, emap: ErrorMap) -> None:
        if self.folder is not None:
            emap.save(self.folder)

    def stale(self, what: str) -> ValueError:
        return ValueError(STALE.format(self.folder, what))
