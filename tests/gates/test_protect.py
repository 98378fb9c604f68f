"""Directions that are protected from updates: against full eigendecompositions and plain matrix products."""

import pytest
import torch

from close import assert_close
from pcgrow_kernels.project_out import project_out
from peft_pcgrow.gates.directions import MomentSketch, main_directions
from peft_pcgrow.gates.separation import Separation

SHARES = (0.3, 0.8, 0.95, 0.999)


def inputs(rows, width, decay=0.7):
    """Rows whose moment has eigenvalues that fall by about `decay` squared from one to the next."""
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    return torch.randn(rows, width) * decay ** torch.arange(width) @ basis


def moment_of(x):
    return x.double().mT @ x.double()


def trace_of(x):
    return float(x.double().square().sum())


def captured(x, v):
    """Share of the rows' squared norm that lies in the span of orthonormal columns."""
    return float((x.double() @ v.double()).square().sum()) / trace_of(x)


def best_energies(x):
    """Shares of the trace that the 1, 2, ... best directions hold."""
    return torch.linalg.eigvalsh(moment_of(x)).flip(0).cumsum(0) / trace_of(x)


def assert_orthonormal(v):
    assert v.dtype == torch.float32
    assert_close("V'V", v.mT @ v, torch.eye(v.shape[1]), "fp32")


@pytest.mark.parametrize("share", SHARES)
def test_fewest_directions_that_hold_the_share(share):
    x = inputs(200, 24)
    v = main_directions(MomentSketch(24)(x), trace_of(x), share, MomentSketch(24))
    assert_orthonormal(v)
    assert captured(x, v) >= share
    for column in range(v.shape[1]):
        others = [i for i in range(v.shape[1]) if i != column]
        assert captured(x, v[:, others]) < share
    best = best_energies(x)
    assert v.shape[1] == int((best < share).sum()) + 1
    assert_close("energy", torch.tensor(captured(x, v)), best[v.shape[1] - 1], "fp32")


@pytest.mark.parametrize("dim", [12, 40])
def test_fewer_rows_than_directions(dim):
    """Rows of rank 5: five directions hold them, exact or sketched; a share of their energy takes no others."""
    x = torch.randn(5, 40)
    v = main_directions(MomentSketch(dim)(x), trace_of(x), 0.9999, MomentSketch(dim))
    assert v.shape[1] == 5
    assert_orthonormal(v)
    assert_close("rows in the span", x @ v @ v.mT, x, "fp32 solve")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("rank", [6, 20])
def test_sketch_of_low_rank_rows_holds_the_same_energy(share, rank):
    """Rank and a little noise around it, in inputs four times as wide as the sketch."""
    sketch = MomentSketch(24)
    x = inputs(500, rank) @ torch.randn(rank, 96) + 1e-4 * torch.randn(500, 96)
    v = main_directions(sketch(x), trace_of(x), share, sketch)
    assert_orthonormal(v)
    best = best_energies(x)
    assert v.shape[1] == int((best < share).sum()) + 1
    assert_close("energy", torch.tensor(captured(x, v)), best[v.shape[1] - 1], "fp32 solve")


def test_sketch_of_a_decaying_spectrum_is_nearly_as_good():
    sketch, x = MomentSketch(24), inputs(800, 96, decay=0.85)
    for share in (0.3, 0.8, 0.9):
        v = main_directions(sketch(x), trace_of(x), share, sketch)
        assert_orthonormal(v)
        assert_close("energy", torch.tensor(captured(x, v)), best_energies(x)[v.shape[1] - 1], "sketched directions")


def test_a_sketch_too_small_for_the_share_gives_all_it_has():
    sketch, x = MomentSketch(8), torch.randn(500, 64)
    v = main_directions(sketch(x), trace_of(x), 0.9, sketch)
    assert v.shape == (64, 8)
    assert_orthonormal(v)
    assert captured(x, v) > 8 / 64  # no worse than directions at random


@pytest.mark.parametrize("dim", [8, 32])
def test_a_moment_of_nothing_has_no_directions(dim):
    sketch = MomentSketch(dim)
    assert main_directions(sketch(torch.zeros(4, 32)), 0.0, 0.9, sketch).shape == (32, 0)
    assert main_directions(sketch(torch.zeros(0, 32)), 0.0, 0.9, sketch).shape == (32, 0)
    x = torch.randn(4, 32)
    assert main_directions(sketch(x), trace_of(x), 0.0, sketch).shape == (32, 0)


