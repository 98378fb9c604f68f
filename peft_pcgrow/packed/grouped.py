"""Products of rows that are sorted by their matrix, many matrices in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_pcgrow.architectures.host import grouped_linear
from peft_pcgrow.packed.host import grouped_mm_fallback


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending spans, those that touch as one."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def grouped_product(x: Tensor, matrices: Tensor, ends: Sequence[int], turned: bool) -> Tensor:
    """Rows `x [R, I]` times matrices `[G, I, O]`, or turned `[G, O, I]`, each up to the row where it ends."""
    places = torch.tensor(ends, dtype=torch.int32, device=x.device)
    # what transformers' way takes: no fp64, and rows of whole 16 bytes
    step = 16 // x.element_size()
    if x.dtype != torch.float64 and all(width % step == 0 for width in matrices.shape[1:]):
        return grouped_linear(x, matrices, places, is_transposed=not turned)
    return grouped_mm_fallback(x, matrices.mT if turned else matrices, places)
