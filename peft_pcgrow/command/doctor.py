"""What of a model can grow, and what that takes, before any weight is loaded."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import find_experts
from peft_pcgrow.architectures.operations import chosen_of
from peft_pcgrow.command.fail import Unusable
from peft_pcgrow.locate.budget import check_budget

# bytes a parameter: of banks, their gradients and Muon's momentum, all in fp32
BANK = GRADIENT = MOMENTUM = 4


@dataclass(frozen=True)
class Checkup:
    """What was found. Bytes are exact for what they count: without activations, and without what a runtime adds.

    Attributes:
        architecture: class of the model. nodes: what grows, "routed", "dense" or "shared".
        layers: decoder layers with nodes; experts: of each; chosen: a token is assigned to, None where all are.
        parameters, in_nodes, in_one: of the model, of all nodes, of one.
        quantized: how the checkpoint says that it is; None: it is not.
        dtype: of the checkpoint. weights: bytes of the base in it.
        budget: share of the nodes. grown: how many these are; bank, step: bytes of their weights, and of what a
            training step adds to these (gradients, and momentum).
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
            ]
        )

    def row(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


def check_up(config: Any, budget: float, nodes: str | None = None) -> Checkup:
    """Look a model over on the meta device, from its config alone.

    Raises:
        Unusable: a budget that is no share, nothing in it can grow, or transformers has no causal LM for it.
    """
    dtype = getattr(config, "dtype", None) or torch.float32
    quantized = getattr(config, "quantization_config", None)
    try:
        check_budget(budget)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tree = find_experts(model, nodes)
    except ValueError as error:
        raise Unusable(str(error)) from error
    one = sum(stack[0].numel() for stack in experts.expert_stacks(tree.sites[0].base).values())
    count = sum(site.experts for site in tree.sites)
    parameters = sum(p.numel() for p in model.parameters())
    grown = max(1, round(budget * count))
    return Checkup(
        architecture=type(model).__name__,
        nodes=tree.nodes,
        layers=len(tree.sites),
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
    )


def _field(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _size(count: int) -> str:
    power = min(max(count.bit_length() - 1, 0) // 10, 3)
    return f"{float(f'{count / 1024**power:.3g}'):g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
