"""What an MLP of linear layers becomes when it is adopted: a block with one expert, which those layers are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_pcgrow.architectures.adopted_experts import AdoptedBlock, AdoptedExperts
from peft_pcgrow.architectures.host import REPACKED, dequantize_bnb_weight


class LinearBlock(AdoptedBlock):
    """An MLP of linear layers: every token goes to its one expert."""

    # names of the linear layer that tokens leave by, and of the module that is applied last, if there is one
    leaving: str
    applied_last: str | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        index = torch.zeros(len(flat), 1, dtype=torch.long, device=flat.device)
        y = self.experts(flat, index, flat.new_ones(len(flat), 1)).view(hidden_states.shape)
        last, kind = getattr(self, self.leaving), y.device.type
        plain = last is not None and last.weight.is_floating_point()
        if plain and y.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            # grown experts give the bits that they are given, linear layers 16
            y = y.to(torch.get_autocast_dtype(kind))
        return y if self.applied_last is None else getattr(self, self.applied_last)(y)


class LinearExperts(AdoptedExperts):
    """One expert, which an MLP's linear layers are.

    Args:
        block: the MLP. entering: names of its linear layers that tokens enter: gate and up, both in one, or up alone.
        leaving: of the one that they leave by. gated: whether there is a gate.
        transposed: whether weights are `[I, O]`.
        act_fn, config, kind: see `AdoptedExperts`.
    """

    # tokens always go to expert 0, at weight 1
    def __init__(
        self,
        block: nn.Module,
        entering: Sequence[str],
        leaving: str,
        gated: bool,
        transposed: bool,
        act_fn: Any,
        config: Any,
        kind: str,
    ):
        super().__init__(block, 1, act_fn, config, kind)
        self.entering, self.leaving = tuple(entering), leaving
        self.has_gate, self.is_transposed = gated, transposed
        self.has_bias = getattr(block.get_submodule(leaving), "bias", None) is not None

    def _layers(self, stack: str) -> list[Any]:
        return [getattr(self.block, name) for name in ((self.leaving,) if stack == "down_proj" else self.entering)]

    def shape(self, stack: str) -> tuple[int, ...]:
        layers = self._layers(stack.removesuffix("_bias"))
        outputs = sum(linear_sizes(layer)[0] for layer in layers)
        if stack.endswith("_bias"):
            return 1, outputs
        inputs = linear_sizes(layers[0])[1]
        return (1, inputs, outputs) if self.is_transposed else (1, outputs, inputs)

    def views(self, stack: str) -> list[Tensor]:
        layers = self._layers(stack.removesuffix("_bias"))
        if stack.endswith("_bias"):
            return [layer.bias.unsqueeze(0) for layer in layers]
        return [_full_weight(layer, self.like).unsqueeze(0) for layer in layers]

    @property
    def like(self) -> Tensor:
        weight = self._layers("down_proj")[0].weight
        if not self.read_only:
            return weight
        # not the quantizer's own, which evaluation on some CPUs changes
        known = getattr(self.config, "dtype", None) or torch.get_default_dtype()
        return torch.empty(0, dtype=known, device=weight.device)

    @property
    def read_only(self) -> bool:
        return not self._layers("down_proj")[0].weight.is_floating_point()

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first, (last,) = self._layers("up_proj"), self._layers("down_proj")
        return last(self._activated([layer(hidden_states) for layer in first]))

    def _activated(self, entered: list[Tensor]) -> Tensor:
        if len(entered) == 2:
            return self.act_fn(entered[0]) * entered[1]
        return self._apply_gate(entered[0]) if self.has_gate else self.act_fn(entered[0])

    def one(self, x: Tensor, expert: int, stacks: Mapping[str, Tensor]) -> Tensor:
        first = self.names[0]
        weight, bias = stacks[first][expert], stacks[f"{first}_bias"][expert] if self.has_bias else None
        # one product for each of the block's layers, as it does them
        weights = weight.chunk(len(self.entering), dim=self._axis(first))
        biases = [None] * len(weights) if bias is None else bias.chunk(len(weights))
        inner = self._activated([self._linear(x, w, b) for w, b in zip(weights, biases, strict=True)])
        return self._linear(
            inner, stacks["down_proj"][expert], stacks["down_proj_bias"][expert] if self.has_bias else None
        )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.is_transposed:
            return linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def places(self) -> list[tuple[dict[str, Any], str]]:
        return [(self.block._modules, name) for name in (*self.entering, self.leaving)]

    def checkpoint(self, stack: str, values: Tensor) -> dict[str, Tensor]:
        matrix = stack.removesuffix("_bias")
        names = (self.leaving,) if matrix == "down_proj" else self.entering
        kind = "weight" if matrix == stack else "bias"
        parts = values[0].chunk(len(names), dim=self._axis(stack))
        return {f"{name}.{kind}": part.contiguous() for name, part in zip(names, parts, strict=True)}


def linear_sizes(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, or of transformers' Conv1D, also if it is quantized."""
    return (layer.nf, layer.nx) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)


def _full_weight(layer: Any, like: Tensor) -> Tensor:
    """A linear layer's weight, decoded if bitsandbytes quantized it."""
    if layer.weight.is_floating_point():
        return layer.weight
    if getattr(getattr(layer.weight, "quant_state", None), REPACKED, False):
        # evaluation on some CPUs has packed it in another order, which only its own kernel reads
        with torch.no_grad():
            columns = layer(torch.eye(layer.in_features, dtype=like.dtype, device="cpu"))
            return (columns if layer.bias is None else columns - layer.bias).mT.to(like.dtype)
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).to(like.dtype)
