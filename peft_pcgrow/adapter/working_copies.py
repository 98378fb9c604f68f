"""What inference computes with, made of an adapter's weights once per change of these rather than for every token."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.adapter.bank import state_of
from peft_pcgrow.adapter.birth import Birth
from peft_pcgrow.architectures.host import MANAGED
from peft_pcgrow.architectures.stack_view import ViewedExperts


class WorkingCopies:
    """What forwards that need no gradients compute with, made of weights once per change of these.

    Forwards of several threads may each make the same one. Copies and pickles of this start empty.
    """

    def __init__(self) -> None:
        self.held: dict[Any, tuple[Any, Any]] = {}

    def read(self, key: Any, sources: Iterable[Any], make: Callable[[], Any], *settings: Any) -> Any:
        """What `make` gives, as long as nobody writes to its `sources`, moves or casts them, or changes `settings`."""
        now = settings, tuple(map(state_of, sources))
        held = self.held.get(key)
        if held is None or held[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                held = self.held[key] = now, make()
        return held[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Prepared(nn.Module):
    """A layer that keeps them."""

    base_layer: Any
    share: Any
    births: dict[str, Birth]
    bank: Callable[[str], Mapping[str, Tensor]]
    weights: Callable[[str], Mapping[str, Tensor]]
    _composed: dict[str, dict[str, Tensor]]

    def __init__(self) -> None:
        super().__init__()
        self._working = WorkingCopies()

    def weights_to_run(self, adapter_name: str) -> Mapping[str, Tensor]:
        """`weights`, cast to the base's dtype and composed once for all forwards that need no gradient of them."""
        bank, base = self.bank(adapter_name), self.base_layer
        if self.share is not None:
            return {name: weight.to_local().to(base._parameters[name].dtype) for name, weight in bank.items()}  # type: ignore
        elsewhere = isinstance(base, ViewedExperts) or adapter_name in self._composed or torch.compiler.is_compiling()
        elsewhere |= getattr(self, MANAGED, False)
        own, composes = vars(base)["_parameters"], self.births[adapter_name].pieces is not None
        alike = not (composes or elsewhere) and all(weight.dtype == own[n].dtype for n, weight in bank.items())
        trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in bank.values())
        if alike or elsewhere or self.training or trains:
            # also because an optimizer may write where nothing counts it
            self._working.held.pop(adapter_name, None)
            return bank if alike else self.weights(adapter_name)
        sources = [*bank.values(), *(filter(torch.is_tensor, own.values()) if composes else map(own.get, bank))]
        return self._working.read(adapter_name, sources, lambda: self._cast(adapter_name))

    def _cast(self, adapter_name: str) -> dict[str, Tensor]:
        own: Any = self.base_layer._parameters  # type: ignore[union-attr]
        return {name: weight.detach().to(own[name].dtype) for name, weight in self.weights(adapter_name).items()}

    def train(self, mode: bool = True) -> "Prepared":
        if mode != self.training:
            self._working.held.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "Prepared":
        self._working.held.clear()  # no copies of what is moved
        return super()._apply(*args, **kwargs)  # type: ignore[return-value]
