"""What a run takes, phase by phase: seconds, operations, and joules of the GPU where it tells them.

Operations follow from the shapes of the weights (see `architectures.operations`) and from the tokens that enter the
model, which a hook counts while a phase runs; padding is computed too, so it counts. Of a run that is interrupted,
everything counts that was noted until then, what has to be done again too: a phase notes when it ends, and every
`EVERY` seconds, so what is lost with a process that is killed is that much at most.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pcgrow_kernels.orthogonalize import STEPS
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures.operations import Shapes, orthogonalization
from peft_pcgrow.maps.error_map import ErrorMap

EVERY = 30
# of the LoRA that a run is compared with
RANK = 16
MEASURING, RATE, TRAINING, LOOKING, WRITING = "measuring", "finding the rate", "training", "looking", "writing"
# by kind, phase -> number; "full" and "lora" are operations that these would have taken in the place of the training
Spent = dict[str, dict[str, float]]
Cost = Callable[[float, float], float]


@dataclass(frozen=True)
class Energy:
    """What a run took.

    Attributes:
        operations: floating-point operations by phase, two for a multiply-add.
        joules: of the GPUs, by phase, whoever else used them included; empty where NVML does not tell.
        full, lora: operations of training all parameters, or a LoRA of rank 16 beside each matrix of the decoder
            layers, with the same tokens and the same looks at held-out text. Finding out how is not in these.
    """

    operations: dict[str, float]
    joules: dict[str, float]
    full: float
    lora: float

    @property
    def total(self) -> float:
        """Operations of all phases."""
        return sum(self.operations.values())

    def __str__(self) -> str:
        shares = ", ".join(f"{phase} {held / self.total:.0%}" for phase, held in self.operations.items() if held)
        line = f"{self.total:.3g} operations ({shares})"
        if self.full and self.lora:
            line += f"; on the same tokens full fine-tuning takes {self.full:.3g}, LoRA r {RANK} {self.lora:.3g}"
        if self.joules:
            line += f"; {sum(self.joules.values()):,.0f} J on the GPU"
        return line

    def row(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return vars(self)


def seconds_of(spent: Mapping[str, Spent]) -> dict[str, float]:
    """Seconds by phase, of all parts of a run."""
    return _summed(spent, "seconds")


def energy_of(spent: Mapping[str, Spent]) -> Energy | None:
    """Of all parts of a run; None of one from before operations were counted."""
    operations = _summed(spent, "operations")
    full, lora = (sum(_summed(spent, kind).values()) for kind in ("full", "lora"))
    return Energy(operations, _summed(spent, "joules"), full, lora) if operations else None


def _summed(spent: Mapping[str, Spent], kind: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in spent.values():
        for phase, held in part.get(kind, {}).items():
            found[phase] = found.get(phase, 0.0) + held
    return found


@dataclass(frozen=True)
class Meter:
    """Counts what phases take. spent: what they have taken, added to; save: notes that for good."""

    shapes: Shapes
    spent: Spent = field(default_factory=dict)
    save: Callable[[], None] = lambda: None

    def add(self, kind: str, phase: str, amount: float) -> None:
        held = self.spent.setdefault(kind, {})
        held[phase] = held.get(phase, 0.0) + amount

    @contextmanager
    def phase(self, name: str, model: nn.Module, graph: Cost | None = None) -> Iterator[None]:
        """Inside, a phase of a run.

        Args:
            model: that is called, in its outermost form.
            graph: operations of a call with gradients, given tokens and pairs (see `Shapes.forward`); of others, a
                forward's are counted.
        """
        devices = {p.device for p in model.parameters()}
        noted = [time.perf_counter(), joules_of(devices)]

        def note() -> None:
            now = [time.perf_counter(), joules_of(devices)]
            self.add("seconds", name, now[0] - noted[0])
            if now[1] is not None and noted[1] is not None:
                self.add("joules", name, now[1] - noted[1])
            noted[:] = now
            self.save()

        @torch.compiler.disable
        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if not isinstance(ids, Tensor) or ids.dim() != 2:
                return
            given = ids.numel(), ids.numel() * ids.shape[1]
            plain, trains = self.shapes.forward(*given), graph is not None and torch.is_grad_enabled()
            self.add("operations", name, graph(*given) if trains and graph is not None else plain)
            if name == TRAINING:
                self.add("full", name, self.shapes.full(*given) if trains else plain)
                self.add("lora", name, self.shapes.lora(*given, RANK) if trains else plain)
            if time.perf_counter() - noted[0] > EVERY:
                note()

        handle = model.register_forward_pre_hook(count, with_kwargs=True)  # type: ignore
        try:
            yield
        finally:
            handle.remove()
            note()


def measured(shapes: Shapes) -> Cost:
    """Of a call while a map is measured: a sweep through all layers, with the gradients of all experts."""
    return lambda tokens, pairs: shapes.sweep(tokens, pairs, 0, sum(shapes.routed))


def trained(shapes: Shapes, model: nn.Module, emap: ErrorMap, settle: str, steps: bool) -> Cost:
    """Of a call while an adapter trains: an upper bound, as newborns are taken to compute all rows of their parents,
    `settle="direct"` to carry the error as the sweep does, and no layer to keep its activations.

    Args:
        model: the adapter trains in it.
        emap: says how many rows its nodes get.
        settle: as in `PCGrowConfig`.
        steps: whether a step follows on each call.
    """
    count, banks = emap.with_newborns("frequency") / max(emap.tokens, 1), set()
    lowest, rows, step = len(shapes.dense) - 1, 0.0, 0.0
    for layer in [module for module in model.modules() if isinstance(module, PCGrowExperts)]:
        for adapter in layer.active_banks():
            held = {stack: bank for stack, bank in layer.bank(adapter).items() if bank.requires_grad}
            if not held:
                continue
            lowest, located = min(lowest, layer.layer_index), list(layer.grown[adapter])
            mine = float(count[emap.layers.index(layer.layer_index), located].sum())
            for stack, bank in held.items():
                banks.add(id(bank))
                if bank.dim() < 3:
                    continue
                rows += mine * bank.numel() / len(located)
                step += orthogonalization(bank.shape, STEPS)
                directions = layer.directions(adapter, stack) if layer.is_protected(adapter) else None
                # out of gradients, and out of updates: two products each
                step += 0.0 if directions is None else 8.0 * bank.numel() * directions.shape[-1]
    beside = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in banks)
    lowest = 0 if beside else lowest

    def cost(tokens: float, pairs: float) -> float:
        # what lies beside runs forward, forward again, and backward twice
        down = shapes.sweep(tokens, pairs, lowest, rows, settle != "backprop")
        return down + 8.0 * tokens * beside + (step if steps else 0.0)

    return cost


def joules_of(devices: set[torch.device]) -> float | None:
    """What these GPUs have used since their driver was loaded; None if one does not tell, or there is none."""
    if not any(device.type == "cuda" for device in devices):
        return None
    try:
        pynvml = import_module("pynvml")  # of nvidia-ml-py
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        found = 0.0
        for device in (each for each in devices if each.type == "cuda"):
            name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            found += pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(name)) / 1000
        return found
    except (pynvml.NVMLError, AttributeError):
        return None  # older than Volta, a part of a GPU, or no NVIDIA's
