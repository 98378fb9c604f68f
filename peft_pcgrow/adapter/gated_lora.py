"""LoRA behind the branch gate: beside newborns it holds for tokens that the domain's gate lets pass, and for no others.

A gate of its own reads what enters a decoder layer's attention, as those of newborns read what enters the experts (see
`gate`): it is asked before the attention's projections run, and what it says holds for all LoRA in that layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.adapter.host import LoraLayer, LoraVariant
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.adapter.lora_beside import lora_layers
from peft_pcgrow.adapter.mixed_batch import names_for

# projections that run on what the KV cache holds too, so that there are more rows than tokens (DeepSeek's attention)
CACHED = ("kv_b_proj",)


class BehindGate(LoraVariant):
    """LoRA of one module, for tokens that pass; all others keep the bits of what the module computes without it.

    Args:
        layer: the grown experts of the same decoder layer, which ask the gate.
    """

    def __init__(self, layer: PCGrowExperts):
        self.layer = layer

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(  # type: ignore[override]
        self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        if self.layer.disable_adapters or self.layer.merged:
            return result  # newborns are switched off, and what is behind their gates is too
        a, b, dropout = (getattr(module, f"lora_{name}")[active_adapter] for name in ("A", "B", "dropout"))
        added = b(a(dropout(x))) * module.scaling[active_adapter]
        # not a product with zero, which would turn an infinite value into NaN, and -0.0 into 0.0
        return torch.where(self._passes(module, active_adapter, x), result + added, result)

    def _passes(self, module: Any, adapter: str, x: Tensor) -> Tensor:
        """Which of the tokens `x [..., I]` pass, `[..., 1]`."""
        passes = self.layer.call.passes.get(adapter)
        if passes is not None and (names := names_for(module)) is not None:
            # PEFT runs one adapter's samples at a time
            own = [place for place, name in enumerate(names.each(len(passes))) if name == adapter]
            passes = passes[own]
        if passes is None:
            raise RuntimeError(
                f"LoRA of adapter {adapter!r} in layer {self.layer.layer_index} is behind a gate, which needs to know "
                "which text each token belongs to: run the whole decoder layer, not its modules alone"
            )
        if passes.numel() * x.shape[-1] != x.numel():
            raise RuntimeError(
                f"a {type(module.get_base_layer()).__name__} in layer {self.layer.layer_index} runs on rows of shape "
                f"{tuple(x.shape[:-1])}, the attention on tokens of shape {tuple(passes.shape)}: LoRA behind a gate "
                "needs a row for each token; leave that module out of target_modules"
            )
        return passes.to(x.device).view(*x.shape[:-1], 1)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise ValueError(
            f"LoRA of adapter {active_adapter!r} holds for tokens behind a gate, so it cannot be merged: keep the "
            "adapter, or grow without lora="
        )

    merge_unsafe = merge_safe  # type: ignore[assignment]


def is_gated(layer: LoraLayer, adapter: str) -> bool:
    return isinstance(layer.lora_variant.get(adapter), BehindGate)


def put_behind_gates(
    model: nn.Module, adapter: str, layers: Sequence[nn.Module], grown: Mapping[int, PCGrowExperts]
) -> None:
    """Put an adapter's LoRA behind the gates of its newborns; where there are none, it is taken out.

    Args:
        layers: the decoder layers. grown: by index, those of them where the adapter has newborns.

    Raises:
        ValueError: LoRA outside of the decoder layers, of a kind that rescales the base's weights, on modules that have
            no row for each token, or nowhere beside newborns.
    """
    inside = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
    found = [(name, layer) for name, layer in lora_layers(model) if adapter in layer.scaling]
    for name, layer in found:
        if adapter not in layer.lora_A or name.rpartition(".")[2] in CACHED:
            what = "runs on the tokens of the KV cache too" if adapter in layer.lora_A else "is an embedding"
            raise ValueError(
                f"{name} {what}, and LoRA beside newborns is behind a gate that needs a row for each token: leave it "
                "out of target_modules, or use grow='deepen'"
            )
        if adapter in layer.lora_variant:
            raise ValueError(
                f"lora=LoraConfig(use_dora=True) rescales the weights of {name} for all tokens, and beside newborns "
                "LoRA holds for the domain's only: use plain LoRA, or grow='deepen'"
            )
        if id(layer) not in inside:
            raise ValueError(
                f"LoRA on {name} has no gate to be behind, which only decoder layers have: leave it out of "
                "target_modules, or use grow='deepen'"
            )
    if not any(inside[id(layer)] in grown for _, layer in found):
        raise ValueError(
            f"none of the layers with newborns ({sorted(grown)}) has a module that lora= names, and LoRA is behind "
            "their gates: name modules of those layers, or raise budget"
        )
    for name, layer in found:
        if (experts := grown.get(inside[id(layer)])) is not None:
            layer.lora_variant[adapter] = BehindGate(experts)
        elif len(layer.lora_A) > 1:
            layer.delete_adapter(adapter)
        else:
            model.set_submodule(name, layer.get_base_layer())
