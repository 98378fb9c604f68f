"""What deepening could remove: against decompositions, finite differences, planted signals and noise."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from close import assert_close
from invented import made
from peft_pcgrow import find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.maps.removable import cross_fitted, polar, removable
from tiny import build, tokens

LABELS = torch.tensor([10.0, 20.0, 15.0, 5.0], dtype=torch.float64)
SIZE = {"down_proj": (6, 4)}


def by_svd(matrix):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-9 * s.max().clamp_min(1e-30)
    return (u * kept) @ v


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5), (4, 1)])
def test_polar_is_that_of_the_decomposition(shape):
    matrices = torch.randn(6, *shape, dtype=torch.float64)
    # of rank one, and zero
    matrices[1] = torch.outer(matrices[1][:, 0], matrices[1][0])
    matrices[2] = 0
    want = torch.stack([by_svd(matrix) for matrix in matrices])
    assert_close("polar", polar(matrices), want, "fp64 gradient")
    assert not polar(matrices)[2].any()


def test_cross_fitting_asks_each_fold_about_the_others_step():
    folds = torch.randn(4, 3, 6, 4, dtype=torch.float64)
    got = cross_fitted(folds, LABELS)
    for fold in range(4):
        for node in range(3):
            others = sum(folds[other, node] for other in range(4) if other != fold)
            want = (folds[fold, node] * by_svd(others)).sum() / LABELS[fold]
            assert float(got[fold, node]) == pytest.approx(float(want), rel=1e-10)


def test_one_fold_is_asked_about_itself():
    folds = torch.zeros(4, 2, 6, 4, dtype=torch.float64)
    folds[2] = torch.randn(2, 6, 4, dtype=torch.float64)
    labels = torch.tensor([0.0, 0, 8, 0], dtype=torch.float64)
    found = removable({"down_proj": folds[:, None]}, labels, SIZE)
    nuclear = torch.linalg.svdvals(folds[2]).sum(-1) / 8
    assert_close("nuclear norm", found.estimate[0], nuclear, "fp64 gradient")
    assert torch.isinf(found.error).all()
    assert found.interval[0].isinf().all()


def test_noise_drops_out_and_a_signal_stays():
    """1000 nodes of pure noise: the mean is about zero, the interval holds zero about 95 times of 100."""
    noise = torch.randn(4, 1, 1000, 6, 4, dtype=torch.float64)
    found = removable({"down_proj": noise}, LABELS, SIZE)
    in_sample = torch.linalg.svdvals(noise.sum(0)).sum(-1).mean() / LABELS.sum()
    assert abs(float(found.estimate.mean())) < 0.02 * float(in_sample)
    low, high = found.interval
    assert 0.9 < float(((low <= 0) & (high >= 0)).double().mean()) < 0.99
    signal = torch.randn(6, 4, dtype=torch.float64)
    planted = 100 * signal * LABELS[:, None, None, None, None] + noise
    found = removable({"down_proj": planted}, LABELS, SIZE)
    want = 100 * torch.linalg.svdvals(signal).sum()
    assert abs(float(found.estimate.mean() / want) - 1) < 0.01
    assert bool((found.interval[0] > 0).all())


def test_invariances():
    folds = torch.randn(4, 2, 5, 6, 4, dtype=torch.float64)
    plain = removable({"down_proj": folds}, LABELS, SIZE)
    order, nodes = torch.tensor([2, 0, 3, 1]), torch.randperm(5)
    again = removable({"down_proj": folds[order][:, :, nodes]}, LABELS[order], SIZE)
    assert_close("estimate", again.estimate, plain.estimate[:, nodes], "fp64 gradient")
    assert_close("error", again.error, plain.error[:, nodes], "fp64 gradient")
    double = removable({"down_proj": 2 * folds}, LABELS, SIZE)
    assert_close("scale", double.estimate, 2 * plain.estimate, "fp64 gradient")
    assert_close("density", plain.density, plain.estimate / 24, "fp64 gradient")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_resolutions_of_a_measured_map(name):
    emap = measure_errors(build(name, torch.float64), tokens(8).split(2), progress=False)
    whole, matrix = (emap.removable(resolution) for resolution in ("expert", "matrix"))
    assert_close("matrices add up", matrix.estimate.sum(-1), whole.estimate, "fp64 gradient")
    site = find_experts(build(name)).sites[0]
    sizes = {n: stack[0].numel() for n, stack in expert_stacks(site.base).items()}
    assert float(whole.parameters) == sum(sizes.values())
    assert matrix.names == ("gate_up_proj", "down_proj")
    gate_up = sizes["gate_up_proj"] + sizes.get("gate_up_proj_bias", 0)
    assert matrix.parameters.tolist() == [gate_up, sum(sizes.values()) - gate_up]
    sketched = measure_errors(build(name, torch.float64), tokens(8).split(2), progress=False, sketch_dim=16)
    assert torch.equal(sketched.removable("matrix").parameters, matrix.parameters)
    with pytest.raises(ValueError, match="unknown resolution 'layer'"):
        emap.removable("layer")


def test_a_small_step_removes_what_was_promised():
    """One text, one fold: the mean loss falls by eta times the estimate, to first order."""
    model, ids = build("qwen3_moe", torch.float64), tokens(1, 24)
    emap = measure_errors(model, [ids], progress=False)
    assert emap.removable().folds == 1

    def loss():
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1]
            return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    site = find_experts(model).sites[1]
    expert = int(emap.count[1].argmax())
    before, eta = loss(), 1e-5
    with torch.no_grad():
        for n, stack in expert_stacks(site.base).items():
            stack[expert] -= eta * polar(emap.gradient[n].sum(0)[1, expert])
    decrease = (before - loss()) / eta
    assert decrease == pytest.approx(float(emap.removable().estimate[1, expert]), rel=2e-3)


def planted(strengths, mastered=0.0):
    """A map whose nodes have signals of the given strengths; a floor of `mastered` everywhere."""
    signal = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    scale = torch.tensor(strengths, dtype=torch.float64) + mastered
    gradient = 250.0 * scale[None, :, :, None, None] * signal.expand(4, *scale.shape, 2, 3)
    count = torch.full(scale.shape, 100.0, dtype=torch.float64)
    return made(*scale.shape, gradient={"up_proj": gradient}, count=count, separation=None, loss=3000.0)


def test_verdicts_where_the_truth_is_known():
    nothing = planted([[1e-3] * 20] * 4)
    broken = planted([[1e-3] * 20, [1e-3] * 19 + [1.0], [1e-3] * 20, [0.9] + [1e-3] * 19])
    new = planted([[1.0] * 20] * 4)
    assert nothing.diagnosis.verdict == "covered"
    assert broken.diagnosis.verdict == "concentrated"
    assert broken.diagnosis.nodes[0] == (2, 19)
    assert broken.diagnose(planted([[1e-3] * 20] * 4)).verdict == "covered"  # by its loss, which is no higher
    assert new.diagnosis.verdict == "distributed"
    assert new.diagnosis.concentration >= 0.5
    # what was there before the damage does not count
    healthy = planted([[1.0] * 20] * 4)
    healthy.loss = 2000.0
    damaged = planted([[1.0] * 20, [1.0] * 19 + [2.0], [1.0] * 20, [1.0] * 20])
    assert damaged.diagnosis.verdict == "distributed"
    assert damaged.diagnose(healthy).verdict == "concentrated"
    assert damaged.diagnose(healthy).nodes == ((2, 19),)


@pytest.mark.slow
def test_a_damaged_expert_is_found():
    """A model that knows a text by heart; one expert's output is turned round."""
    model, ids = build("qwen3_moe"), tokens(8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    healthy = measure_errors(model, ids.split(2), progress=False)
    assert healthy.diagnosis.verdict == "covered"
    row, expert = divmod(int(healthy.count.argmax()), 8)
    with torch.no_grad():
        find_experts(model).sites[row].base.down_proj[expert] *= -1
    damaged = measure_errors(model, ids.split(2), progress=False)
    assert damaged.diagnosis.verdict != "covered"
    assert damaged.top(1, by="removable")[0].expert == expert
    assert damaged.diagnose(healthy).nodes[0] == (row, expert)
    # a text that it has never seen, in every fold; of random words that never come again nothing could be removed
    other = measure_errors(model, tokens(2, 16, seed=7).repeat(4, 1).split(2), progress=False)
    assert other.diagnosis.verdict != "covered"
    random = measure_errors(model, tokens(32, 16, seed=8).split(8), progress=False)
    assert random.removable().estimate.sum() < 0.1 * other.removable().estimate.sum()
