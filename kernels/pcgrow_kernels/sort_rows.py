"""Sort routed rows by who computes them.

A stable counting sort (Knuth, The Art of Computer Programming 3, 5.2, algorithm D): count each key in each block of
rows, add the counts up over keys and then blocks, and put every row behind those of its key that came before it.
Nothing is asked of a GPU, and no two rows go to one place. Shapes: R rows, N keys.

Bytes: 24 R there and back, and 8 for each key and block. Launches: 5 (definition: 12 or more, of which a radix sort of
64-bit keys takes several passes), which is what it costs: at R = 65536 and N = 73 a single pass over rows takes 1 us.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pcgrow_kernels.dispatch import Kernel, tl, use_triton

# rows times keys that a program compares at once, and its rows at most
_TILE, _ROWS = 16384, 256


def sort_rows(key: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in the order of their keys, equals as they come.

    Args:
        key: of each row, 0..N; rows of N are nobody's and come last, `[R]` int64. keys: N.

    Returns:
        `order [R]` int64, the rows, sorted; `inverse [R]` int64, the place of each among them; `ends [N]` int32, how
        many sorted rows are of a key or one before it.
    """
    return by_triton(key, keys) if use_triton(key) else definition(key, keys)


def definition(key: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch."""
    ordered, order = torch.sort(key, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    every = torch.arange(keys, device=order.device)
    return order, inverse, torch.searchsorted(ordered, every, right=True, out_int32=True)


def by_triton(key: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by kernels."""
    key = key.contiguous()
    columns = 1 << keys.bit_length()  # N + 1 keys
    rows = max(min(_TILE // columns, _ROWS), 1)
    blocks = max(-(-len(key) // rows), 1)
    counts = torch.empty(keys + 1, blocks, dtype=torch.int32, device=key.device)
    order, inverse = torch.empty_like(key), torch.empty_like(key)
    sizes = {"rows": rows, "columns": columns}
    _count.launch((blocks,), key, counts, len(key), keys, blocks, **sizes)
    # of a key in a block, the end: rows of lesser keys, and of this one up to there
    ends = counts.view(-1).cumsum(0, dtype=torch.int32).view_as(counts)
    _place.launch((blocks,), key, ends, order, inverse, len(key), keys, blocks, **sizes)
    return order, inverse, ends[:keys, -1].contiguous()


@Kernel
def _count(key, counts, total, keys, blocks, rows: tl.constexpr, columns: tl.constexpr) -> None:
    """Grid (blocks,): a program counts the keys of its rows."""
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    found = tl.load(key + at, mask=at < total, other=-1)
    every = tl.arange(0, columns)
    count = tl.sum((found[:, None] == every[None, :]).to(tl.int32), 0)
    tl.store(counts + every * blocks + tl.program_id(0), count, mask=every <= keys)


@Kernel
def _place(key, ends, order, inverse, total, keys, blocks, rows: tl.constexpr, columns: tl.constexpr) -> None:
    """Grid (blocks,): a program places its rows."""
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    found = tl.load(key + at, mask=at < total, other=-1)
    every = tl.arange(0, columns)
    mine = (found[:, None] == every[None, :]).to(tl.int32)
    end = tl.load(ends + every * blocks + tl.program_id(0), mask=every <= keys, other=0)
    # from the end of its key in this block back: as many as follow the row there, and itself
    place = tl.sum(mine * (end - tl.sum(mine, 0) - 1 + tl.cumsum(mine, 0)), 1)
    tl.store(inverse + at, place.to(tl.int64), mask=at < total)
    tl.store(order + place, at.to(tl.int64), mask=at < total)
