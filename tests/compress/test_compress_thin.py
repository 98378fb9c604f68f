"""Thinning and spending: least squares, what is removed first, budgets against all choices there are."""

from itertools import product

import pytest
import torch
from torch import Tensor

from close import assert_close
from peft_pcgrow.compress.allocate import allocate
from peft_pcgrow.compress.thin import THIN_RIDGE, compensated, elimination_order
from peft_pcgrow.packed.forms import Form


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    return x.mT @ x


def ridged(x: Tensor) -> Tensor:
    """Rows whose second moments are the damped ones."""
    mean = x.square().sum((1, 2)) / x.shape[2]
    return torch.cat([x, (THIN_RIDGE * mean).sqrt()[:, None, None] * torch.eye(x.shape[2], dtype=x.dtype)], dim=1)


@pytest.mark.parametrize("rows", [5, 300])
def test_what_is_left_is_the_least_squares_solution(rows):
    """Of rows weighted by the roots of their costs; also with fewer rows than neurons."""
    x, cost, down = drawn(3, rows, 16), drawn(3, rows, seed=1).abs(), drawn(3, 6, 16, seed=2)
    kept = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(e))[:10] for e in range(3)])
    moment = (x * cost[:, :, None]).mT @ x
    found = compensated(down, moment, kept)
    weighted = ridged(x * cost.sqrt()[:, :, None])
    for expert in range(3):
        left = weighted[expert][:, kept[expert]]
        want = torch.linalg.lstsq(left, weighted[expert] @ down[expert].mT).solution.mT
        assert_close("down", found[expert], want, "fp64 across batches")


def test_all_of_them_are_no_change():
    down, x = drawn(2, 6, 16), drawn(2, 100, 16)
    assert_close("down", compensated(down, gram(x), torch.arange(16).expand(2, 16)), down, "fp64 gradient")
    order = compensated(down, gram(x), torch.arange(15, -1, -1).expand(2, 16))
    assert_close("turned", order, down.flip(2), "fp64 gradient")


@pytest.mark.parametrize("gone", ["dead", "duplicated", "sum of two"])
def test_what_is_redundant_goes_first_and_is_made_up_for(gone):
    """Outputs are recovered, up to the ridge."""
    x, down = drawn(2, 400, 16), drawn(2, 6, 16, seed=1)
    for expert, victims in enumerate(([3, 5], [0, 15])):
        for victim, (one, other) in zip(victims, ((1, 2), (8, 9)), strict=True):
            if gone == "dead":
                x[expert, :, victim] = 0
            elif gone == "duplicated":
                x[expert, :, victim] = x[expert, :, one]
            else:
                x[expert, :, victim] = x[expert, :, one] + x[expert, :, other]
    order = elimination_order(down, gram(x), 1)
    for expert, victims in enumerate(([3, 5], [0, 15])):
        groups = [{v, *({1, 2} if v == victims[0] else {8, 9})} for v in victims]
        first = set(order[expert, :2].tolist())
        if gone == "dead":
            assert first == set(victims)
        else:
            # one of each group of neurons that depend on each other
            members = groups if gone == "sum of two" else [{victims[0], 1}, {victims[1], 8}]
            assert all(len(first & group) == 1 for group in members), (first, members)
    kept = order[:, 2:].sort(dim=1).values
    left = compensated(down, gram(x), kept)
    before = x @ down.mT
    after = torch.stack([x[e][:, kept[e]] @ left[e].mT for e in range(2)])
    assert float((after - before).square().mean() / before.square().mean()) < 10 * THIN_RIDGE**2


@pytest.mark.parametrize("at_once", [1, 3, 8, 16])
def test_order_against_the_definition(at_once):
    """Loss of each removal with the rest refitted by least squares, over all that are left."""
    x, down = drawn(1, 60, 10), drawn(1, 4, 10, seed=1)
    found = elimination_order(down, gram(x), at_once)[0].tolist()
    assert sorted(found) == list(range(10))
    rows = ridged(x)[0]
    outputs, gone = rows @ down[0].mT, []
    while len(gone) < 10:
        losses = {}
        for neuron in set(range(10)) - set(gone):
            left = [n for n in range(10) if n not in gone and n != neuron]
            fit = torch.linalg.lstsq(rows[:, left], outputs).solution if left else torch.zeros(0, 4).double()
            losses[neuron] = float((outputs - rows[:, left] @ fit).square().sum())
        gone += sorted(losses, key=losses.__getitem__)[:at_once]
    assert found == gone