@pytest.mark.parametrize("dim", [8, 32])
def test_moments_are_linear_in_rows(dim):
    sketch, x = MomentSketch(dim), torch.randn(50, 32)
    whole = sketch(x)
    assert whole.dtype == torch.float32
    assert_close("halves", sketch(x[:17]) + sketch(x[17:]), whole, "fp32")
    assert_close("order", sketch(x.flip(0)), whole, "fp32")
    omega = torch.eye(32) if dim == 32 else sketch.matrix(32)
    assert_close("product", whole, moment_of(x) @ omega.double(), "fp32")
    rounded = x.bfloat16()
    assert_close("bf16 rows", sketch(rounded), moment_of(rounded) @ omega.double(), "fp32")


def test_the_random_matrix_follows_width_and_seed():
    omega = MomentSketch(8).matrix(32)
    state = torch.get_rng_state()
    assert torch.equal(MomentSketch(8).matrix(32), omega)
    assert torch.equal(torch.get_rng_state(), state)
    assert_orthonormal(omega)
    assert MomentSketch(32).matrix(32) is None
    assert MomentSketch(33).matrix(32) is None
    other = MomentSketch(8, seed=1).matrix(32)
    assert (omega.mT @ other).norm() < 0.9 * 8**0.5  # it spans another space


def projected_off(weight, v):
    """W (I - V V'), plainly."""
    return weight - weight @ v @ v.mT


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("aim", [False, True], ids=["zero", "target"])
@pytest.mark.parametrize("unused", [0, 3])
def test_project_out_sets_the_image_and_nothing_else(transposed, aim, unused):
    weight = torch.randn(3, 7, 10, dtype=torch.float64)
    v = torch.linalg.qr(torch.randn(3, 10, 4, dtype=torch.float64)).Q
    target = torch.randn(3, 7, 4, dtype=torch.float64)
    held = weight.mT.contiguous() if transposed else weight.clone()
    # nodes with fewer directions than others are filled up with zeros
    filled = torch.nn.functional.pad(v, (0, unused))
    aimed = torch.nn.functional.pad(target, (0, unused)) if aim else None
    project_out(held, filled, aimed, transposed)
    after = held.mT if transposed else held
    assert after.shape == weight.shape
    want = target if aim else torch.zeros_like(target)
    assert float((after @ v - want).abs().max()) < 1e-13
    assert_close("the rest", projected_off(after, v), projected_off(weight, v), "fp64")
    again = held.clone()
    project_out(again, filled, aimed, transposed)
    assert_close("twice", again, held, "fp64")


def test_project_out_leaves_a_16_bit_weight_near():
    weight, v = torch.randn(2, 7, 32), torch.linalg.qr(torch.randn(2, 32, 4)).Q
    target = weight @ v
    held = (weight + 0.1 * torch.randn_like(weight)).bfloat16()
    moved = held.float()
    project_out(held, v, target, False)
    assert held.dtype == torch.bfloat16
    assert_close("image", held.float() @ v, target, "bf16")
    assert_close("the rest", projected_off(held.float(), v), projected_off(moved, v), "bf16")


def test_directions_of_several_experts_share_one_width():
    """Each expert's own directions, filled up with zeros; an expert without retain rows has only those."""
    rows = [inputs(60, 16, decay) for decay in (0.5, 0.9)] + [torch.zeros(0, 16)]
    moment = torch.stack([MomentSketch(16)(x) for x in rows]).unsqueeze(0)
    trace = torch.tensor([[trace_of(x) for x in rows]], dtype=torch.float64)
    tables = [torch.zeros(1, 3, 2)] * 5
    separation = Separation(
        *(torch.zeros(1, 16), torch.zeros(1, 4), *tables), {"up": moment}, {"up": trace}, {"sketch": 16}
    )
    found = separation.directions(0, "up", [1, 2, 0], 0.9)
    single = [separation.directions(0, "up", [e], 0.9)[0] for e in (1, 2, 0)]
    assert found.shape[:2] == (3, 16)
    assert found.shape[2] == single[0].shape[1] > single[2].shape[1] > single[1].shape[1] == 0
    for filled, v in zip(found, single, strict=True):
        assert torch.equal(filled[:, : v.shape[1]], v)
        assert not filled[:, v.shape[1] :].any()
    assert captured(rows[0], single[2]) >= 0.9
    assert separation.directions(0, "up", [2], 0.9).shape == (1, 16, 0)
