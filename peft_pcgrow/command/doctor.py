"""What of a model can grow, and what that takes, before any weight is loaded."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import find_experts
from peft_pcgrow.architectures.operations import chosen_of
from peft_pcgrow.command.fail import Unusable
from peft_pcgrow.locate.budget import check_budget
from peft_pcgrow.training.step_memory import StepMemory, step_memory

# bytes a parameter: of banks, their gradients and Muon's momentum, all in fp32
BANK = GRADIENT = MOMENTUM = 4
# memory of GPUs by name, GiB as their drivers count; of any, this share is left to a runtime and its fragments
GPUS = {
    "T4": 15, "L4": 22.5, "A10G": 22.5, "RTX3090": 24, "RTX4090": 24, "RTX5090": 32, "V100": 32, "A100-40": 40,
    "L40S": 44.5, "A6000": 48, "A100": 80, "H100": 80, "H200": 141, "B200": 180, "MI300X": 192,
}  # fmt: skip
SPARE = 0.1


@dataclass(frozen=True)
class Checkup:
    """What was found. Bytes of weights are exact; of steps see `training.step_memory`.

    Attributes:
        architecture: class of the model. nodes: what grows, "routed", "dense" or "shared".
        layers: decoder layers with nodes; experts: of each; chosen: a token is assigned to, None where all are.
        parameters, in_nodes, in_one: of the model, of all nodes, of one.
        quantized: how the checkpoint says that it is; None: it is not.
        dtype: of the checkpoint. weights: bytes of the base in it.
        budget: share of the nodes. grown: how many these are; bank, step: bytes of their weights, and of what a
            training step adds to these (gradients, and momentum).
        batch, length: of a step. steps: what it takes, by every way; why_no_steps: why that is not known.
        gpu: bytes that are there. ranks: processes over which FSDP2 spreads a step; its numbers are then of one.
    """

    architecture: str
    nodes: str
    layers: int
    experts: int
    chosen: int | None
    parameters: int
    in_nodes: int
    in_one: int
    quantized: str | None
    dtype: str
    weights: int
    budget: float
    grown: int
    bank: int
    step: int
    batch: int = 0
    length: int = 0
    steps: tuple[StepMemory, ...] = ()
    why_no_steps: str = ""
    gpu: int | None = field(default=None, kw_only=True)
    ranks: int = field(default=1, kw_only=True)

    def __str__(self) -> str:
        routed = "" if self.chosen is None else f", {self.chosen} for each token"
        return "\n".join(
            [
                f"{self.architecture}: {self.parameters:,} parameters, {self.in_nodes / self.parameters:.0%} of them "
                "in what can grow",
                f"nodes: {self.nodes}, {self.layers} layers of {self.experts}{routed}; {self.in_one:,} parameters each",
                f"base: {_size(self.weights)} in {self.dtype}" + (f", {self.quantized}" if self.quantized else ""),
                f"a budget of {self.budget:g} grows {self.grown} nodes: {_size(self.bank)} of weights in fp32, and "
                f"{_size(self.step)} of gradients and momentum in training; activations come on top",
                *self._lines(),
            ]
        )

    def _lines(self) -> list[str]:
        """What steps take."""
        if not self.steps:
            return [f"what activations take is not known: {self.why_no_steps}"] if self.why_no_steps else []
        of_each = f", on each of {self.ranks} processes that FSDP2 spreads every layer over" if self.ranks > 1 else ""
        lines = [
            f"a step of {self.batch} texts of {self.length} tokens, the nodes spread over the layers (newborns as "
            f"deepened experts){of_each}:",
            f"  {'':<9} {'':<6} {'base':>9} {'adapter':>9} {'state':>9} {'step':>9} {'in all':>9}",
        ]
        for row in self.steps:
            fits = "" if self.gpu is None else "  fits" if self.fits(row) else "  too large"
            sizes = "".join(f" {_size(count):>9}" for count in (row.base, row.adapter, row.state, row.step, row.peak))
            lines.append(f"  {row.way:<9} {row.optimizer:<6}{sizes}{fits}")
        if self.gpu is not None:
            lines.append(f"  fits: into {_size(self.gpu)}, {SPARE:.0%} of it left to the runtime")
        return lines

    def fits(self, row: StepMemory) -> bool:
        return self.gpu is not None and row.peak <= (1 - SPARE) * self.gpu

    def row(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        steps = [{**asdict(row), "step": row.step, "peak": row.peak} for row in self.steps]
        return {**asdict(self), "steps": steps, "fits": [self.fits(row) for row in self.steps]}


def check_up(
    config: Any,
    budget: float,
    nodes: str | None = None,
    batch: int = 8,
    length: int = 512,
    gpu: int | None = None,
    device: str = "cuda",
    ranks: int = 1,
) -> Checkup:
    """Look a model over on the meta device, from its config alone.

    Args:
        batch, length: of a step, of each process. gpu: bytes that it is to fit into.
        device, ranks: as for `step_memory`.

    Raises:
        Unusable: a budget that is no share, nothing in it can grow, or transformers has no causal LM for it.
    """
    dtype = getattr(config, "dtype", None) or torch.float32
    quantized = getattr(config, "quantization_config", None)
    try:
        check_budget(budget)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tree = find_experts(model, nodes)
    except ValueError as error:
        raise Unusable(str(error)) from error
    one = sum(stack[0].numel() for stack in experts.expert_stacks(tree.sites[0].base).values())
    count = sum(site.experts for site in tree.sites)
    parameters = sum(p.numel() for p in model.parameters())
    grown = max(1, round(budget * count))
    layers = len(tree.sites)
    spread = {site.layer: (grown * (n + 1)) // layers - (grown * n) // layers for n, site in enumerate(tree.sites)}
    steps, why = (), ""
    try:
        steps = tuple(
            step_memory(model, tree, {layer: n for layer, n in spread.items() if n}, batch, length, device, ranks)
        )
    except Exception as error:  # a model's own code, which was not made to run without numbers
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
    return Checkup(
        architecture=type(model).__name__,
        nodes=tree.nodes,
        layers=layers,
        experts=tree.sites[0].experts,
        chosen=chosen_of(config) if tree.nodes == "routed" else None,
        parameters=parameters,
        in_nodes=one * count,
        in_one=one,
        quantized=None if quantized is None else str(_field(quantized, "quant_method")),
        dtype=str(dtype).removeprefix("torch."),
        weights=parameters * dtype.itemsize,
        budget=budget,
        grown=grown,
        bank=grown * one * BANK,
        step=grown * one * (GRADIENT + MOMENTUM),
        batch=batch,
        length=length,
        steps=steps,
        why_no_steps=why,
        gpu=gpu,
        ranks=ranks,
    )


def gpu_bytes(name: str) -> int:
    """Of a GPU by its name in `GPUS`, or of as many GiB.

    Raises:
        Unusable: neither.
    """
    known = {each.lower(): size for each, size in GPUS.items()}
    try:
        size = known.get(name.lower().replace(" ", "")) or float(name)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise Unusable(f"--gpu {name!r} is neither GiB, as 24, nor one of {', '.join(GPUS)}")
    return int(size * 2**30)


def _field(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _size(count: int) -> str:
    power = min(max(count.bit_length() - 1, 0) // 10, 3)
    return f"{float(f'{count / 1024**power:.3g}'):g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
