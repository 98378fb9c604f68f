"""What the error map looks at in each layer while a corpus is settled, and sums up."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import ExpertsSite, Tree
from peft_pcgrow.architectures.gathered import Gather
from peft_pcgrow.architectures.sharded import local
from peft_pcgrow.architectures.stack_view import ViewedExperts
from peft_pcgrow.gates.separation import Separation
from peft_pcgrow.maps.batches import IGNORED
from peft_pcgrow.maps.error_map import COUNTERS, FOLDS, SUMS, ErrorMap
from peft_pcgrow.maps.gradient_sketch import GradientSketch, expert_error
from peft_pcgrow.maps.newborns import Newborns, nodes_of
from peft_pcgrow.settling.descent import Probe


class ErrorProbe(Probe):
    """Sums, per site and expert, what `ErrorMap` holds, going on from an unfinished map.

    Attributes:
        gather: of a layer's index: inside, its weights are whole, as in its forward; None: they always are.
    """

    gather: Gather | None = None

    def __init__(
        self,
        tree: Tree,
        sketch: GradientSketch | None,
        resumed: ErrorMap | None = None,
        vocabulary: int | None = None,
    ):
        self.sites = {site.layer: site for site in tree.sites}
        self.sketch = sketch
        self.layouts = experts.stack_layouts(tree.sites[0].base)
        self.keep = torch.ones(0, dtype=torch.bool, device="cpu")
        # newborns are numbered behind the experts of their layer (see `GrownExperts.nodes_of`)
        self.newborns = {site.layer: site.newborns for site in tree.sites}
        self.nodes = {site.layer: site.experts + len(self.newborns[site.layer]) for site in tree.sites}
        self.sums = {
            layer: torch.zeros(len(SUMS), nodes, dtype=torch.float64, device="cpu")
            for layer, nodes in self.nodes.items()
        }
        self.gradient: dict[int, dict[str, Tensor]] = {site.layer: {} for site in tree.sites}
        self.fold_labels = torch.zeros(FOLDS, dtype=torch.float64, device="cpu")
        self.hops: Tensor | None = None
        self.words = None if vocabulary is None else torch.zeros(vocabulary, dtype=torch.float64, device="cpu")
        self.loss, self.labels, self.tokens, self.batches = 0.0, 0, 0, 0
        # of the batch at hand, where they were computed: sums by layer, gradients by layer and stack, words
        self._sums: dict[int, Tensor] = {}
        self._images: dict[tuple[int, str], list[tuple[Any, Tensor]]] = {}
        self._words: Tensor | None = None
        self._routed: tuple[Tensor, Tensor] | None = None
        self._forward: dict[int, tuple[Tensor, Tensor]] = {}
        self._stacks: list[tuple[str, Tensor, Sequence[int] | None]] = []
        if resumed is not None:
            for row, layer in enumerate(resumed.layers):
                born = resumed.newborns.restrict(resumed.newborns.of_layers([layer]))
                parts = [torch.stack([getattr(held, name) for name in SUMS]) for held in (resumed, born)]
                self.sums[layer] = torch.cat([parts[0][:, row], parts[1]], dim=1)
                self.gradient[layer] = {
                    name: torch.cat([g[:, row], *([born.gradient[name]] if name in born.gradient else [])], dim=1)
                    for name, g in resumed.gradient.items()
                }
            self.fold_labels, self.hops, self.words = resumed.fold_labels, resumed.hops, resumed.words
            self.loss, self.labels = resumed.loss, resumed.labels
            self.tokens, self.batches = resumed.tokens, resumed.batches

    @property
    def fold(self) -> int:
        """Of the batch at hand."""
        return (self.batches - 1) % FOLDS

    def begin(self, real: Tensor, target: Tensor) -> None:
        """Called before each batch, with what is text of it and the labels, `[B, S]`."""
        self._close_batch()
        self.keep = real.reshape(-1)
        wanted = target[:, 1:].reshape(-1)
        counts = wanted != IGNORED
        tokens, labels = torch.stack([self.keep.sum(), counts.sum().to(self.keep.device)]).tolist()
        if self.words is not None:
            seen = torch.zeros(len(self.words), dtype=torch.float64, device=wanted.device)
            self._words = seen.scatter_add_(0, torch.where(counts, wanted, 0), counts.double())
        self.labels += labels
        self.tokens += tokens
        self.batches += 1
        self.fold_labels[self.fold] += labels

    def _close_batch(self) -> None:
        """Add up what was seen of a batch: until its end, nothing waits for a device."""
        for index, sums in self._sums.items():
            self.sums[index] += sums.cpu()
        for (index, name), found in self._images.items():
            for nodes, image in found:
                held, image = self.gradient[index], image.cpu()
                if name not in held:
                    shape = FOLDS, self.nodes[index], *image.shape[1:]
                    held[name] = torch.zeros(shape, dtype=image.dtype, device="cpu")
                held[name][self.fold, nodes] += image
        if self.words is not None and self._words is not None:
            self.words += self._words.cpu()
        self._sums, self._images, self._words = {}, {}, None

    @property
    def frees(self) -> bool:  # type: ignore[override]
        return self.gather is not None

    def _whole(self, index: int) -> AbstractContextManager[None]:
        return nullcontext() if self.gather is None else self.gather(index)

    @contextmanager
    def watch(self, index: int) -> Iterator[Callable[[], list[Tensor]]]:  # type: ignore[override]
        self._routed, self._stacks, outputs = None, [], []
        site = self.sites.get(index)
        if site is None:
            with self._whole(index):
                yield lambda: []
            return

        def seen(module: nn.Module, args: tuple, output: Tensor) -> None:
            self._routed = nodes_of(site.module, args), args[2].detach()
            outputs.append(output)

        handles = []
        with ExitStack() as composed:
            composed.enter_context(self._whole(index))
            try:
                if self.sketch is not None:
                    if isinstance(site.module, (experts.GrownExperts, ViewedExperts)):
                        composed.enter_context(site.module.composed_once())
                    self._stacks = list(_stacks_in_use(site))
                handles.append(site.module.register_forward_hook(seen))
                for _, stack, _ in self._stacks:
                    stack.requires_grad_(True)
                yield lambda: [*outputs, *(stack for _, stack, _ in self._stacks)]
            finally:
                for handle in handles:
                    handle.remove()
                for _, stack, _ in self._stacks:
                    stack.requires_grad_(False)

    def receive(self, index: int, errors: Sequence[Tensor | None]) -> None:
        if index not in self.sites:
            return
        if self._routed is None or not errors or errors[0] is None:
            raise RuntimeError(
                f"layer {index} ran without calling its experts: its MoE block was replaced by other code"
            )
        self._add(index, errors[0], *self._routed)
        for (name, _, chosen), gradient in zip(self._stacks, errors[1:], strict=True):
            if gradient is None or self.sketch is None:
                continue
            image = self.sketch(local(gradient), self.layouts[name].neurons)
            nodes = list(chosen) if chosen is not None else slice(self.sites[index].experts)
            image = image if chosen is None else image[: len(chosen)]
            self._images.setdefault((index, name), []).append((nodes, image))

    @contextmanager
    def routing(self) -> Iterator[None]:
        """Where layers do not run again, note in the forward itself how tokens were routed."""
        handles = []
        try:
            for site in () if self.again else self.sites.values():
                handles.append(site.module.register_forward_hook(partial(self._note, site.layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._forward[index] = nodes_of(module, args), args[2].detach()

    def carried(self, index: int, delta: Tensor) -> None:
        if index in self.sites:
            self._add(index, delta, *self._forward.pop(index))

    def _add(self, index: int, delta: Tensor, chosen: Tensor, weight: Tensor) -> None:
        delta = delta.reshape(-1, delta.shape[-1]).to(weight.device)
        sums = torch.stack(expert_error(delta, chosen, weight, self.nodes[index], self.keep.to(delta.device)))
        self._sums[index] = self._sums[index] + sums if index in self._sums else sums

    def _newborn_nodes(self) -> tuple[tuple[int, int, str], ...]:
        return tuple((layer, donor, name) for layer, here in self.newborns.items() for name, donor in here)

    def _split(self, *held: Tensor) -> list[Tensor]:
        """Of each layer, `[..., E + N, ...]` along axis 1, its experts; and after those of all layers, its newborns."""
        counts = [site.experts for site in self.sites.values()]
        pairs = list(zip(held, counts, strict=True))
        return [t[:, :experts] for t, experts in pairs] + [t[:, experts:] for t, experts in pairs]

    def settled(self, hops: Sequence[Tensor]) -> None:
        if self.hops is None:
            self.hops = torch.zeros(len(hops), len(hops) + 1, dtype=torch.float64, device="cpu")
        keep = self.keep.cpu()
        for row, needed in enumerate(hops):
            self.hops[row] += torch.bincount(needed.cpu()[keep], minlength=len(hops) + 1)

    def result(self, base: dict[str, Any], separation: Separation | None) -> ErrorMap:
        self._close_batch()
        layers = tuple(self.sites)
        parts = self._split(*(self.sums[layer] for layer in layers))
        sums = torch.stack(parts[: len(layers)], dim=1)
        tensors = dict(zip(SUMS, torch.cat(parts[len(layers) :], dim=1), strict=True))
        gradient = {}
        for name, like in (self.gradient[layers[0]] or {}).items():
            held = [self.gradient[layer].get(name) for layer in layers]
            shapes = [(FOLDS, self.nodes[layer], *like.shape[2:]) for layer in layers]
            parts = self._split(
                *(like.new_zeros(shape) if g is None else g for g, shape in zip(held, shapes, strict=True))
            )
            gradient[name] = torch.stack(parts[: len(layers)], dim=1)
            tensors[f"gradient.{name}"] = torch.cat(parts[len(layers) :], dim=1)  # type: ignore
        nodes = self._newborn_nodes()
        return ErrorMap(
            layers,
            *sums.clone(),
            gradient=gradient,
            newborns=Newborns().changed(tensors, nodes) if nodes else Newborns(),  # type: ignore
            **{name: getattr(self, name) for name in COUNTERS},
            base=base,
            separation=separation,
            fold_labels=self.fold_labels.clone(),
            hops=self.hops.clone() if self.hops is not None else None,
            words=self.words.clone() if self.words is not None else None,
        )


def _stacks_in_use(site: ExpertsSite) -> Iterator[tuple[str, Tensor, Sequence[int] | None]]:
    """The tensors whose gradients are the nodes' (name, tensor, nodes of its slices; None for all experts)."""
    if not isinstance(site.module, experts.GrownExperts):
        for name, stack in experts.expert_stacks(site.base).items():
            yield name, stack, experts.nodes_here(site.base)
    else:
        for name, held in site.module.weights_in_use().items():
            for stack, chosen in held:
                yield name, stack, chosen
