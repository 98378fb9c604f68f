"""Products of rows that are sorted by their matrix, of one stack or of two, and their gradient.

Shapes: R rows, G and E matrices in the stacks, I wide rows come in and O wide ones go out.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# below torch 2.10 it has no public name
grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def product(x: Tensor, stacks: Sequence[Tensor], ends: Tensor, turned: bool, rows: Tensor | None = None) -> Tensor:
    """Each row times its matrix, `[R, O]`; at least of the rows before `ends[-1]`, and what others hold means nothing.

    On a GPU, bf16 rows are multiplied without a count of any matrix's rows on the host, so a single grouped product
    cannot begin where the first stack's rows end. Either both stacks become one, or each has a product of its own, in
    which the second's first matrix also meets the rows of the first: what moves fewer elements.

    Args:
        x: `[R, I]`, sorted by matrix; or any rows `[N, I]`, of which `rows [R]` says which they are.
        stacks: one, or two of which the second's matrices follow the first's: `[G, I, O]`, `[E, I, O]`, or turned
            `[G, O, I]`.
        ends: of each matrix, how many rows are its own or of one before it, `[G + E]` int32.
    """
    if not _by_device(x, stacks[0]):
        return _looped(x, stacks, ends, turned, rows)
    given = x if rows is None else x[rows]
    # to read and write both stacks, or to read two results and write one
    width = stacks[0].shape[1 if turned else 2]
    if len(stacks) == 2 and 2 * sum(stack.numel() for stack in stacks) < 3 * len(given) * width:
        stacks = [torch.cat([*stacks])]
    count = len(stacks[0])
    first, *rest = (
        grouped_mm(given, stack.mT if turned else stack, offs=own)
        for stack, own in zip(stacks, (ends[:count], ends[count:]), strict=False)
    )
    if not rest:
        return first
    return torch.where((torch.arange(len(given), device=ends.device) < ends[count - 1]).unsqueeze(1), first, rest[0])


def outer(a: Tensor, b: Tensor, ends: Tensor, turned: bool, rows: Tensor | None = None) -> Tensor:
    """Of each matrix's rows the sum of `a`'s times `b`'s, `[G, A, B]`, turned `[G, B, A]`; zeros where it has none.

    A stack's gradient, from what entered its matrices and what arrived at their outputs.

    Args:
        a: `[R, A]`, sorted by matrix; those past `ends[-1]` are not read.
        b: `[R, B]`; or any rows `[N, B]`, of which `rows [R]` says which they are.
        ends: as for `product`, `[G]` int32.
    """
    if not _by_device(a, b):
        first, second = (b, a) if turned else (a, b)
        made = a.new_zeros(len(ends), first.shape[1], second.shape[1])
        for place, span in _spans(ends):
            given = b[span if rows is None else rows[span]]
            first, second = (given, a[span]) if turned else (a[span], given)
            torch.mm(first.mT, second, out=made[place])
        return made
    given = b if rows is None else b[rows]
    first, second = (given, a) if turned else (a, given)
    # of a matrix without rows, the product leaves what was in memory
    met = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
    return grouped_mm(first.mT, second, offs=ends).masked_fill_(~met[:, None, None], 0)


def _by_device(x: Tensor, other: Tensor) -> bool:
    """Whether the device multiplies all groups at once; what it wants is in whole 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and len(x) > 0 and not (x.shape[1] % 8 or other.shape[-1] % 8)


def _looped(x: Tensor, stacks: Sequence[Tensor], ends: Tensor, turned: bool, rows: Tensor | None) -> Tensor:
    matrices = [matrix for stack in stacks for matrix in (stack.mT if turned else stack)]
    spans = list(_spans(ends))
    made = x.new_empty(spans[-1][1].stop if spans else 0, matrices[0].shape[1])
    for place, span in spans:
        torch.mm(x[span if rows is None else rows[span]], matrices[place], out=made[span])
    return made


def _spans(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The rows of each matrix that has some."""
    start = 0
    for place, end in enumerate(ends.tolist()):
        if end > start:
            yield place, slice(start, end)
        start = end
