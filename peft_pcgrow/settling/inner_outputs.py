"""What transformers records inside decoder layers (router logits, attention weights): further outputs of theirs.

`model(..., output_router_logits=True)` fills lists that belong to that call, by hooks on modules inside the layers. A
layer that settles runs without a graph, and so what it put there has none: marked, it takes its place in the lists, and
a loss that reads it (the load-balancing loss, a z-loss of the user's) sends its errors to the layer. Run again, the
layer fills lists of its own, in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_pcgrow.settling.host import collector
from peft_pcgrow.settling.side_tensors import swap, tensors

# recorded from the layers' outputs, which are marked by then, not from inside
STATES = "hidden_states"


@dataclass(frozen=True)
class Recorded:
    """What the call at hand records inside the layer at hand.

    Attributes:
        began: how much had been recorded of each kind before the layer ran.
    """

    began: Mapping[str, int]

    @classmethod
    def at_hand(cls) -> "Recorded":
        lists: Mapping[str, Any] = collector.get() or {}
        return cls({name: len(held) for name, held in lists.items() if isinstance(held, list) and name != STATES})

    def mark(self, mark: Callable[[Tensor], Tensor]) -> None:
        """Put marks in the place of what has been recorded since."""
        lists: Any = collector.get() or {}
        for name, start in self.began.items():
            lists[name][start:] = swap(lists[name][start:], mark)

    def since(self) -> list[Tensor]:
        """What has been recorded since, in the order of `again`."""
        lists: Any = collector.get() or {}
        return [held for name, start in self.began.items() for held in tensors(lists[name][start:])]

    @contextmanager
    def again(self) -> Iterator[Callable[[], list[Tensor]]]:
        """Around a layer that is run again: lists what it records, which no call that is under way will see."""
        lists: Any = {name: [] for name in self.began}
        token = collector.set(lists)
        try:
            yield lambda: list(tensors(lists))
        finally:
            collector.reset(token)
