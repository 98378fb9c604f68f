"""Matrices in few bits: sizes, round trips, bitsandbytes' codes, compensated rounding, sparse masks."""

import pytest
import torch
from torch import Tensor

from close import assert_close
from pcgrow_kernels import lowbit

# no multiple of a block, of a byte, of sixteen bytes
SHAPES = [(1, 1), (3, 5), (7, 12), (16, 32), (5, 64), (33, 65), (48, 100)]
QUANTIZED = [8, 4, 3, 2]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs that mostly lie in a few directions, `[rows, inputs]`, fp64."""
    few = (
        drawn(rows, max(inputs // 4, 1), seed=seed).double()
        @ drawn(max(inputs // 4, 1), inputs, seed=seed + 1).double()
    )
    return few + 0.1 * drawn(rows, inputs, seed=seed + 2).double()


def sixteens(count: int) -> int:
    return (count + 15) // 16 * 16


def bits(data: Tensor, width: int, count: int) -> Tensor:
    """Whole numbers of some bits, the highest first, by numpy's own unpacking."""
    numpy = pytest.importorskip("numpy")
    flat = numpy.unpackbits(data.numpy())[: count * width].reshape(count, width)
    return torch.from_numpy(flat @ (1 << numpy.arange(width - 1, -1, -1)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", lowbit.WIDTHS)
def test_sizes_and_levels(width, shape):
    """As many bytes as said, read back as the nearest levels of the scales that are stored."""
    outputs, inputs = shape
    weights, count = drawn(3, *shape), outputs * inputs
    data = lowbit.encode(weights, width)
    assert data.dtype == torch.uint8
    assert data.shape == (3, lowbit.size(*shape, width))
    for one, row in zip(weights, data, strict=True):
        found = lowbit.decode(row, *shape, width)
        if width == 16:
            assert torch.equal(found, one.bfloat16())
            continue
        packed, scales = row[: sixteens(-(-count * width // 8))], row[sixteens(-(-count * width // 8)) :]
        scales = scales.view(torch.bfloat16).double()
        codes = bits(packed, width, count)
        if width == 8:
            levels, spread = torch.arange(-127, 128).double() / 127, scales[:outputs, None].expand(shape).reshape(-1)
            codes = (codes + 128) % 256 - 1
        else:
            levels, spread = lowbit.levels(width).double(), scales.repeat_interleave(64)[:count]
        assert_close("read back", found.reshape(-1), levels[codes] * spread, "fp32")
        nearest = (one.double().reshape(-1, 1) / spread[:, None] - levels).abs().amin(1)
        chosen = (one.double().reshape(-1) / spread - levels[codes]).abs()
        assert float((chosen - nearest).max()) < 1e-6
        # a scale is a share of the largest weight, in bf16
        largest = torch.stack([block.abs().max() for block in (one if width == 8 else one.reshape(-1).split(64))])
        share = scales[: len(largest)] / largest.double()
        assert bool(((share > 0.49) & (share < 1.01)).all())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 4), (3, 12), (16, 32), (33, 100)])
def test_sparse(shape, half):
    """Half of the weights, the largest ones of the matrix, with their own bits."""
    weights = drawn(2, *shape).to(half).float()
    data = lowbit.encode(weights, 16, "half", half=half)
    count = shape[0] * shape[1]
    assert data.shape == (2, lowbit.size(*shape, 16, "half"))
    assert data.shape[1] == sixteens(count // 2 * 2) + sixteens(-(-count // 8))
    for one, row in zip(weights, data, strict=True):
        found = lowbit.decode(row, *shape, 16, "half", torch.float32, half)
        assert torch.equal(found, torch.where(found.ne(0), one, 0.0))
        kept, size = found.ne(0), one.abs()
        assert int(kept.sum()) == count // 2
        # some are alike in 16 bits
        assert float(size[kept].amin()) >= float(size[~kept].amax())


@pytest.mark.parametrize("shape", [(3, 5), (1, 1)])
def test_half_of_an_odd_number(shape):
    found = lowbit.rounded(drawn(1, *shape), 16, "half")
    assert int(found.ne(0).sum()) == shape[0] * shape[1] // 2


def test_other_sparsities_are_refused():
    weights = drawn(1, 4, 8)
    with pytest.raises(ValueError, match="2:4 sparsity is gone: take 'half', or fewer bits"):
        lowbit.encode(weights, 16, "2:4")
    with pytest.raises(ValueError, match="sparsity='most': it is half, or None"):
        lowbit.decode(lowbit.encode(weights, 16, "half")[0], 4, 8, 16, "most")


def test_sparse_mask_weighs_inputs():
    """By size times the norm of the input: of weights that are alike, those of the loud inputs stay."""
    loud = torch.tensor([1.0, 10.0, 10.0, 1.0] * 4)
    moment = torch.diag(loud.square())[None]
    found = lowbit.rounded(drawn(1, 8, 16).sign(), 16, "half", moment)
    assert torch.equal(found[0].ne(0), loud.gt(5).expand(8, 16))


@pytest.mark.parametrize(("width", "sparsity"), [*((w, None) for w in lowbit.WIDTHS), (16, "half")])
def test_strides_do_not_matter(width, sparsity):
    """Transposed stacks are read as views."""
    weights, moment = drawn(2, 16, 24), torch.eye(16)[None].repeat(2, 1, 1)
    for second in (None, moment):
        turned = lowbit.encode(weights.mT, width, sparsity, second)
        assert torch.equal(turned, lowbit.encode(weights.mT.contiguous(), width, sparsity, second))


def test_codes_are_those_of_bitsandbytes():
    """Equal scales, equal bytes: blocks near the levels, whose largest weight is the best scale."""
    kernels = pytest.importorskip("bitsandbytes.functional")
    table = lowbit.levels(4)
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(0, 16, (40, 64), generator=generator)
    # less than half of the smallest gap between two levels
    weights = table[place] + 0.06 * (torch.rand(40, 64, generator=generator) - 0.5)
    weights[:, 7] = 1.0
    weights = weights.clamp(-1, 1) * drawn(40, 1).abs().bfloat16().float()
    data = lowbit.encode(weights.view(1, 40, 64), 4)[0]
    codes, state = kernels.quantize_4bit(weights.view(-1), blocksize=64, quant_type="nf4")
    assert torch.equal(state.absmax, data[40 * 32 :].view(torch.bfloat16)[:40].float())
    assert torch.equal(data[: 40 * 32], codes.view(-1))
    assert_close("values", lowbit.decode(data, 40, 64, 4), kernels.dequantize_4bit(codes, state).view(40, 64), "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", lowbit.WIDTHS)
def test_read_in_a_type_is_one_rounding(width, dtype):
    data = lowbit.encode(drawn(1, 24, 64), width)[0]
    assert torch.equal(lowbit.decode(data, 24, 64, width, dtype=dtype), lowbit.decode(data, 24, 64, width).to(dtype))


@pytest.mark.parametrize("width", lowbit.WIDTHS)
def test_zeros_stay_zeros(width):
    # 3 and 2 bits have no level of zero, but a scale that is next to nothing
    assert float(lowbit.rounded(torch.zeros(2, 5, 70), width).abs().max()) < (1e-29 if width in (3, 2) else 1e-45)
    if width == 4:
        assert torch.equal(lowbit.encode(torch.zeros(1, 1, 64), 4)[0][:32], torch.full((32,), 0x77, dtype=torch.uint8))


def test_16_bits_are_the_types_own():
    weights = drawn(1, 9, 11).half()
    data = lowbit.encode(weights, 16, half=lowbit.half_of(weights.dtype))[0]
    assert torch.equal(lowbit.decode(data, 9, 11, 16, half=torch.float16), weights[0])
    assert [lowbit.half_of(dtype) for dtype in (torch.bfloat16, torch.float32)] == [torch.bfloat16] * 2


def obq(weights: Tensor, moment: Tensor, stored) -> Tensor:
    """Optimal Brain Quantization in the order of the inputs, in fp64, the inverse taken anew for what is left:
    `stored(column, i)` is what becomes of an input's weights."""
    weights, inputs = weights.double().clone(), len(moment)
    damped = moment.double() + lowbit.DAMP * moment.double().diagonal().mean() * torch.eye(inputs).double()
    for i in range(inputs):
        inverse = torch.linalg.inv(damped[i:, i:])
        kept = stored(weights[:, i].clone(), i)
        error = (weights[:, i] - kept) / inverse[0, 0]
        weights[:, i:] -= error[:, None] * inverse[0]
        weights[:, i] = kept
    return weights


@pytest.mark.parametrize("width", QUANTIZED)
@pytest.mark.parametrize("inputs", [12, 80])
def test_compensated_rounding_is_optimal_brain_quantization(inputs, width):
    """More inputs than are corrected at once, too."""
    weights, x = drawn(1, 6, inputs), correlated(300, inputs)
    moment = x.mT @ x
    count = 6 * inputs
    data = lowbit.encode(weights, width, moment=moment[None])[0]
    scales = data[sixteens(-(-count * width // 8)) :].view(torch.bfloat16).double()
    spread = scales[:6, None].expand(6, inputs) if width == 8 else scales.repeat_interleave(64)[:count].view(6, inputs)
    levels = torch.arange(-127, 128).double() / 127 if width == 8 else lowbit.levels(width).double()

    def nearest(column: Tensor, i: int) -> Tensor:
        return levels[(column[:, None] / spread[:, i, None] - levels).abs().argmin(1)] * spread[:, i]

    assert_close("weights", lowbit.decode(data, 6, inputs, width), obq(weights[0], moment, nearest), "fp32")


@pytest.mark.parametrize("sparsity", lowbit.SPARSITIES)
def test_compensated_pruning_is_optimal_brain_surgery(sparsity):
    weights, x = drawn(1, 6, 72), correlated(300, 72)
    moment = x.mT @ x
    found = lowbit.rounded(weights, 16, sparsity, moment[None])[0]
    mask = found.ne(0)
    want = obq(weights[0], moment, lambda column, i: torch.where(mask[:, i], column, 0.0))
    # stored in bf16
    assert_close("weights", found, want, "bf16")


@pytest.mark.parametrize(("width", "sparsity"), [*((w, None) for w in QUANTIZED), (16, "half")])
def test_compensation_lowers_the_error_of_the_outputs(width, sparsity):
    weights, x = drawn(4, 24, 64), torch.stack([correlated(500, 64, seed) for seed in range(4)])
    moment = x.mT @ x
    error = {
        name: ((lowbit.rounded(weights, width, sparsity, given) - weights).double() @ x.mT).square().sum((1, 2))
        for name, given in (("plain", None), ("compensated", moment))
    }
    assert bool((error["compensated"] < (0.5 if sparsity is None else 0.7) * error["plain"]).all())


@pytest.mark.parametrize("width", QUANTIZED)
def test_uncorrelated_inputs_have_nothing_to_make_up(width):
    weights = drawn(2, 8, 64)
    moment = torch.diag_embed(drawn(2, 64).abs() + 0.1)
    assert torch.equal(lowbit.encode(weights, width, moment=moment), lowbit.encode(weights, width))
    # no text: the plain answer
    assert torch.equal(lowbit.encode(weights, width, moment=torch.zeros(2, 64, 64)), lowbit.encode(weights, width))


def test_fewer_bits_more_error():
    weights = drawn(1, 64, 64)
    errors = [float((lowbit.rounded(weights, width) - weights).square().mean()) for width in lowbit.WIDTHS]
    assert errors == sorted(errors)
    # Max (1960): a Gaussian in 4 and 8 levels, with a scale for all; those of 64 weights are a little coarser
    assert errors[4] < 1.25 * 0.1175
    assert errors[3] < 1.35 * 0.03454
