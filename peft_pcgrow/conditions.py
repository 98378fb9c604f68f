"""What the run of a decoder layer depends on beside what it is called with: run again, it must find the same."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

# where PEFT's layers keep what they are set to
ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
# hooks that may come with any call that wants something recorded: see `inner_outputs`
ONLOOKERS = "transformers.utils.output_capturing"

# layers whose graphs have been looked through, and the hooks that were there
_looked_through: "WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], ...]]" = WeakKeyDictionary()


def own_hooks(hooks: Mapping[int, Any]) -> list[int]:
    """Ids of the hooks that are the user's or another library's."""
    return [key for key, hook in hooks.items() if getattr(hook, "__module__", None) != ONLOOKERS]


class Setting(NamedTuple):
    """How a module is set; `WORDS` says what each is called."""

    mode: bool
    hooks: tuple[int, ...]
    adapters: tuple[str, ...]
    implementation: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module, outermost: bool) -> "Setting":
        held = vars(module)
        hooks = {} if outermost else {**module._forward_pre_hooks, **module._forward_hooks}
        births: dict[str, Any] = held.get("births", {})
        config = held.get("config")
        return cls(
            module.training,
            tuple(own_hooks(hooks)),
            (*(str(held[name]) for name in ADAPTERS if name in held), *(str(b.gate_fpr) for b in births.values())),
            tuple(getattr(config, f"_{kind}_implementation", None) for kind in ("attn", "experts")) if config else (),
        )


WORDS = Setting(
    "was switched between training and evaluation",  # type: ignore[arg-type]
    "got or lost a hook",  # type: ignore[arg-type]
    "has other adapters active, merged, disabled or scaled, or another gate rate",  # type: ignore[arg-type]
    "got another attention or experts implementation",  # type: ignore[arg-type]
)


class Weight(NamedTuple):
    """A parameter, where it stands, and what changes when it is written to, moved or cast."""

    owner: nn.Module
    name: str
    tensor: Tensor
    state: tuple[Any, ...]


@dataclass(frozen=True)
class Conditions:
    """Noted in the forward; it holds no copies."""

    layer: nn.Module
    modules: tuple[nn.Module, ...]
    settings: tuple[Setting, ...]
    weights: tuple[Weight, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> "Conditions":
        modules = tuple(layer.modules())
        weights = [
            Weight(module, name, tensor, _state(tensor))
            for module in modules
            for name, tensor in module._parameters.items()
            if tensor is not None
        ]
        return cls(layer, modules, tuple(Setting.of(m, m is layer) for m in modules), tuple(weights))

    def trainable(self) -> list[Tensor]:
        return list(
            {id(weight.tensor): weight.tensor for weight in self.weights if weight.tensor.requires_grad}.values()
        )

    def check(self, index: int) -> None:
        """Raise RuntimeError if the layer, `index` of the stack, would not run as it did."""
        if (changed := self._changed()) is not None:
            raise RuntimeError(
                f"between forward and backward, {changed} in {type(self.layer).__name__} {index}; the backward runs "
                "the layer again, and gradients would be those of another model: call backward() before such a change"
            )

    def _changed(self) -> str | None:
        modules = tuple(self.layer.modules())
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            return "modules were replaced"
        for module, setting in zip(modules, self.settings, strict=True):
            for was, now, words in zip(setting, Setting.of(module, module is self.layer), WORDS, strict=True):
                if was != now:
                    return f"{self._name(module)} {words}"
        for owner, name, tensor, state in self.weights:
            if _state(tensor) != state:
                return f"{self._name(owner)}.{name} was written to, moved or cast"
        return None

    def _name(self, module: nn.Module) -> str:
        return next((name for name, held in self.layer.named_modules() if held is module and name), "the layer itself")

    def refuse_strangers(self, outputs: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Raise TypeError if what the layer returned trains through a tensor that is no weight of its own and was not
        `given` to it. Looked up once, and again when other hooks are there: it goes through the whole graph."""
        hooks = tuple(setting.hooks for setting in self.settings)
        if _looked_through.get(self.layer) == hooks:
            return
        known = {id(tensor) for tensor in (*given, *self.trainable())}
        waiting, seen = [output.grad_fn for output in outputs], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise TypeError(
                    f"something in {type(self.layer).__name__}, a hook for example, trains through a tensor of shape "
                    f"{tuple(leaf.shape)} that is no parameter of the layer, and settling has no gradient for it: "
                    "make it a parameter of a module in the layer, or use PCGrowConfig(settle='backprop')"
                )
            waiting += [following for following, _ in node.next_functions]
        _looked_through[self.layer] = hooks

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the layer has the weights that it ran with: `functional_call` had put them there for a while."""
        others = [
            (w, w.owner._parameters.get(w.name))
            for w in self.weights
            if w.owner._parameters.get(w.name) is not w.tensor
        ]
        try:
            for weight, _ in others:
                weight.owner._parameters[weight.name] = weight.tensor  # type: ignore[assignment]
            yield
        finally:
            for weight, other in others:
                weight.owner._parameters[weight.name] = other


def _state(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta:  # its values come and go, with hooks of accelerate's
        return ()
    plain = type(tensor) in (Tensor, nn.Parameter)  # quantized ones set their data in each forward
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.dtype, tensor.device, tensor.data_ptr() if plain else 0
