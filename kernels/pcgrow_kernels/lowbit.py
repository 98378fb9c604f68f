"""Write matrices in few bits, and read them back.

Widths of 4, 3 and 2 bits: codes of a table of levels, times a scale for each 64 weights in a row-major matrix. The
4-bit table and the order of its codes are those of NormalFloat (QLoRA, arXiv:2305.14314) as bitsandbytes stores them,
the other tables are the Lloyd-Max levels of a Gaussian. 8 bits: whole numbers times a scale for each row. Scales are in
bf16 and chosen before the codes, so that their own rounding costs nothing. Sparse matrices keep half of their weights
in 16 bits, beside a bitmap. 16 bits are bf16 or fp16, see `half`.

Shapes: N matrices of O outputs and I inputs.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

WIDTHS = (16, 8, 4, 3, 2)
SPARSITIES = ("half",)
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
_SHRINK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85), 3: (1.0, 0.9, 0.8, 0.7), 2: (1.0, 0.85, 0.7, 0.6, 0.5)}
# added to the mean of a second moment's diagonal before it is inverted
DAMP = 0.01
# columns after whose rounding the rest is corrected at once
COLUMNS = 64
# bits that are looked up at once, whole codes of each width
_LOOKED_UP = {4: 8, 3: 12, 2: 8}


@cache
def levels(width: int) -> Tensor:
    """The table of a width of 4, 3 or 2 bits, ascending, in [-1, 1]."""
    if width == 4:
        return torch.tensor(_NF4, device="cpu")
    half = torch.tensor(_LLOYD_MAX[width], device="cpu") / _LLOYD_MAX[width][-1]
    return torch.cat([-half.flip(0), half])


def size(outputs: int, inputs: int, width: int, sparsity: str | None = None) -> int:
    """Bytes that `encode` makes of one matrix."""
    weights = outputs * inputs
    if sparsity is not None:
        return _words(weights // 2 * 2) + _words(-(-weights // 8))
    if width == 16:
        return _words(weights * 2)
    scales = outputs if width == 8 else -(-weights // BLOCK)
    return _words(-(-weights * width // 8)) + _words(scales * 2)


def check_sparsity(sparsity: str | None) -> None:
    """ValueError unless it is None or of `SPARSITIES`."""
    if sparsity == "2:4":
        raise ValueError("2:4 sparsity is gone: take 'half', or fewer bits")
    if sparsity is not None and sparsity not in SPARSITIES:
        raise ValueError(f"sparsity={sparsity!r}: it is {' or '.join(SPARSITIES)}, or None")


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type that loses least of weights of this one."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def encode(
    weights: Tensor,
    width: int,
    sparsity: str | None = None,
    moment: Tensor | None = None,
    half: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Matrices `[N, O, I]` as bytes `[N, size(O, I, width, sparsity)]`.

    Args:
        width: of `WIDTHS`; sparse matrices keep their weights in 16 bits.
        sparsity: None, or "half" (any half of the weights).
        moment: second moments of the inputs, `[N, I, I]`. With them, what rounding or pruning one input's weights does
            to the outputs is made up for by the inputs after it (GPTQ, arXiv:2210.17323; SparseGPT, arXiv:2301.00774).
        half: type of what is kept in 16 bits, bf16 or fp16; `decode` must be told the same.

    Raises:
        ValueError: another sparsity.
    """
    check_sparsity(sparsity)
    weights = weights.float().contiguous()
    if sparsity is not None:
        mask = _mask(weights, moment)
        kept = torch.where(mask, weights if moment is None else _compensate(weights, moment, mask=mask), 0.0)
        values = kept[mask].view(len(kept), -1).to(half)
        return torch.cat([_bytes(values), _bytes(_pack(mask.flatten(1).to(torch.uint8), 1))], dim=1)
    if width == 16:
        return _bytes(weights.to(half))
    scales = _scales(weights, width)
    spread = _spread(scales, weights.shape, width)
    if moment is not None:
        weights = _compensate(weights, moment, spread=spread, width=width)
    codes = _codes(weights / spread, width)
    return torch.cat([_bytes(_pack(codes.flatten(1), width)), _bytes(scales)], dim=1)


def decode(
    data: Tensor,
    outputs: int,
    inputs: int,
    width: int,
    sparsity: str | None = None,
    dtype: torch.dtype | None = None,
    half: torch.dtype = torch.bfloat16,
) -> Tensor:
    """What `encode` wrote of one matrix, from its bytes, `[O, I]`; of N of one form, from theirs `[N, B]`, `[N, O, I]`.

    Args:
        dtype: of the result, one rounding from fp32. None: fp32, or `half` where that is what is stored.
        half: that was written.

    Raises:
        ValueError: another sparsity than `encode` writes.
    """
    check_sparsity(sparsity)
    if data.dim() == 1:
        return decode(data.unsqueeze(0), outputs, inputs, width, sparsity, dtype, half)[0]
    count, weights = len(data), outputs * inputs
    if sparsity is not None:
        found = _read_sparse(data, weights, half)
    elif width == 16:
        found = data[:, : weights * 2].view(half)
    elif width == 8:
        scales = data[:, _words(weights) :].view(torch.bfloat16)[:, :outputs].float()
        found = data[:, :weights].view(torch.int8).view(count, outputs, inputs) * (scales.unsqueeze(-1) / 127)
    else:
        found = _read_blocks(data, weights, width, dtype)
    found = found.view(count, outputs, inputs)
    return found if dtype is None else found.to(dtype)


