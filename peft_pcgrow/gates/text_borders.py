"""Which tokens are text, and where texts begin: read from whatever a model, or one of its layers, is told it by.

Shapes: B rows of S tokens, P tokens seen in earlier calls, N = B S.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peft_pcgrow.gates.gate import Rows
from peft_pcgrow.settling import host

# which tokens are text, and where theirs begins, as in `Rows`; and whether none is known to be padding
Borders = tuple[Tensor, Tensor | None, bool]
# by the last tensor that tells it: what it was asked, those beside it, and the answer
_READ = WeakTensorKeyDictionary()

# additive masks hide with the lowest number of their dtype, with -inf, or with -10000
HIDDEN = -9999.0


@dataclass(frozen=True)
class Told:
    """What says how tokens stand in their texts; what is absent is None.

    Attributes:
        mask: attention mask: `[B, P + S]`; `[B, heads, S, keys]`, bool or additive; flex_attention's BlockMask; or
            several of those by name.
        positions: position ids `[B, S]`, which start again with each text; `[4, B, S]`, the first of them such ones.
        lengths: where texts begin and end in the flattened row, from 0 to N (`cu_seq_lens_q`).
        texts: number of each token's text, `[B, S]` (`seq_idx`).
        chunk: tokens of a layer that attends in chunks, whose ends its mask shows like those of texts; 0: no chunks.
    """

    mask: Any = None
    positions: Any = None
    lengths: Any = None
    texts: Any = None
    chunk: int = 0

    @classmethod
    def by(cls, kwargs: Mapping[str, Any], chunk: int = 0) -> "Told":
        """From the arguments of a model or a layer."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        return cls(mask, positions, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"), chunk)

    def rows(self, shape: tuple[int, int], seen: int = 0, past: Tensor | None = None) -> Rows:
        """How tokens `[B, S]` stand in their texts, `seen` tokens after the rows' beginnings.

        Raises:
            TypeError: a mask that is of none of these kinds.
            ValueError: a mask of another size, or statements that contradict each other.
        """
        real, start, whole = self._known(shape, seen)
        return Rows(real, start, past, whole)

    def _known(self, shape: tuple[int, int], seen: int) -> Borders:
        """What `rows` says of these tokens, read once of tensors that a model hands to each of its layers."""
        given = self.mask, self.positions, self.lengths, self.texts
        tensors = [value for value in given if isinstance(value, Tensor)]
        others = len(tensors) < sum(value is not None for value in given)
        if others or not tensors or any(tensor.is_inference() or host.replayed(tensor) for tensor in tensors):
            return self._read(shape, seen)
        *beside, key = tensors
        # changed in place, a tensor says something else; what is made in inference mode is of no use outside
        changes = torch.is_inference_mode_enabled(), *(tensor._version for tensor in tensors)
        asked = shape, seen, self.chunk, *(value is None for value in given), *changes
        known = _READ.get(key)
        if known is None or known[0] != asked or not all(map(is_, (held() for held in known[1]), beside)):
            known = _READ[key] = asked, [*map(ref, beside)], self._read(shape, seen)
        return known[2]

    def _read(self, shape: tuple[int, int], seen: int) -> Borders:
        looks = [_look(mask, shape, seen) for mask in _masks(self.mask)]
        device = next((t.device for t in (self.positions, self.mask) if isinstance(t, Tensor)), torch.device("cpu"))
        # of several masks, for layers of several kinds, one that shows a token is enough
        real = torch.ones(shape, dtype=torch.bool, device=device)
        if looks:
            place = torch.arange(shape[1], device=looks[0].device)
            real = torch.stack([look.sees(place) for look in looks]).any(0)
        start = None if shape[1] == 1 else self._start(shape, seen, real, looks)
        return real, start, not looks

    def _start(self, shape: tuple[int, int], seen: int, real: Tensor, looks: "list[_Look]") -> Tensor | None:
        """Place of the first token of each token's own text in its row `[B, P + S]`."""
        place = torch.arange(shape[1], device=real.device)
        # the last token of text before each
        before = torch.where(real, place, -1).cummax(dim=1).values.roll(1, dims=1)
        before[:, 0] = -1
        here = real & (before >= 0)
        before = before.clamp_min(0)
        again = torch.zeros_like(here)
        positions = self.positions
        if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:
            positions = positions[0]
        if isinstance(positions, Tensor) and positions.dim() == 2:
            positions = positions.to(real.device).expand(shape)
            step = positions - positions.gather(1, before)
            # without a mask, transformers takes whatever is no next position for another text
            again = here & ((step <= 0) if looks else (step != 1))
        hides = [~look.sees(before) for look in looks if look.pairs]
        masked = here & torch.stack(hides).all(0) if hides and len(hides) == len(looks) else torch.zeros_like(here)
        if self.chunk:
            leading = (~real).cumprod(dim=1).sum(1, keepdim=True)
            masked &= (place - leading) % self.chunk != 0 if not seen else False
        stated = self._stated(shape, real.device)
        if stated:
            # one question to the device, not one for each statement
            wrong = (again & here & ~stated[0]).any() | (stated[0] != stated[-1])[:, 1:].any()
            if self.lengths is not None:
                wrong = wrong | (torch.as_tensor(self.lengths, device=real.device)[-1] != real.numel())
            if bool(wrong):
                raise ValueError(
                    "position_ids, cu_seq_lens_q, seq_idx contradict each other: cu_seq_lens_q must end at the number "
                    f"of tokens ({real.numel()}), and position_ids start again only where it and seq_idx begin a text"
                )
        elif not seen and not bool((again | masked).any()):
            return None
        border = torch.stack([again, masked, *stated]).any(0)
        return torch.where(border, place + seen, 0).cummax(dim=1).values

    def _stated(self, shape: tuple[int, int], device: torch.device) -> list[Tensor]:
        """Where texts begin by their lengths, and by their numbers, `[B, S]`."""
        found = []
        if self.lengths is not None:
            ends = torch.as_tensor(self.lengths, device=device).flatten().long()
            first = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool, device=device)
            found.append(first.index_fill(0, ends.clamp(0, len(first) - 1), True)[:-1].view(shape))
        if self.texts is not None:
            numbers = torch.as_tensor(self.texts, device=device).expand(shape)
            found.append(torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0)))
        return found


