"""What the run of a decoder layer depends on beside what it is called with: run again, it must find the same."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from peft_pcgrow.settling.host import ADAPTERS, ATTENTION, EXPERTS, HOLDERS, ONLOOKERS, Normalization, times_written

# numbers in a buffer (statistics, a router's bias) up to which a copy of it is kept
SMALL = 2**16
# attributes of modules that change nothing of what they compute, or stand among the settings
NO_SETTINGS = ("training", "gradient_checkpointing", "activation_checkpointing")
# what tuners' layers have, one of them at least
TUNED = frozenset((*ADAPTERS, "births"))
PLAIN = frozenset((bool, int, float, str))

# layers whose graphs have been looked through, and the hooks that were there
_looked_through: "WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], ...]]" = WeakKeyDictionary()


def own_hooks(hooks: Mapping[int, Any]) -> list[int]:
    """Ids of the hooks that are the user's or another library's."""
    return [key for key, hook in hooks.items() if getattr(hook, "__module__", None) != ONLOOKERS]


def adapters_in_use(module: nn.Module) -> tuple[str, ...]:
    """What a tuner's layer is set to: adapters active, merged, disabled and scaled, and the rates of their gates; () of
    any other module."""
    held = vars(module)
    births: dict[str, Any] = held.get("births", {})
    return (*(str(held[name]) for name in ADAPTERS if name in held), *(str(b.gate_fpr) for b in births.values()))


class Setting(NamedTuple):
    """How a module is set; `WORDS` says what each is called."""

    mode: bool
    hooks: tuple[int, ...]
    adapters: tuple[str, ...]
    implementation: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module, outermost: bool) -> "Setting":
        held = vars(module)
        hooked = not outermost and (module._forward_pre_hooks or module._forward_hooks)
        config = held.get("config")
        return cls(
            module.training,
            tuple(own_hooks({**module._forward_pre_hooks, **module._forward_hooks})) if hooked else (),
            () if TUNED.isdisjoint(held) else adapters_in_use(module),
            tuple(getattr(config, name, None) for name in (ATTENTION, EXPERTS)) if config else (),
        )


WORDS = Setting(
    "was switched between training and evaluation",  # type: ignore[arg-type]
    "got or lost a hook",  # type: ignore[arg-type]
    "has other adapters active, merged, disabled or scaled, or another gate rate",  # type: ignore[arg-type]
    "got another attention or experts implementation",  # type: ignore[arg-type]
)


class Weight(NamedTuple):
    """A parameter or buffer, where it stands, what changes when it is written to, moved or cast, and a copy of a small
    buffer."""

    owner: nn.Module
    holder: str
    name: str
    tensor: Tensor
    state: tuple[Any, ...]
    copy: Tensor | None

    @property
    def place(self) -> dict[str, Any]:
        return getattr(self.owner, self.holder)


@dataclass(frozen=True)
class Conditions:
    """Noted in the forward; it holds no copies but of small buffers.

    Attributes:
        numbers: numbers, switches and words among each module's attributes. given: what the layer was called with, by
            name, and the states of these tensors.
    """

    layer: nn.Module
    modules: tuple[nn.Module, ...]
    settings: tuple[Setting, ...]
    numbers: tuple[dict[str, Any], ...]
    weights: tuple[Weight, ...]
    given: tuple[tuple[str, Tensor, tuple[Any, ...]], ...]

    @classmethod
    def of(cls, layer: nn.Module, given: Iterable[tuple[str, Tensor]]) -> "Conditions":
        modules = tuple(layer.modules())
        weights = [
            Weight(module, holder, name, tensor, _state(tensor), _copy(tensor) if holder == "_buffers" else None)
            for module in modules
            for holder in HOLDERS
            for name, tensor in getattr(module, holder).items()
            if tensor is not None
        ]
        settings = tuple(Setting.of(module, module is layer) for module in modules)
        states = tuple((name, tensor, _state(tensor)) for name, tensor in given)
        return cls(layer, modules, settings, tuple(map(_numbers, modules)), tuple(weights), states)

    def ran(self) -> None:
        """Called after the forward: attributes that it changes itself (counters) are no settings.

        Raises:
            RuntimeError: it has written to a buffer too large for a copy.
        """
        for module, numbers in zip(self.modules, self.numbers, strict=True):
            now = _numbers(module)
            for name in [name for name, value in numbers.items() if now.get(name) != value]:
                del numbers[name]
        for weight in self.weights:
            if weight.holder == "_buffers" and self._is_changed(weight):
                raise RuntimeError(
                    f"{type(self.layer).__name__} writes in its forward to the buffer "
                    f"{self._name(weight.owner)}.{weight.name}, of which no copy is kept above {SMALL:,} numbers; the "
                    "backward runs the layer again, and would find other values: use PCGrowConfig(settle='backprop')"
                )

    def trainable(self) -> list[Tensor]:
        return list(
            {
                id(w.tensor): w.tensor for w in self.weights if w.holder == "_parameters" and w.tensor.requires_grad
            }.values()
        )

    def check(self, index: int) -> None:
        """Raise RuntimeError if the layer, `index` of the stack, would not run as it did."""
        if (changed := self._changed()) is not None:
            raise RuntimeError(
                f"between forward and backward, {changed} in {type(self.layer).__name__} {index}; the backward runs "
                "the layer again, and gradients would be those of another run: call backward() before such a change"
            )

    def _changed(self) -> str | None:
        modules = tuple(self.layer.modules())
        if len(modules) != len(self.modules) or any(a is not b for a, b in zip(modules, self.modules, strict=True)):
            return "modules were replaced"
        for module, setting in zip(modules, self.settings, strict=True):
            for was, now, words in zip(setting, Setting.of(module, module is self.layer), WORDS, strict=True):
                if was != now:
                    return f"{self._name(module)} {words}"
        for module, numbers in zip(modules, self.numbers, strict=True):
            now = _numbers(module)
            for name, was in numbers.items():
                if now.get(name) != was:
                    return f"{self._name(module)}.{name} was changed from {was} to {now.get(name)}"
        for weight in self.weights:
            if self._is_changed(weight):
                return f"{self._name(weight.owner)}.{weight.name} was written to, moved or cast"
        for name, tensor, state in self.given:
            if _state(tensor) != state:
                return f"the input {name} was written to, moved or cast"
        return None

    @staticmethod
    def _is_changed(weight: Weight) -> bool:
        return weight.copy is None and _state(weight.tensor) != weight.state

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
        """Inside, the layer has the tensors that it ran with, which `functional_call` had put there for a while, and of
        small buffers that were written to since, by itself or anybody, copies as they were: it may write to them again.
        """
        copies: dict[int, Tensor] = {}
        others = []
        try:
            for weight in self.weights:
                other, right = weight.place.get(weight.name), weight.tensor
                # a batch norm's kernels leave no trace in a tensor's version
                written = isinstance(weight.owner, Normalization) or _state(right) != weight.state
                if weight.copy is not None and written:
                    # one for all modules that share it
                    right = copies.setdefault(id(right), weight.copy.clone())
                if other is not right:
                    others.append((weight, other))
                    weight.place[weight.name] = right
            yield
        finally:
            for weight, other in others:
                weight.place[weight.name] = other


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if type(value) in PLAIN and name[0] != "_" and name not in NO_SETTINGS
    }


def _copy(tensor: Tensor) -> Tensor | None:
    return None if tensor.is_meta or tensor.numel() > SMALL else tensor.detach().clone()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta:  # its values come and go, with hooks of accelerate's
        return ()
    plain = type(tensor) in (Tensor, nn.Parameter)  # quantized ones set their data in each forward
    return times_written(tensor), tensor.dtype, tensor.device, tensor.data_ptr() if plain else 0
