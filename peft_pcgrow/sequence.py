"""How the tokens that reach a layer stand in their texts: rows, padding, packing, and what generation has seen before.

A decoder layer's own arguments tell all of it. What a gate remembers between the calls of a generation rides on the
layer's own entry in the KV cache, so that whatever transformers does to a cache (beam search reorders it, assisted
decoding crops it, parallel sampling repeats it) happens to the memory too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.gate import Rows
from peft_pcgrow.recompute import CACHES


@dataclass(frozen=True)
class Sequence:
    """One call of a decoder layer.

    Attributes:
        shape: (B, S).
        mask: the layer's attention mask, if any. positions: its position ids, if any.
        cache: the KV cache, if there is one; index: the layer's place in it.
    """

    shape: tuple[int, int]
    mask: Any
    positions: Any
    cache: Any
    index: int

    @classmethod
    def of(cls, index: int, args: tuple, kwargs: dict[str, Any]) -> "Sequence":
        """From what decoder layer `index` is called with."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        shape = hidden.shape[0], hidden.shape[1]
        held = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        # layers that a model runs through several times have an entry for each (Inkling 2 with loops)
        place = index + kwargs.get("cache_offset", 0)
        return cls(shape, kwargs.get("attention_mask"), kwargs.get("position_ids"), held, place)

    def _entry(self) -> Any:
        """The layer's entry in the cache; some caches only have it when the layer's attention has run."""
        entries = getattr(self.cache, "layers", None) or ()
        return entries[self.index] if self.index < len(entries) else None

    def rows(self, name: str, device: torch.device) -> Rows:
        """With what gate `name` remembers of the tokens before these."""
        past = getattr(self._entry(), "_pcgrow_seen", {}).get(name)
        if past is not None and (len(past) != self.shape[0] or not past.shape[1]):
            past = None  # the cache was emptied, or serves another batch
        return Rows(self._real(past).to(device), self._start(past, device), None if past is None else past.to(device))

    def remember(self, name: str, running: Tensor) -> None:
        """Keep `running [B, P + S, 2]` for the calls to come."""
        lazily, entries = getattr(self.cache, "layer_class_to_replicate", None), getattr(self.cache, "layers", None)
        while lazily is not None and isinstance(entries, list) and len(entries) <= self.index:
            # a layer that keeps what it remembers elsewhere in the cache never asks for an entry (MiniMax)
            entries.append(lazily())
        entry = self._entry()
        if entry is None:
            return
        if not hasattr(entry, "_pcgrow_seen"):
            entry.__class__ = _remembering(type(entry))
            entry._pcgrow_seen = {}
        entry._pcgrow_seen[name] = running

    def _real(self, past: Tensor | None) -> Tensor:
        """A token is padding if it may not even attend to itself."""
        batch, tokens = self.shape
        mask = self.mask
        if not isinstance(mask, Tensor) or (past is not None and tokens == 1):
            return torch.ones(batch, tokens, dtype=torch.bool)
        if mask.dim() == 2:
            return mask[:, -tokens:].bool().expand(batch, -1)
        seen = 0 if past is None else past.shape[1]
        # a static cache has columns for tokens to come
        first = seen if mask.shape[-1] > seen + tokens else mask.shape[-1] - tokens
        own = mask[:, 0, :, first:].diagonal(dim1=-2, dim2=-1)
        return (own if own.dtype == torch.bool else own >= 0).expand(batch, -1)

    def _start(self, past: Tensor | None, device: torch.device) -> Tensor | None:
        positions = self.positions
        if not isinstance(positions, Tensor) or positions.dim() != 2 or past is not None:
            return None
        again = positions[:, 1:] <= positions[:, :-1]
        if not bool(again.any()):
            return None
        place = torch.arange(1, positions.shape[1], device=positions.device)
        start = torch.where(again, place, 0).cummax(dim=1).values
        return torch.nn.functional.pad(start, (1, 0)).expand(self.shape).to(device)


# what is done to the keys of a cache entry, done to a gate's memory `[B, P, 2]`
_ALIKE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda seen, beams: seen.index_select(0, beams.to(seen.device)),
    "batch_repeat_interleave": lambda seen, repeats: seen.repeat_interleave(repeats, dim=0),
    "batch_select_indices": lambda seen, indices: seen[indices.to(seen.device)],
    "crop": lambda seen, removed: seen[:, : -abs(removed)] if removed else seen,
    "reset": lambda seen, _: seen[:, :0],
}


@cache
def _remembering(kind: type) -> type:
    """The class of a cache entry, changed so that its memory follows its keys."""

    def following(name: str, change: Callable[[Tensor, Any], Tensor]) -> Callable:
        original = getattr(kind, name)

        def method(self, *args):
            original(self, *args)
            self._pcgrow_seen = {gate: change(seen, *args or (None,)) for gate, seen in self._pcgrow_seen.items()}

        return method

    changed = {name: following(name, change) for name, change in _ALIKE.items() if hasattr(kind, name)}
    # transformers would register a class with a layer type in the place of its parent
    return type(kind.__name__, (kind,), {**changed, "_layer_type": None})
