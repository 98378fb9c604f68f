"""The part of a tuner layer that carries seals, and compares what loaders bring with them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from peft_pcgrow.adapter.bank import KIND
from peft_pcgrow.adapter.birth import Birth
from peft_pcgrow.adapter.seal import Seal, check_contents, check_facts, unsealed
from peft_pcgrow.architectures.host import LOADED


class SealHolder(nn.Module):
    """Stands among a layer's modules for the seal of one adapter's bank.

    Its extra state is the seal: in every state dict, and no parameter or buffer that is cast and moved.

    Args:
        facts: what the bank is now. adapter: its name. verify: whether what is loaded must be for such a bank.
    """

    def __init__(self, facts: Callable[[], Mapping[str, Any]], adapter: str, verify: bool):
        super().__init__()
        self.facts, self.adapter, self.verify = facts, adapter, verify
        # what a loader gave that asks no tuner (transformers' own): to be compared once all tensors are there
        self.expected: Seal | None = None
        # whether the bank itself has been compared
        self.compared = False
        self._by_torch = False

    def get_extra_state(self) -> Tensor:
        return Seal(self.facts()).write()

    def set_extra_state(self, state: Any) -> None:
        """Raises ValueError if the state is of another bank, or a file's that says nothing of its tensors."""
        if not self.verify:
            return
        seal = Seal.read(state)
        check_facts([seal.facts], [self.facts()], self.adapter)
        if self._by_torch:
            return
        if seal.tensors is None:
            raise ValueError(unsealed("the adapter's file"))
        self.expected, self.compared = seal, False

    def compare(self, where: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a bank that such a loader has filled is what was saved; `tensors` are all of it."""
        if self.compared or not self.verify:
            return
        if self.expected is not None:
            check_contents(where, self.expected.tensors or {}, tensors, exact=False)
            self.compared = True
        elif any(came(tensor) for tensor in tensors.values()):
            raise ValueError(unsealed(where))

    def _load_from_state_dict(self, *args: Any) -> None:
        # a model's own state dict has facts only
        self._by_torch = True
        try:
            super()._load_from_state_dict(*args)
        finally:
            self._by_torch = False


class SealedLayer(nn.Module):
    """What a tuner layer knows of its adapters' seals; `layer_index` and the names of its containers are its own."""

    layer_index: int
    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.births: dict[str, Birth] = {}
        # of each adapter, what its bank here is for
        self.pcgrow_seal = nn.ModuleDict()

    def facts(self, adapter_name: str) -> dict[str, Any]:
        """What an adapter's bank is for, as JSON gives it back."""
        birth = self.births[adapter_name]
        shrunk = {name: f"{KIND} {coding}" for name, coding in (birth.shrunk or {}).items()}
        return json.loads(json.dumps({**birth.facts, "layer": self.layer_index, "shrunk": shrunk}))

    def is_shrunk(self, adapter_name: str) -> bool:
        return self.births.get(adapter_name, Birth(())).shrunk is not None

    def own_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """All that an adapter has here, by the names in its file, after that of the layer."""
        found: dict[str, Tensor] = {}
        for name in (*self.adapter_layer_names, *self.other_param_names):
            held: Any = dict(getattr(self, name).items()).get(adapter_name)
            if isinstance(held, Tensor):
                found[name] = held
            elif held is not None:
                # not its state dict, for which FSDP2 would take gathered weights away from a forward that needs them
                found |= {f"{name}.{key}": t for key, t in (*held.named_parameters(), *held.named_buffers())}
        return found

    def check_loaded(self) -> None:
        """Raise ValueError if transformers' own loader has filled a bank from a file that is not sealed or altered."""
        for name, holder in self.pcgrow_seal.items():
            if not holder.compared:
                holder.compare(f"layer {self.layer_index} of adapter {name!r}", self.own_tensors(name))  # type: ignore

    def requires_grad_(self, requires_grad: bool = True) -> "SealedLayer":
        self.check_loaded()  # the last thing that loader does
        return super().requires_grad_(requires_grad)

    def _apply(self, *args: Any, **kwargs: Any) -> "SealedLayer":
        self.check_loaded()  # before casts that would change what is compared
        return super()._apply(*args, **kwargs)


def came(tensor: Tensor) -> bool:
    """Whether transformers' loader has read a tensor from a file."""
    return getattr(tensor, LOADED, False)
