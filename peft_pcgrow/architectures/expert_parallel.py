"""Experts that transformers' expert parallelism has shared out over processes: which are here, and what joins them.

Each process holds some whole experts of every stack, in order (DTensors split along their first axis), and sees the
same tokens as the others. Here rows of experts of other processes are those of no expert, at weight 0; outputs are
added up. What has grown of an expert is where that one is. A bank has as many places in every process as the one with
the most grown experts needs; what is left over stays zero. Shapes: T tokens, K experts per token, E experts, G grown
ones, P places a process, N processes, H hidden.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peft_pcgrow.architectures.host import DTENSOR, EXPERTS_MARK, loaded
from peft_pcgrow.architectures.sharded import local, whole
from peft_pcgrow.architectures.slices import Pieces


@dataclass(frozen=True)
class Share:
    """The experts of a module that are in this process.

    Attributes:
        total: experts of the module, E. here: how many of them are in each process, E / N. first: number of the first
            one here. mesh: the processes.
    """

    total: int
    here: int
    first: int
    mesh: Any

    @classmethod
    def of(cls, base: Any) -> "Share | None":
        """None: all experts of a module are in this process, or it is a `part`."""
        held = base._parameters.values() if getattr(base, EXPERTS_MARK, False) else ()
        stack: Any = next((weight for weight in held if isinstance(weight, loaded(DTENSOR))), None)
        if stack is None:
            return None
        here, mesh = len(local(stack.detach())), stack.device_mesh
        return cls(len(stack), here, here * mesh.get_local_rank(), mesh)

    @property
    def group(self) -> Any:
        return self.mesh.get_group()

    def part(self, base: Any) -> Any:
        """The module with the experts that are here alone."""
        own = {n: w.to_local() if isinstance(w, loaded(DTENSOR)) else w for n, w in base._parameters.items()}
        module: Any = object.__new__(type(base))
        vars(module).update(vars(base), _parameters=own, num_experts=self.here)
        vars(module).pop("forward", None)  # which hands rows to other processes
        return module

    def enter(self, hidden: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the experts are called with, `[T, H]`, `[T, K]` and `[T, K]`, as the part here is to be."""
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            hidden, weight = _Copies.apply(self.group, hidden, weight)  # type: ignore[misc]
        index = index - self.first
        elsewhere = (index < 0) | (index >= self.here)
        return hidden, index.masked_fill(elsewhere, self.here), weight.masked_fill(elsewhere, 0)

    def leave(self, output: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        """The outputs of all processes added up, `[T, H]`; hidden, weight: as the part was called with."""
        return _Sum.apply(self.group, output, hidden, weight)  # type: ignore[return-value]

    def places(self, grown: Sequence[int]) -> list[int]:
        """Of each of these experts, its place in a bank of all processes, of N * P."""
        room, taken, found = self.room(grown), Counter(), []
        for expert in grown:
            process = expert // self.here
            found.append(process * room + taken[process])
            taken[process] += 1
        return found

    def room(self, grown: Sequence[int]) -> int:
        """Places that each process needs for what these experts grow, P."""
        return max(Counter(expert // self.here for expert in grown).values(), default=0)

    def own(self, grown: Sequence[int]) -> list[int]:
        """Which of these experts are here, as places among them, in the order of the bank's here."""
        return [place for place, expert in enumerate(grown) if self.first <= expert < self.first + self.here]

    def slots(self, slot: Tensor, grown: Sequence[int]) -> Tensor:
        """Of places in a bank of all G, by expert (see `dispatch.slots`), those in the part of the bank that is here,
        by expert here."""
        found = torch.full((self.here + 1,), -1, dtype=slot.dtype, device="cpu")
        for place, number in enumerate(self.own(grown)):
            if slot[grown[number]] >= 0:
                found[grown[number] - self.first] = place
        return found

    def deal(self, bank: Tensor, grown: Sequence[int]) -> Tensor:
        """A bank `[G, ...]` that every process has a copy of, dealt out, `[N * P, ...]`."""
        own = self.own(grown)
        held = bank.new_zeros(self.room(grown), *bank.shape[1:])
        held[: len(own)] = bank[own]
        return self._spread(held)

    def collect(self, bank: Tensor, grown: Sequence[int]) -> Tensor:
        """A bank that was dealt out, `[G, ...]`; all processes must call."""
        return whole(bank)[self.places(grown)]

    def join(self, part: Tensor) -> Tensor:
        """What each process has of its own experts, `[E / N, ...]`, of all, `[E, ...]`; all processes must call."""
        return whole(self._spread(part))

    def _spread(self, here: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard  # costly, and loaded where there is a mesh

        device = here.device if here.is_meta else self.mesh.device_type
        return DTensor.from_local(here.to(device), self.mesh, [Shard(0)], run_check=False)

    def read(self, stack: Tensor, pieces: Pieces) -> Tensor:
        """Copies of pieces of a stack, `[N, ...]`; all processes must call."""
        held, places = local(stack), pieces.experts - self.first
        elsewhere = (places < 0) | (places >= self.here)
        found = pieces.to(held.device, places.masked_fill(elsewhere, 0)).read(held)
        found[elsewhere.to(found.device)] = 0
        if not found.is_meta:
            dist.all_reduce(found, group=self.group)
        return found


def check_alike(text: Sequence[Tensor], device: torch.device) -> None:
    """Raise ValueError unless all processes come with the same tensors; all must call.

    Args:
        device: where processes can send.
    """
    told = torch.zeros(2, dtype=torch.float64, device=device)
    for number, tensor in enumerate(text, start=1):
        held = tensor.detach().double().flatten()
        place = torch.arange(1, len(held) + 1, dtype=torch.float64, device=held.device)
        told += number * torch.stack([place[-1:].sum(), held @ place]).to(told.device)
    most, least = told.clone(), told.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    if not torch.equal(most, least):
        raise ValueError(
            "processes that share out a model's experts came with other text each: all must be given every batch, as "
            "a DataLoader without a DistributedSampler gives it"
        )


def count_experts(base: Any) -> int:
    """Experts of a module, in whatever process."""
    share = Share.of(base)
    return base.num_experts if share is None else share.total


class _Copies(torch.autograd.Function):
    """What every process has a copy of; the gradients of the parts that used it are added up."""

    @staticmethod
    def forward(ctx, group: Any, *copies: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.group = group
        return tuple(copy.view_as(copy) for copy in copies)

    @staticmethod
    def backward(ctx, *errors: Tensor):
        errors = tuple(error.clone(memory_format=torch.contiguous_format) for error in errors)
        for error in errors:
            dist.all_reduce(error, group=ctx.group)
        return None, *errors


class _Sum(torch.autograd.Function):
    """Outputs added up. What entered gets a gradient of zeros from here, so that all processes come to `_Copies`, those
    whose experts met no row too."""

    @staticmethod
    def forward(ctx, group: Any, output: Tensor, *entered: Tensor) -> Tensor:  # type: ignore[override]
        ctx.entered = [(tensor.shape, tensor.dtype, tensor.device) for tensor in entered]
        output = output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(output, group=group)
        return output

    @staticmethod
    def backward(ctx, error: Tensor):
        return None, error, *(torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.entered)
