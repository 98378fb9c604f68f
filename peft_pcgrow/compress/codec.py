"""Write matrices in few bits, and read them back.

Widths of 4, 3 and 2 bits: codes of a table of levels, times a scale for each 64 weights in a row-major matrix. The
4-bit table and the order of its codes are those of NormalFloat (QLoRA, arXiv:2305.14314) as bitsandbytes stores them,
the other tables are the Lloyd-Max levels of a Gaussian. 8 bits: whole numbers times a scale for each row. Scales are in
bf16 and chosen before the codes, so that their own rounding costs nothing. Sparse matrices keep half of their weights
in 16 bits, beside a bitmap or, for 2:4, the places within each four.

Shapes: N matrices of O outputs and I inputs.
"""

from functools import cache

import torch
from torch import Tensor

WIDTHS = (16, 8, 4, 3, 2)
SPARSITIES = ("half", "2:4")
# weights that share a scale
BLOCK = 64
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Max (1960), for unit variance
_LLOYD_MAX = {3: (0.2451, 0.7560, 1.3440, 2.1520), 2: (0.4528, 1.5104)}
# scales tried, as shares of a block's largest weight
_SHRINK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8), 3: tuple(1 - 0.05 * i for i in range(10))}
_SHRINK[2] = tuple(1 - 0.05 * i for i in range(14))
# added to the mean of a second moment's diagonal before it is inverted
DAMP = 0.01
# columns after whose rounding the rest is corrected at once
COLUMNS = 64


@cache
def levels(width: int) -> Tensor:
    """The table of a width of 4, 3 or 2 bits, ascending, in [-1, 1]."""
    if width == 4:
        return torch.tensor(_NF4)
    half = torch.tensor(_LLOYD_MAX[width]) / _LLOYD_MAX[width][-1]
    return torch.cat([-half.flip(0), half])


