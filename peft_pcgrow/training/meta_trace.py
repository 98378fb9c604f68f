"""What one call of each kind of decoder layer holds, and what is around the layers, found on the meta device."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from peft_pcgrow.settling.layer_run import hidden_of
from peft_pcgrow.training.host import ASKS_FOR_A_NUMBER, DispatchMode, each_in, memory_of


@dataclass(frozen=True)
class LayerBytes:
    """Of one decoder layer, in bytes.

    Attributes:
        entered: its input. there: to run without a graph.
        saved: what its graph holds, the input too if it does. back: to run with a graph, and back, beside the input.
        alone, alone_back: the same of a graph for the adapter's weights alone, through which no error goes down.
        weights: what trains in it, and so its gradients.
    """

    entered: int
    there: int
    saved: int
    back: int
    alone: int
    alone_back: int
    weights: int


@dataclass(frozen=True)
class StepBytes:
    """Of a step: its decoder layers, bottom first; what lies beside all of them (masks, rotations); what comes before
    and after them at its peak."""

    layers: tuple[LayerBytes, ...]
    beside: int
    around: int


class _Live(DispatchMode):
    """Counts the storages that operations make, as long as they live."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, Any] = {memory_of(held): None for held in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ASKS_FOR_A_NUMBER:
            # what models ask before they choose a mask: whether nothing is padded, and no text packed
            return args[0].dtype == torch.bool
        made = func(*args, **(kwargs or {}))
        each_in(self._count, made)
        return made

    def _count(self, made: Any) -> None:
        if isinstance(made, Tensor) and (key := memory_of(made)) not in self._seen:
            storage = made.untyped_storage()
            size = storage.nbytes()
            self._seen[key] = weakref.ref(storage, partial(self._gone, key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int, _: Any) -> None:
        self._seen.pop(key, None)
        self.now -= size

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, the most is one of its own."""
        most, self.most = self.most, self.now
        try:
            yield
        finally:
            self.most = most


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels have it: no matrix of scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor):  # type: ignore[override]
        *outer, heads, length, _ = query.shape
        # by tokens, as kernels write it
        made = query.new_empty(*outer, length, heads, value.shape[-1]).transpose(-2, -3)
        ctx.save_for_backward(query, key, value, made, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return made

    @staticmethod
    def backward(ctx, error: Tensor):
        return tuple(torch.empty_like(held) for held in ctx.saved_tensors[:3])


class MetaTrace:
    """One step of a model on the meta device; every kind of layer runs once, others of that kind are passed by.

    Args:
        model: none of its parameters trains but the adapter's. layers: its decoder layers.
        trained: of a layer, what trains in it. kind: of a layer's place, what else tells its kind.
        settles: False: what only settling needs to know is left out, `there`, and `alone` above the lowest layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        trained: Callable[[nn.Module], list[nn.Parameter]],
        kind: Callable[[int], Any],
        settles: bool = True,
    ):
        self.model, self.layers, self.trained, self.kind = model, list(layers), trained, kind
        self.live = _Live([*model.parameters(), *model.buffers()])
        self.settles = settles
        self.found: dict[Any, LayerBytes] = {}
        self.order: list[LayerBytes] = []
        self.beside = 0
        self._handed: dict[Any, Any] = {}

    def run(self, batch: int, length: int) -> StepBytes:
        """Raises RuntimeError or NotImplementedError where the model asks for numbers."""
        forwards = [layer.forward for layer in self.layers]
        ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = partial(self._run, index, layer, layer.forward)
            with _FusedAttention(), self.live:
                self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        finally:
            for layer, forward in zip(self.layers, forwards, strict=True):
                vars(layer).pop("forward", None)
                if getattr(forward, "__self__", None) is not layer:
                    layer.forward = forward
        return StepBytes(tuple(self.order), self.beside, self.live.most)

    def _run(self, index: int, layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if not self.order:
            self.beside = self.live.now - hidden.untyped_storage().nbytes()
        shapes = tuple((name, p.shape) for name, p in layer.named_parameters())
        needed = self.settles or index == 0
        key = type(layer), shapes, hidden.shape, self.kind(index), needed
        if key not in self.found:

            def again(x: Tensor) -> Any:
                return forward(x, *args[1:], **kwargs) if args else forward(**{**kwargs, "hidden_states": x})

            with self.live.apart():
                self.found[key], self._handed[key] = self._measure(layer, hidden.detach(), again, needed)
        self.order.append(self.found[key])
        top = index == len(self.layers) - 1
        handed = hidden.detach().requires_grad_() if top else hidden
        beside = self._handed[key]
        return handed if beside is None else (handed, *beside)

    def _measure(self, layer: nn.Module, x: Tensor, run: Callable, needed: bool) -> tuple[LayerBytes, Any]:
        entered = x.untyped_storage().nbytes()
        there = self._most(lambda: run(x)) if self.settles else 0
        trained = self.trained(layer)
        saved, back, beside = self._graph(layer, x.detach().requires_grad_(), run, trained)
        alone, alone_back, _ = self._graph(layer, x, run, trained) if trained and needed else (0, 0, None)
        weights = sum(p.numel() * p.element_size() for p in trained)
        return LayerBytes(entered, there, saved, back, alone, alone_back, weights), beside

    def _most(self, run: Callable) -> int:
        before = self.live.most = self.live.now
        with torch.no_grad():
            run()
        return self.live.most - before

    def _graph(self, layer: nn.Module, x: Tensor, run: Callable, trained: list[nn.Parameter]) -> tuple[int, int, Any]:
        """Of a layer's graph: what it holds, what going there and back takes, and what the layer returns beside."""
        before = self.live.most = self.live.now
        mine, holds = memory_of(x), []

        def pack(held: Tensor) -> Tensor:
            holds.append(memory_of(held) == mine)
            return held

        with torch.enable_grad(), saved_tensors_hooks(pack, lambda held: held):
            output = run(x)
            made = hidden_of(output, layer)
            saved = self.live.now - before - made.untyped_storage().nbytes() + any(holds) * x.untyped_storage().nbytes()
            wanted = [*([x] if x.requires_grad else []), *trained]
            if made.requires_grad and wanted:
                found = torch.autograd.grad(made, wanted, torch.empty_like(made), allow_unused=True)
                del found
        beside = each_in(lambda held: held.detach() if isinstance(held, Tensor) else held, output)
        return saved, self.live.most - before, beside[1:] if isinstance(beside, tuple) else None
