"""Several processes at work on one corpus (torch.distributed): what each found, put together."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_pcgrow.architectures.engines import is_shared_out
from peft_pcgrow.architectures.gathered import device_of
from peft_pcgrow.gates.gate import Rows
from peft_pcgrow.maps.batches import Batch, moved, read_batches
from peft_pcgrow.maps.error_map import COUNTERS, OPTIONAL, SUMS, ErrorMap

UNEQUAL = "give each process as many batches as any other"


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """This one's rank."""
    return dist.get_rank() if processes() > 1 else 0


def gathered(value: Any) -> list[Any]:
    """What every process gives, in the order of their ranks; all must call."""
    found: list[Any] = [value]
    if processes() > 1:
        found *= processes()
        dist.all_gather_object(found, value)
    return found


class FailedElsewhere(RuntimeError):
    """Another process failed and has told all; nobody waits to be told of this."""


def any_ready(what: str, ready: bool) -> bool:
    """Whether a process has another step to take with the others; all must call, until none has.

    Raises:
        FailedElsewhere: one of them has failed in the midst of `together` instead.
    """
    told = gathered(ready)
    for rank, each in enumerate(told):
        if isinstance(each, str):
            raise FailedElsewhere(f"{what} failed on process {rank} of {len(told)}: {each}")
    return any(told)


@contextmanager
def together(what: str) -> Iterator[None]:
    """What processes do side by side: if it fails on one, it is raised on all, and nobody waits for one that is gone.

    All must enter; nothing inside may wait for another process, but by `any_ready` and `check_same`.
    """
    failed: Exception | None = None
    try:
        yield
    except FailedElsewhere:
        raise
    except Exception as error:
        failed = error
    told = gathered(None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    for rank, text in enumerate(told):
        if isinstance(text, str):
            raise RuntimeError(f"{what} failed on process {rank} of {len(told)}: {text}")
        if text is not None:
            raise RuntimeError(f"{what} had more to do on process {rank} of {len(told)}: {UNEQUAL}")


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError on all processes if one of them has other facts; all must call.

    Raises:
        FailedElsewhere: one has left `together` by now: it failed, or it was done.
    """
    told = gathered(dict(facts))
    for rank, each in enumerate(told):
        if each is None or isinstance(each, str):
            raise FailedElsewhere(f"{what} ended on process {rank} of {len(told)}: {each or UNEQUAL}")
    # one that does something else by now has other facts
    every = [each if isinstance(each, dict) else {} for each in told]
    unlike = [name for name in facts if any(each.get(name) != every[0].get(name) for each in every)]
    if unlike:
        name = unlike[0]
        said = ", ".join(f"process {rank}: {str(each.get(name))[:80]}" for rank, each in enumerate(every))
        raise ValueError(f"{what} on {len(every)} processes needs the same on each, and {name} differs ({said})")


def summed(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the processes added up by name, the same on each; one that is absent here counts as zeros.

    Args:
        device: of the model, where the process group may need them. All must call.
    """
    if processes() == 1:
        return dict(tensors)
    known: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for shapes in gathered({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}):
        known |= shapes
    found = {}
    for name, (shape, dtype) in sorted(known.items()):
        here = tensors.get(name)
        moved = torch.zeros(shape, dtype=dtype, device=device) if here is None else here.to(device, copy=True)
        dist.all_reduce(moved)
        found[name] = moved.cpu()
    return found


def over_processes(emap: ErrorMap, device: torch.device, shared_out: bool = False) -> ErrorMap:
    """The map of what all processes measured, the same on each; all must call.

    Args:
        device: of the model, where the process group may need its tensors.
        shared_out: whether all measured the same text, each with the gradients of its own experts.
    """
    if processes() == 1:
        return emap
    if shared_out:
        held = emap.newborns.tensors()
        born = {name: tensor for name, tensor in held.items() if name.startswith("gradient.")}
        return replace(
            emap,
            gradient=summed(emap.gradient, device),
            newborns=emap.newborns.changed(held | summed(born, device)),
            run={name: emap.run[name] for name in ("weights",) if name in emap.run},
            heldout=over_processes(emap.heldout, device, True) if emap.heldout is not None else None,
        )
    counters = torch.tensor([float(getattr(emap, name)) for name in COUNTERS], dtype=torch.float64, device="cpu")
    given = {name: getattr(emap, name) for name in (*SUMS, "fold_labels")} | {"counters": counters}
    given |= {name: held for name in OPTIONAL if (held := getattr(emap, name)) is not None}
    total = summed(given | {f"gradient.{name}": gradient for name, gradient in emap.gradient.items()}, device)
    counted = zip(COUNTERS, total["counters"].tolist(), strict=True)
    return replace(
        emap,
        **{name: total[name] for name in (*SUMS, "fold_labels")},
        **{name: total.get(name) for name in OPTIONAL},
        gradient={n.removeprefix("gradient."): held for n, held in total.items() if n.startswith("gradient.")},
        newborns=emap.newborns.changed(summed(emap.newborns.tensors(), device)),
        **{name: type(getattr(emap, name))(value) for name, value in counted},
        # each process goes on by its own part
        run={name: emap.run[name] for name in ("weights",) if name in emap.run},
        heldout=over_processes(emap.heldout, device) if emap.heldout is not None else None,
    )


@dataclass
class TextDigest:
    """Digest of batches, in their order."""

    hexdigest: str = ""
    batches: int = 0

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> "TextDigest":
        found = cls()
        for batch in batches:
            found.add(batch.inputs, batch.target)
        return found

    def check_alike(self) -> None:
        """Raise ValueError unless it is the same in all processes, which must call."""
        check_same("a model whose experts are shared out", {"the text": self.hexdigest})

    def add(self, inputs: Mapping[str, Any], target: Tensor) -> None:
        digest = hashlib.sha256(self.hexdigest.encode())
        for name, value in sorted({**inputs, "labels": target}.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.hexdigest, self.batches = digest.hexdigest()[:32], self.batches + 1


def turn(model: nn.Module) -> tuple[int, int]:
    """Of the processes that share the text out among them, which this one is, and how many there are: all that see the
    same, as where a model's experts are shared out, are one."""
    return (0, 1) if is_shared_out(model) else (process(), processes())


def everywhere(batches: list[Batch], model: nn.Module) -> list[Batch]:
    """The batches of all processes, in the order of their ranks, on this one's device; all must call.

    Raises:
        ValueError: they are to be the same on all, and are not.
    """
    device = device_of(model)
    if is_shared_out(model):
        TextDigest.of(batches).check_alike()
        return batches
    if processes() == 1:
        return batches
    here = [_moved(batch, torch.device("cpu")) for batch in batches]
    return [_moved(batch, device) for share in gathered(here) for batch in share]


def from_first(value: Any) -> Any:
    """The first process's value, which others may have rounded otherwise, on all; all must call."""
    return gathered(value)[0]


def read_everywhere(model: nn.Module, batches: Iterable[Any], max_tokens: int | None = None) -> list[Batch]:
    """The text of all processes, each giving its share, in the order of their ranks; all must call.

    Args:
        max_tokens: of each process, at most so many (to the end of a batch).

    Raises:
        ValueError: as of `read_batches`. RuntimeError: it failed on another process.
    """
    with together("reading the text"):
        here = list(read_batches(model, batches, max_tokens))
    return everywhere(here, model)


def _moved(batch: Batch, device: torch.device) -> Batch:
    start = moved(batch.rows.start, device)
    return Batch(moved(batch.inputs, device), batch.target.to(device), Rows(batch.real.to(device), start))
