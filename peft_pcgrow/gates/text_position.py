"""How the tokens that reach a layer stand in their texts: rows, padding, packing, and what generation has seen before.

A decoder layer's own arguments tell all of it. What a gate remembers between the calls of a generation rides on the
layer's own entry in the KV cache, so that whatever transformers does to a cache (beam search reorders it, assisted
decoding crops it, parallel sampling repeats it) happens to the memory too.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures.host import ENTRY_KIND
from peft_pcgrow.gates.gate import Rows
from peft_pcgrow.gates.text_borders import Told
from peft_pcgrow.settling.layer_run import CACHES

# of tokens that a cache holds: some, it does not say how many
SOME = -1


@dataclass(frozen=True)
class TextPosition:
    """One call of a decoder layer.

    Attributes:
        shape: (B, S).
        told: what says how its tokens stand in their texts.
        cache: the KV cache, if there is one; index: the layer's place in it.
        held: tokens of each row that the cache held before.
    """

    shape: tuple[int, int]
    told: Told
    cache: Any
    index: int
    held: int

    @classmethod
    def of(cls, index: int, args: tuple, kwargs: dict[str, Any], chunk: int = 0) -> "TextPosition":
        """From what a decoder layer is called with, whose place in a cache is `index`, and which attends in chunks of
        `chunk` tokens, if it does."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        shape = hidden.shape[0], hidden.shape[1]
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        cache = getattr(cache, "self_attention_cache", cache)
        # layers that a model runs through several times have an entry for each (Inkling 2 with loops)
        place = index + kwargs.get("cache_offset", 0)
        return cls(shape, Told.by(kwargs, chunk), cache, place, _held(cache, place, shape[1]))

    def rows(self, name: str, device: torch.device) -> Rows:
        """With what a gate remembers of the tokens before these.

        Args:
            name: an adapter's, for the gate of its newborns; with `.entry` behind it, for that of LoRA beside them.

        Raises:
            RuntimeError: it does not remember the tokens that the KV cache holds.
            TypeError: a mask or a KV cache of an unknown kind.
        """
        if self.cache is not None and not isinstance(getattr(self.cache, "layers", None), list):
            raise TypeError(UNKNOWN_CACHE.format(type(self.cache).__name__))
        seen = _memory(self.cache, self.index)
        past = None if self.held == 0 else seen.get(name)
        count = 0 if past is None else past.shape[1]
        if count != self.held or (past is not None and count and len(past) != self.shape[0]):
            rows = f" of {self.shape[0]} rows" if past is None else f" of {self.shape[0]} rows (it: of {len(past)})"
            adapter, _, entry = name.partition(".")
            raise RuntimeError(
                f"the gate of {'LoRA in ' if entry else ''}adapter {adapter!r} at layer {self.index} remembers {count} "
                f"tokens, and the KV cache holds {'others' if self.held == SOME else self.held}{rows}: it was filled "
                "without this adapter, or made of another cache's tensors. Give the whole text with an empty cache, or "
                "use_cache=False"
            )
        past = past if count else None
        rows = self.told.rows(self.shape, count, past)
        start = None if rows.start is None else rows.start.to(device)
        return Rows(rows.real.to(device), start, None if past is None else past.to(device), rows.whole)

    def remember(self, name: str, running: Tensor, rows: Rows) -> None:
        """Keep `running [B, P + S, 2]`, of the last of the texts in each row, for the calls to come."""
        lazily, entries = getattr(self.cache, "layer_class_to_replicate", None), getattr(self.cache, "layers", None)
        while lazily is not None and isinstance(entries, list) and len(entries) <= self.index:
            # a layer that keeps what it remembers elsewhere in the cache never asks for an entry (MiniMax)
            entries.append(lazily())
        if entries is None or self.index >= len(entries):
            return
        if rows.start is not None:
            first = rows.start[:, -1:]
            before = running.gather(1, (first - 1).clamp_min(0).unsqueeze(-1).expand(-1, -1, running.shape[2]))
            own = torch.arange(running.shape[1], device=running.device) >= first
            before = torch.where((first > 0).unsqueeze(-1), before, 0.0)
            running = torch.where(own.unsqueeze(-1), running - before, 0.0)
        entry = entries[self.index]
        if not hasattr(entry, "_pcgrow_seen"):
            entry.__class__ = _remembering(type(entry))
            entry._pcgrow_seen = {}
        entry._pcgrow_seen[name] = running