def rounded(weights: Tensor, width: int, sparsity: str | None = None, moment: Tensor | None = None) -> Tensor:
    """Matrices `[N, O, I]` as they read back after `encode`, in fp32."""
    data = encode(weights, width, sparsity, moment)
    outputs, inputs = weights.shape[1:]
    return decode(data, outputs, inputs, width, sparsity, torch.float32)


def _read_blocks(data: Tensor, weights: int, width: int, dtype: torch.dtype | None) -> Tensor:
    """Weights of 4, 3 or 2 bits, `[N, weights]`: in fp32, or in `dtype` where a kernel gives it."""
    count, packed, blocks = len(data), -(-weights * width // 8), -(-weights // BLOCK)
    scales = data[:, _words(packed) :].view(torch.bfloat16)[:, :blocks].float()
    if width == 4 and weights % BLOCK == 0 and data.device.type in ("cpu", "cuda"):
        kernels = bitsandbytes_kernels()
        if kernels is not None:
            kind = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
            # one block a row: on CPUs, a row that is no multiple of a block long is given the wrong scales
            shape = torch.Size((count * blocks, BLOCK))
            state = kernels.QuantState(scales.reshape(-1), shape, dtype=kind, blocksize=BLOCK, quant_type="nf4")
            return kernels.dequantize_4bit(data[:, :packed].reshape(-1, 1), state).view(count, weights)
    values = _look_up(data[:, :packed], width)
    if weights % BLOCK:
        values = torch.nn.functional.pad(values[:, :weights], (0, blocks * BLOCK - weights))
    return values.view(count, blocks, BLOCK).mul_(scales.unsqueeze(-1)).view(count, -1)[:, :weights]


@cache
def bitsandbytes_kernels() -> Any:
    """bitsandbytes' functions, or None where it cannot be imported."""
    try:
        import bitsandbytes.functional as kernels
    except (ImportError, OSError, RuntimeError):
        return None
    return kernels


@cache
def _table(width: int, device: torch.device) -> Tensor:
    """The levels of all codes that are looked up at once, `[2^bits, codes]`."""
    bits = _LOOKED_UP[width]
    shifts = torch.arange(bits - width, -1, -width, device="cpu")
    return levels(width)[(torch.arange(2**bits, device="cpu").unsqueeze(1) >> shifts) & (2**width - 1)].to(device)


def _look_up(data: Tensor, width: int) -> Tensor:
    """The level of each code in some bytes `[N, B]`, `[N, codes]` fp32: some more where the last bytes are not full."""
    count, table = len(data), _table(width, data.device)
    if width == 3:
        # three bytes are two words of four codes
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % 3)).reshape(-1, 3)
        first, middle, last = data[:, 0].int(), data[:, 1], data[:, 2]
        words = torch.stack([first * 16 + (middle >> 4), (middle & 15).int() * 256 + last], dim=1).view(-1)
    else:
        words = data.int().reshape(-1)
    return _at(table, words).view(count, -1)


def _at(table: Tensor, words: Tensor) -> Tensor:
    """Rows `words [W]` of a table of 8 or 16 bytes a row, one after the other."""
    if words.device.type != "cpu":
        return table.index_select(0, words).view(-1)
    # a CPU copies one wide number faster than a row of some narrow ones
    wide = torch.int64 if table.shape[1] * table.element_size() == 8 else torch.complex128
    return table.view(wide).view(-1).index_select(0, words).view(table.dtype)


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
    damped = moment.double().clone()
    mean = damped.diagonal(dim1=1, dim2=2).mean(dim=1)
    # inputs that no text excites: any answer is right, the plain one is taken
    damped.diagonal(dim1=1, dim2=2).add_((DAMP * mean).clamp_min(1e-12)[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
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


def _mask(weights: Tensor, moment: Tensor | None) -> Tensor:
    """The half of the weights to keep: by size times the norm of their input (Wanda, arXiv:2306.11695)."""
    score = weights.abs()
    if moment is not None:
        score = score * moment.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().float()[:, None]
    flat = score.flatten(1)
    kept = flat.topk(flat.shape[1] // 2, dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, kept, True).view(weights.shape)


@cache
def _masks(device: torch.device) -> Tensor:
    """Which of eight weights a byte says are kept, `[256, 8]` bool."""
    byte = torch.arange(256, device="cpu").unsqueeze(1)
    return ((byte >> torch.arange(7, -1, -1, device="cpu")) & 1).bool().to(device)


def _read_sparse(data: Tensor, weights: int, half: torch.dtype) -> Tensor:
    """`[N, weights]` in `half`."""
    kept = weights // 2
    values, places = data[:, : kept * 2].view(half), data[:, _words(kept * 2) :]
    # some more than all weights, where the last bytes are not full
    mask = _at(_masks(data.device), places.int().reshape(-1)).view(len(data), -1)[:, :weights]
    return values.new_zeros(len(data), weights).masked_scatter_(mask, values)


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