@pytest.mark.parametrize("neurons", [1, 12, -8])
def test_strides_that_kernels_refuse(neurons):
    with pytest.raises(
        ValueError, match=f"{neurons} neurons: grouped matrix products need multiples of 8; the nearest"
    ):
        Form(neurons=neurons)


def convex(items: int, forms: int, seed: int, alike: bool) -> tuple[Tensor, Tensor]:
    """Damages that rise ever faster as bytes get fewer; steps of equal bytes, or not."""
    generator = torch.Generator().manual_seed(seed)
    if alike:
        sizes = torch.arange(forms, 0, -1).double().expand(items, forms).clone() * 16
    else:
        sizes = torch.randint(1, 9, (items, forms), generator=generator).double().flip(1).cumsum(1).flip(1)
    slopes = torch.rand(items, forms - 1, generator=generator, dtype=torch.float64).cumsum(1)
    steps = slopes * (sizes[:, :-1] - sizes[:, 1:])
    return torch.cat([torch.zeros(items, 1).double(), steps.cumsum(1)], dim=1), sizes


def best(damage: Tensor, sizes: Tensor, budget: float) -> float:
    """Of all choices there are."""
    items, forms = damage.shape
    found = float("inf")
    for choice in product(range(forms), repeat=items):
        place = torch.arange(items), torch.tensor(choice)
        if float(sizes[place].sum()) <= budget:
            found = min(found, float(damage[place].sum()))
    return found


def spent(values: Tensor, choice: Tensor) -> float:
    return float(values.gather(1, choice[:, None]).sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_equal_steps_are_spent_best(seed):
    damage, sizes = convex(4, 4, seed, alike=True)
    for budget in range(0, 280, 16):
        choice = allocate(damage, sizes, budget)
        if choice is None:
            assert budget < 64
            continue
        assert spent(sizes, choice) <= budget
        assert spent(damage, choice) == pytest.approx(best(damage, sizes, budget), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_uneven_steps_are_spent_within_one_step_of_the_best(seed):
    damage, sizes = convex(4, 4, seed, alike=False)
    worst = float((damage[:, 1:] - damage[:, :-1]).max())
    for share in (0.3, 0.45, 0.6, 0.8, 1.0):
        budget = share * float(sizes[:, 0].sum())
        choice = allocate(damage, sizes, budget)
        if choice is None:
            assert float(sizes[:, -1].sum()) > budget
            continue
        assert spent(sizes, choice) <= budget
        assert best(damage, sizes, budget) - 1e-12 <= spent(damage, choice) <= best(damage, sizes, budget) + worst


def test_any_damages_stay_within_the_budget():
    """Not convex, not sorted; only forms on the lower hull are chosen."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        damage = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
        sizes = torch.randint(1, 30, (2, 3, 6), generator=generator).double()
        least = float(sizes.min(-1).values.sum())
        for budget in (least, least + 7, least + 40):
            choice = allocate(damage, sizes, budget)
            assert choice is not None
            assert choice.shape == (2, 3)
            assert float(sizes.gather(-1, choice[..., None]).sum()) <= budget
        assert allocate(damage, sizes, least - 1) is None
        # with enough for all, the least harmful of each
        choice = allocate(damage, sizes, 1e9)
        assert choice is not None
        assert torch.equal(damage.gather(-1, choice[..., None])[..., 0], damage.amin(-1))


def test_equal_damage_takes_fewer_bytes():
    damage = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 2.0]]).double()
    sizes = torch.tensor([[9.0, 2.0, 5.0], [9.0, 8.0, 1.0]]).double()
    assert allocate(damage, sizes, 100.0).tolist() == [1, 1]


def test_slopes_that_round_alike():
    """Steps of one item are taken in their order, whatever their quotients round to."""
    sizes = torch.tensor([[49.0, 48.0, 45.0, 38.0, 21.0, 0.0]]).double().repeat(30, 1)
    slope = torch.rand(30, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    damage = slope * (49.0 - sizes) * (1 + 1e-16 * torch.arange(6))
    for budget in range(0, 30 * 49, 13):
        choice = allocate(damage, sizes, float(budget))
        assert choice is not None
        assert spent(sizes, choice) <= budget