def size(outputs: int, inputs: int, width: int, sparsity: str | None = None) -> int:
    """Bytes that `encode` makes of one matrix."""
    weights = outputs * inputs
    if sparsity == "half":
        return _words(weights // 2 * 2) + _words(-(-weights // 8))
    if sparsity == "2:4":
        return _words(weights // 2 * 2) + _words(-(-weights // 8))
    if width == 16:
        return _words(weights * 2)
    scales = outputs if width == 8 else -(-weights // BLOCK)
    return _words(-(-weights * width // 8)) + _words(scales * 2)


def encode(weights: Tensor, width: int, sparsity: str | None = None, moment: Tensor | None = None) -> Tensor:
    """Matrices `[N, O, I]` as bytes `[N, size(O, I, width, sparsity)]`.

    Args:
        width: of `WIDTHS`; sparse matrices keep their weights in 16 bits.
        sparsity: None, "half" (any half of the weights) or "2:4" (two of each four inputs; I divisible by 4).
        moment: second moments of the inputs, `[N, I, I]`. With them, what rounding or pruning one input's weights does
            to the outputs is made up for by the inputs after it (GPTQ, arXiv:2210.17323; SparseGPT, arXiv:2301.00774).
    """
    weights = weights.float()
    if sparsity is not None:
        mask = _mask(weights, sparsity, moment)
        kept = torch.where(mask, weights if moment is None else _compensate(weights, moment, mask=mask), 0.0)
        return _sparse_bytes(kept, mask, sparsity)
    if width == 16:
        return _bytes(weights.to(torch.bfloat16))
    scales = _scales(weights, width)
    spread = _spread(scales, weights.shape, width)
    if moment is not None:
        weights = _compensate(weights, moment, spread=spread, width=width)
    codes = _codes(weights / spread, width)
    return torch.cat([_bytes(_pack(codes.flatten(1), width)), _bytes(scales)], dim=1)


def decode(data: Tensor, outputs: int, inputs: int, width: int, sparsity: str | None = None) -> Tensor:
    """What `encode` wrote of one matrix, from its bytes: `[O, I]` in fp32, or in bf16 where that is what is stored."""
    weights = outputs * inputs
    if sparsity is not None:
        return _read_sparse(data, outputs, inputs, sparsity)
    if width == 16:
        return data[: weights * 2].view(torch.bfloat16).view(outputs, inputs)
    packed = -(-weights * width // 8)
    scales = data[_words(packed) :].view(torch.bfloat16).float()
    if width == 8:
        return data[:packed].view(torch.int8).view(outputs, inputs) * (scales[:outputs, None] / 127)
    table = levels(width).to(data.device)
    values = table[_unpack(data[:packed], width, weights).int()]
    blocks = -(-weights // BLOCK)
    if weights % BLOCK:
        values = torch.nn.functional.pad(values, (0, blocks * BLOCK - weights))
    return (values.view(blocks, BLOCK) * scales[:blocks, None]).view(-1)[:weights].view(outputs, inputs)


def rounded(weights: Tensor, width: int, sparsity: str | None = None, moment: Tensor | None = None) -> Tensor:
    """Matrices `[N, O, I]` as they read back after `encode`, in fp32."""
    data = encode(weights, width, sparsity, moment)
    return torch.stack([decode(row, *weights.shape[1:], width, sparsity).float() for row in data])


def _words(count: int) -> int:
    """Bytes rounded up to 16, so that what comes after is aligned."""
    return -(-count // 16) * 16


def _bytes(values: Tensor) -> Tensor:
    """`[N, ...]` of any type as bytes `[N, B]`, B a multiple of 16."""
    data = values.contiguous().view(len(values), -1).view(torch.uint8)
    return torch.nn.functional.pad(data, (0, _words(data.shape[1]) - data.shape[1]))


def _scales(weights: Tensor, width: int) -> Tensor:
    """Of each row or block, `[N, O]` or `[N, B]` bf16: the share of its largest weight that rounds best."""
    blocks = weights if width == 8 else _blocks(weights.flatten(1))
    largest = blocks.abs().amax(dim=-1)
    best, least = largest, torch.full_like(largest, float("inf"))
    for share in _SHRINK[width]:
        # scales of zero would divide by zero, and no code needs one
        tried = (largest * share).clamp_min(1e-30).to(torch.bfloat16).float()
        error = (_values(_codes(blocks / tried[..., None], width), width) * tried[..., None] - blocks).square().sum(-1)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.clamp_min(1e-30).to(torch.bfloat16)


def _blocks(flat: Tensor) -> Tensor:
    """`[N, W]` as `[N, B, BLOCK]`, filled up with zeros."""
    blocks = -(-flat.shape[1] // BLOCK)
    return torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.shape[1])).view(len(flat), blocks, BLOCK)


def _spread(scales: Tensor, shape: torch.Size, width: int) -> Tensor:
    """The scale of each weight, `[N, O, I]` or `[N, O, 1]`."""
    if width == 8:
        return scales.float().unsqueeze(-1)
    weights = shape[1] * shape[2]
    return scales.float().repeat_interleave(BLOCK, dim=1)[:, :weights].view(shape)


def _codes(values: Tensor, width: int) -> Tensor:
    """The nearest level of each value in [-1, 1], uint8; of 8 bits, the bits of an int8."""
    if width == 8:
        return (values * 127).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    table = levels(width).to(values.device)
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _values(codes: Tensor, width: int) -> Tensor:
    if width == 8:
        return codes.view(torch.int8).float() / 127
    return levels(width).to(codes.device)[codes.int()]


def _compensate(
    weights: Tensor,
    moment: Tensor,
    spread: Tensor | None = None,
    width: int = 16,
    mask: Tensor | None = None,
) -> Tensor:
    """The weights that round (by `spread` and `width`), or are masked, to the least error of the outputs.

    Column by column, the error of each is spread over those after it (GPTQ's equation 2, with the upper Cholesky factor
    of the inverse moment).
    """
    width_in = weights.shape[2]
    damped = moment.double()
    mean = damped.diagonal(dim1=1, dim2=2).mean(dim=1)
    # inputs that no text excites: any answer is right, the plain one is taken
    ridge = (DAMP * mean).clamp_min(1e-12)[:, None, None] * torch.eye(
        width_in, dtype=damped.dtype, device=damped.device
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped + ridge))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left, chosen = weights.clone(), torch.empty_like(weights)
    for start in range(0, width_in, COLUMNS):
        end = min(start + COLUMNS, width_in)
        errors = torch.empty_like(left[:, :, start:end])
        for i in range(start, end):
            column = left[:, :, i]
            if mask is not None:
                stored = torch.where(mask[:, :, i], column, 0.0)
            else:
                assert spread is not None
                scale = spread[:, :, min(i, spread.shape[2] - 1)]
                stored = _values(_codes(column / scale, width), width) * scale
            chosen[:, :, i] = column if mask is not None else stored
            error = (column - stored) / factor[:, i, i, None]
            errors[:, :, i - start] = error
            left[:, :, i + 1 : end] -= error[:, :, None] * factor[:, None, i, i + 1 : end]
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return chosen


def _mask(weights: Tensor, sparsity: str, moment: Tensor | None) -> Tensor:
    """The weights to keep: by size times the norm of their input (Wanda, arXiv:2306.11695)."""
    score = weights.abs()
    if moment is not None:
        score = score * moment.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().float()[:, None]
    if sparsity == "half":
        flat = score.flatten(1)
        kept = flat.topk(flat.shape[1] // 2, dim=1).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).view(weights.shape)
    fours = score.view(*score.shape[:2], -1, 4)
    kept = fours.topk(2, dim=-1).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, kept, True).view(weights.shape)


def _sparse_bytes(kept: Tensor, mask: Tensor, sparsity: str) -> Tensor:
    values = kept[mask].view(len(kept), -1).to(torch.bfloat16)
    if sparsity == "half":
        return torch.cat([_bytes(values), _bytes(_pack(mask.flatten(1).to(torch.uint8), 1))], dim=1)
    places = mask.view(len(mask), -1, 4).to(torch.uint8).nonzero()[:, 2].view(len(mask), -1).to(torch.uint8)
    return torch.cat([_bytes(values), _bytes(_pack(places, 2))], dim=1)


def _read_sparse(data: Tensor, outputs: int, inputs: int, sparsity: str) -> Tensor:
    weights = outputs * inputs
    count = weights // 2
    values, places = data[: count * 2].view(torch.bfloat16), data[_words(count * 2) :]
    flat = values.new_zeros(weights)
    if sparsity == "half":
        flat[_unpack(places, 1, weights).bool()] = values
    else:
        fours = torch.arange(count, device=data.device) // 2 * 4
        flat[fours + _unpack(places, 2, count).long()] = values
    return flat.view(outputs, inputs)


def _pack(codes: Tensor, width: int) -> Tensor:
    """Codes `[N, W]` below 2^width as bytes `[N, ceil(W * width / 8)]`, the first one in the highest bits."""
    if width == 8:
        return codes
    bits = 2 ** torch.arange(width - 1, -1, -1, device=codes.device)
    spread = (codes.unsqueeze(-1) & bits.to(torch.uint8)).ne(0).flatten(1)
    spread = torch.nn.functional.pad(spread, (0, -spread.shape[1] % 8)).view(len(codes), -1, 8)
    return (spread.to(torch.uint8) << torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)).sum(
        dim=-1, dtype=torch.uint8
    )


def _unpack(data: Tensor, width: int, count: int) -> Tensor:
    """The first `count` codes of one matrix, `[count]` uint8."""
    if width == 4:
        return torch.stack([data >> 4, data & 15], dim=-1).view(-1)[:count]
    if width in (1, 2):
        shifts = torch.arange(8 - width, -1, -width, dtype=torch.uint8, device=data.device)
        return ((data.unsqueeze(-1) >> shifts) & (2**width - 1)).view(-1)[:count]
    # three bytes are eight codes of 3 bits
    data = torch.nn.functional.pad(data, (0, -len(data) % 3)).view(-1, 3).int()
    word = (data[:, 0] << 16) | (data[:, 1] << 8) | data[:, 2]
    shifts = torch.arange(21, -1, -3, device=data.device)
    return ((word.unsqueeze(-1) >> shifts) & 7).view(-1)[:count].to(torch.uint8)
