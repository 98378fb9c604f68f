"""Layers whose activations are kept: run with a graph in the forward, so that the backward need not run them again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.say import say
from peft_pcgrow.settling.layer_run import LayerRun, has_taps


def can_keep(run: LayerRun, cache: Sequence[Any]) -> bool:
    """Whether a layer can: nothing comes to it beside the residual stream, nobody looks inside or checkpoints it, and
    it writes to no static KV cache."""
    static = any(getattr(entry, "is_compileable", False) for entry in cache)
    return not (run.extras or has_taps(run.layer) or getattr(run.layer, "gradient_checkpointing", False) or static)


class Weighed:
    """How much memory kept layers take, found in the first forward that keeps some, and said."""

    def __init__(self) -> None:
        self.sizes: dict[tuple[torch.device, int], int] = {}
        self.layers: list[int] = []
        self.said = False

    def around(self, index: int, layer: nn.Module) -> AbstractContextManager[None]:
        """Entered around the run of a layer that is kept."""
        return nullcontext() if self.said else self._around(index, layer)

    @contextmanager
    def _around(self, index: int, layer: nn.Module) -> Iterator[None]:
        own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers())}
        self.layers.append(index)

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self.sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, _same):
            yield

    def tell(self) -> None:
        """Called at the end of a forward that was to keep some."""
        if not self.said:
            self.said = True
            which = f"layers {self.layers[0]}-{self.layers[-1]}" if self.layers else "no layer (see keep_activations)"
            say(f"pcgrow: keeps activations of {which}: {sum(self.sizes.values()) / 2**30:.3g} GiB")
            self.sizes = {}


_same: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
