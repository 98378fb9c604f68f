"""PCGrowExperts: a PEFT tuner layer around an experts module, owner of the grown banks."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from peft_pcgrow import deepen, experts

# relative size of the perturbation that init_weights=False asks for
PERTURBATION = 0.5


class Bank(nn.Module):
    """One stack of grown experts, `weight [G, ...]`, in the base's layout."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class PCGrowExperts(nn.Module, BaseTunerLayer):
    """Runs `base_layer`, except for the rows of grown experts, which their bank computes.

    Args:
        base_layer: an experts module (see `experts`).
        layer_index: index of its decoder layer.
    """

    other_param_names = ("pcgrow_checksum",)

    def __init__(self, base_layer: experts.ExpertsModule, layer_index: int):
        super().__init__()
        self.base_layer: experts.ExpertsModule = base_layer
        self.layer_index = layer_index
        stacks = experts.expert_stacks(base_layer)
        for name in stacks:
            setattr(self, f"pcgrow_{name}", nn.ModuleDict())
        self.adapter_layer_names = tuple(f"pcgrow_{name}" for name in stacks)
        self.merged_adapters = []
        self._disable_adapters = False
        self.grown: dict[str, tuple[int, ...]] = {}
        self._originals: dict[str, dict[str, Tensor]] = {}
        self._slots: dict[tuple[str, torch.device], Tensor] = {}
        # sha256 of an adapter's bank here, filled in when it is saved and compared when it is loaded
        self.pcgrow_checksum = BufferDict({}, persistent=True)
        # set by each forward; the model asks whether the layer's block went round it
        self.called = False
        hidden = next(stack for name, stack in stacks.items() if name == "down_proj")
        self.in_features = self.out_features = hidden.shape[2 if getattr(base_layer, "is_transposed", False) else 1]

    def update_layer(self, adapter_name: str, chosen: Sequence[int], init_weights: bool, inference_mode: bool) -> None:
        """Give `adapter_name` a bank with copies of the experts `chosen` (perturbed unless `init_weights`)."""
        self.grown[adapter_name] = tuple(chosen)
        for name, weights in experts.read_experts(self.base_layer, chosen).items():
            if not init_weights:
                weights = weights + PERTURBATION * weights.std() * torch.randn_like(weights)
            self._banks(name)[adapter_name] = Bank(weights)
        self.pcgrow_checksum[adapter_name] = torch.zeros(32, dtype=torch.uint8)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _banks(self, stack: str) -> Any:
        return getattr(self, f"pcgrow_{stack}")

    def bank(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Parameters of an adapter's bank by stack name, `[G, ...]`."""
        names = (name.removeprefix("pcgrow_") for name in self.adapter_layer_names)
        return {name: self._banks(name)[adapter_name].weight for name in names}

    def active_banks(self) -> list[str]:
        """Active adapters that grow experts here."""
        return [name for name in self.active_adapters if name in self.grown]

    def weights_in_use(self) -> dict[str, list[tuple[nn.Parameter, tuple[int, ...] | None]]]:
        """Which tensors hold the weights in use: per stack, (tensor, experts in its slices; None for all)."""
        in_use: dict[str, list[tuple[nn.Parameter, tuple[int, ...] | None]]] = {
            name: [(stack, None)] for name, stack in experts.expert_stacks(self.base_layer).items()
        }
        for adapter in [] if self.disable_adapters or self.merged else self.active_banks():
            for name, weight in self.bank(adapter).items():
                in_use[name].append((weight, self.grown[adapter]))
        return in_use

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.called = True
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        active = [] if self.merged else self.active_banks()
        if not active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        branches = [deepen.Branch(self._slot(name, hidden_states.device), self.bank(name)) for name in active]
        return deepen.forward(self.base_layer, branches, hidden_states, top_k_index, top_k_weights)

    def _slot(self, adapter_name: str, device: torch.device) -> Tensor:
        key = (adapter_name, device)
        if key not in self._slots:
            self._slots[key] = deepen.slots(self.grown[adapter_name], self.base_layer.num_experts, device)
        return self._slots[key]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_disjoint(names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def check_disjoint(self, adapter_names: Sequence[str]) -> None:
        """Raise ValueError if two of these adapters grow the same expert here."""
        owner: dict[int, str] = {}
        for name in adapter_names:
            for expert in self.grown.get(name, ()):
                if expert in owner:
                    raise ValueError(
                        f"adapters {owner[expert]!r} and {name!r} both grow expert {expert} of layer "
                        f"{self.layer_index} and cannot be active together: activate one of them"
                    )
                owner[expert] = name

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.grown.pop(adapter_name, None)
        self._slots = {key: slot for key, slot in self._slots.items() if key[0] != adapter_name}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write grown experts over the base's; the slices that they replace are kept for `unmerge`."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.grown]
        self.check_merge(safe_merge, names)
        for name in names:
            bank = {stack: weight.detach() for stack, weight in self.bank(name).items()}
            self._originals[name] = experts.read_experts(self.base_layer, self.grown[name])
            experts.write_experts(self.base_layer, self.grown[name], bank)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back, bit for bit, what the merges replaced."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            experts.write_experts(self.base_layer, self.grown[name], self._originals.pop(name))

    def check_merge(self, safe_merge: bool, adapter_names: Sequence[str]) -> None:
        """Raise ValueError if merging these adapters here would fail; writes nothing."""
        names = [name for name in adapter_names if name in self.grown and name not in self.merged_adapters]
        if names and experts.is_quantized(self.base_layer):
            raise ValueError(
                "the base was loaded quantized, and what merges into it cannot be saved and served exactly: load "
                "the base in bf16 or fp32, load the adapter onto it, and merge there"
            )
        self.check_disjoint([*self.merged_adapters, *names])
        for name in names if safe_merge else ():
            if not all(bool(torch.isfinite(weight).all()) for weight in self.bank(name).values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        stack = next(iter(experts.expert_stacks(base_layer).values()))
        return stack.device, stack.dtype

    def extra_repr(self) -> str:
        return f"layer={self.layer_index}, grown={ {name: list(chosen) for name, chosen in self.grown.items()} }"

    def __repr__(self) -> str:
        return "pcgrow." + super().__repr__()
