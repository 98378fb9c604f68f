"""Which matrix computes which row: the order that rows are multiplied in, and the way back to their tokens.

Shapes: T tokens, K choices per token, R = T * K rows (row t * K + k is token t's choice k), B branches, E experts of
the base, G grown matrices.
"""

import torch
from torch import Tensor

from pcgrow_kernels.sort_rows import sort_rows


def remap(index: Tensor, taker: Tensor | None, slots: Tensor, grown: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows by matrix: the G grown ones first, then the base's E; rows of the same one stay in their order.

    A stable counting sort by `G + E` keys that never asks the host for a count. It reads `index` and `taker` and writes
    `order` and `inverse`, R elements each: 32 R bytes in all.

    Args:
        index: expert that each row is routed to, `[T, K]` int64, 0 or more; rows past the base's experts are of
            none and come last.
        taker: branch that computes it, `[T, K]` int64; -1: the base. None: the one that has a grown matrix of its
            expert, for all tokens.
        slots: of each branch, the grown matrix of each of the base's experts, `[B, E]` int64; read where it is taker.
            Without takers, -1 where it has none.
        grown: G.

    Returns:
        `order [R]` int64: the rows, sorted. `inverse [R]` int64: the place of each row among them. `ends [G + E]`
        int32: how many of the sorted rows are of a matrix or one before it.
    """
    experts = slots.shape[1]
    every = torch.arange(grown, grown + experts, device=index.device)
    held = index.clamp(max=experts - 1)
    if taker is None:
        place = torch.where(slots < 0, every, slots).amin(0)[held]
    else:
        # the last row is the base's
        place = torch.cat([slots, every[None]])[taker, held]
    place = place.masked_fill(index >= experts, grown + experts)
    return sort_rows(place.reshape(-1), grown + experts)