def _masks(given: Any) -> list[Any]:
    if not isinstance(given, Mapping):
        return [] if given is None else [given]
    # a layer without a mask sees everything
    return [] if any(mask is None for mask in given.values()) else list(given.values())


@dataclass(frozen=True)
class _Look:
    """One mask: whether tokens may attend to others of the same call.

    Attributes:
        pairs: whether it tells that of each pair; a mask of padding does not.
    """

    mask: Any
    shape: tuple[int, int]
    first: int
    pairs: bool

    @property
    def device(self) -> torch.device:
        return self.mask.device if isinstance(self.mask, Tensor) else self.mask.kv_num_blocks.device

    def sees(self, other: Tensor) -> Tensor:
        """Whether each token may attend to the one at place `other`, of its row or `[B, S]`."""
        batch, tokens = self.shape
        other = other.expand(self.shape)
        if not isinstance(self.mask, Tensor):
            row = torch.arange(batch, device=self.device).unsqueeze(1)
            token = torch.arange(tokens, device=self.device)
            return self.mask.mask_mod(row, torch.zeros_like(row), token, other + self.first).expand(self.shape)
        inside = self.mask[..., self.first : self.first + tokens]
        if not self.pairs:
            return inside.expand(self.shape).gather(1, other).bool()
        shown = inside[:, 0].expand(batch, -1, -1).gather(2, other.unsqueeze(-1)).squeeze(-1)
        return shown > HIDDEN if shown.is_floating_point() else shown.bool()


def _look(mask: Any, shape: tuple[int, int], seen: int) -> _Look:
    tensor = isinstance(mask, Tensor)
    if not (tensor and mask.dim() in (2, 4)) and not (hasattr(mask, "mask_mod") and hasattr(mask, "seq_lengths")):
        of = f"{mask.dim()} dimensions" if tensor else type(mask).__name__
        raise TypeError(
            f"an attention mask of {of} does not tell which tokens are text: give [B, S], a mask of 4 dimensions, or a "
            "BlockMask"
        )
    keys = mask.shape[-1] if tensor else mask.seq_lengths[1]
    # a static cache has columns for tokens to come
    first = seen if keys > seen + shape[1] else keys - shape[1]
    if first < 0 or (tensor and mask.shape[0] not in (1, shape[0])):
        raise ValueError(f"an attention mask of shape {tuple(mask.shape)} does not fit {shape[0]} rows of {shape[1]}")
    return _Look(mask, shape, first, not tensor or mask.dim() == 4)


def texts_apart(rows: Rows) -> Tensor | None:
    """Where texts that share rows go when each gets a row of its own: number and place of each token, `[B, S, 2]`.

    None: rows hold one text each.
    """
    if rows.start is None:
        return None
    place = torch.arange(rows.start.shape[1], device=rows.start.device) - rows.start
    return torch.stack([((place == 0).flatten().cumsum(0) - 1).view(place.shape), place], dim=-1)


def spread(values: Tensor, apart: Tensor | None) -> Tensor:
    """`values [B, S, ...]` with a row for each text, `[texts, longest, ...]`, zeros behind those that are shorter."""
    if apart is None:
        return values
    number, place = apart.flatten(0, 1).unbind(-1)
    spread = values.new_zeros(int(number.max()) + 1, int(place.max()) + 1, *values.shape[2:])
    spread[number, place] = values.flatten(0, 1)
    return spread
