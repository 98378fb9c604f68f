"""Products of few rows with packed matrices, each row's decoded for itself: the host reads nothing on the way."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pcgrow_kernels import lowbit
from peft_pcgrow.packed.forms import WHOLE

# bytes read at once; every matrix takes a multiple of them
WORD = 8


@lru_cache(maxsize=1024)
def _there(numbers: tuple[Any, ...], device: torch.device) -> Tensor:
    """On a device, put there once: the host waits for that."""
    return torch.tensor(numbers, device=device)


def each_row(module: Any, x: Tensor, chosen: Tensor, stack: str) -> Tensor:
    """`x [R, I]`, each row times its own matrix, `[R, O]`: as `PackedExperts.packed_product`, without gradients.

    Args:
        module: packed experts. chosen: expert of each row, `[R]`.
    """
    if module.dense is not None:
        weights = module.dense[stack].to(x.dtype)[chosen]
        # laid out as decoded ones are
        weights = weights.mT.contiguous() if module.is_transposed else weights
        return torch.bmm(x.unsqueeze(1), weights.mT).squeeze(1)
    data, offsets = module.packed_buffers()[stack].view(torch.int64), module.pcgrow_offsets[stack]
    made = x.new_zeros(len(x), module.shape_of(stack, WHOLE)[0])
    for form in dict.fromkeys(form for form in module.forms if form.neurons != 0):
        mine = tuple(other == form for other in module.forms)
        shape, left = module.shape_of(stack, form), form.neurons
        # rows of other forms, which do not count here, get the first matrix of this one
        places = tuple(offsets[e if own else mine.index(True)] // WORD for e, own in enumerate(mine))
        words = torch.arange(lowbit.size(*shape, form.width, form.sparsity) // WORD, device=x.device)  # type: ignore
        found = data[_there(places, x.device)[chosen].unsqueeze(1) + words].view(torch.uint8)
        matrices = lowbit.decode(found, *shape, form.width, form.sparsity, x.dtype, module.pcgrow_half)  # type: ignore
        columns = None if left is None else module.columns(stack, left)
        # neurons are what leaves the first matrix and what enters the second
        narrow = stack == "down_proj"
        given = x if columns is None or not narrow else x.index_select(1, columns)
        y = torch.bmm(given.unsqueeze(1), matrices.mT).squeeze(1)
        if columns is not None and not narrow:
            y = y.new_zeros(made.shape).index_copy(1, columns, y)
        made = torch.where(_there(mine, x.device)[chosen].unsqueeze(1), y, made)
    return made