UNKNOWN_CACHE = (
    "newborns' gates remember the text so far on the layers of the KV cache, and a {} has none. Continuous batching "
    "(generate_batch, use_transformers_continuous_batching) also mixes requests in one row: call generate(), disable "
    "the adapter, or pass use_cache=False"
)


def modules_inside(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules that a decoder layer calls: its children, or those of its lists (LongCat has two attentions)."""
    for child in layer.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


def may_attend(module: nn.Module) -> bool:
    """Whether a module can be called as an attention is (see `entering`)."""
    taken = inspect.signature(module.forward).parameters
    return "attention_mask" in taken or any(each.kind == each.VAR_KEYWORD for each in taken.values())


def entering(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """What enters a module of a decoder layer, `[B, S, H]`, if it is an attention by what it is called with."""
    if "attention_mask" not in kwargs:
        return None
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) and hidden.dim() == 3 else None


def attention_chunk(layer: nn.Module, index: int) -> int:
    """Tokens of the chunks that decoder layer `index` attends in; 0: it does not (Llama 4 does)."""
    config = next((module.config for module in layer.modules() if hasattr(module, "config")), None)
    types = getattr(config, "layer_types", None) or ()
    chunked = index < len(types) and types[index] == "chunked_attention"
    return getattr(config, "attention_chunk_size", 0) if chunked else 0


def cache_place(layer: nn.Module, index: int) -> int:
    """Of the entries that decoder layer `index` has in a KV cache, the first: LongCat's layers attend twice."""
    named = (module for name, module in layer.named_modules() if "att" in name)
    return min(
        (cast(int, module.layer_idx) for module in named if isinstance(getattr(module, "layer_idx", None), int)),
        default=index,  # type: ignore
    )


def _memory(cache: Any, place: int) -> dict[str, Tensor]:
    entries = getattr(cache, "layers", None) or ()
    return getattr(entries[place], "_pcgrow_seen", {}) if place < len(entries) else {}


def _held(cache: Any, place: int, tokens: int) -> int:
    """Tokens that a cache holds before a call of `tokens`."""
    entries = getattr(cache, "layers", None)
    if not isinstance(entries, list):
        return 0
    # where a cache does not say: gates that were asked at every call remember equally much
    remembered = max((seen.shape[1] for seen in _memory(cache, place).values()), default=0)
    filled = [i for i, e in enumerate(entries) if hasattr(e, "get_seq_length") and getattr(e, "is_initialized", True)]
    if not filled:
        # layers below have counted these tokens
        states = [state for entry in entries[place:] for state in getattr(entry, "has_previous_state", {}).values()]
        return SOME if any(states) and not remembered else remembered
    # a layer without keys of its own asks another, which has counted these tokens if it comes before
    asked = place if place in filled else filled[0]
    length = entries[asked].get_seq_length()
    if isinstance(length, Tensor):
        if length.device.type != "cpu" and tokens == 1 and remembered:
            return remembered  # asking a GPU would hold up every token that is decoded
        length = int(length)
    return length - (tokens if asked < place else 0)


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
    # by its kind: pickle could not find a class that is made here
    changed["__reduce__"] = lambda self: (_empty, (kind,), self.__dict__)
    # transformers would register a class with a layer type in the place of its parent
    return type(kind.__name__, (kind,), {**changed, ENTRY_KIND: None})


def _empty(kind: type) -> Any:
    remembering = _remembering(kind)
    return remembering.__new__(remembering)  # type: ignore
