"""What deepening could remove: against decompositions, finite differences, planted signals and noise."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from close import assert_close
from invented import made
from peft_pcgrow import find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks, stack_layouts
from peft_pcgrow.architectures.layout import StackLayout
from peft_pcgrow.maps.removable import cross_fitted, polar, removable
from tiny import ARCHITECTURES, build, tokens

LABELS = torch.tensor([10.0, 20.0, 15.0, 5.0], dtype=torch.float64)
DOWN = {"down_proj": StackLayout(1)}
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
    found = removable({"down_proj": folds[:, None]}, labels, DOWN, SIZE)
    nuclear = torch.linalg.svdvals(folds[2]).sum(-1) / 8
    assert_close("nuclear norm", found.estimate[0], nuclear, "fp64 gradient")
    assert torch.isinf(found.error).all()
    assert found.interval[0].isinf().all()


def test_noise_drops_out_and_a_signal_stays():
    """1000 nodes of pure noise: the mean is about zero, the interval holds zero about 95 times of 100."""
    noise = torch.randn(4, 1, 1000, 6, 4, dtype=torch.float64)
    found = removable({"down_proj": noise}, LABELS, DOWN, SIZE)
    in_sample = torch.linalg.svdvals(noise.sum(0)).sum(-1).mean() / LABELS.sum()
    assert abs(float(found.estimate.mean())) < 0.02 * float(in_sample)
    low, high = found.interval
    assert 0.9 < float(((low <= 0) & (high >= 0)).double().mean()) < 0.99
    signal = torch.randn(6, 4, dtype=torch.float64)
    planted = 100 * signal * LABELS[:, None, None, None, None] + noise
    found = removable({"down_proj": planted}, LABELS, DOWN, SIZE)
    want = 100 * torch.linalg.svdvals(signal).sum()
    assert abs(float(found.estimate.mean() / want) - 1) < 0.01
    assert bool((found.interval[0] > 0).all())


def test_invariances():
    folds = torch.randn(4, 2, 5, 6, 4, dtype=torch.float64)
    plain = removable({"down_proj": folds}, LABELS, DOWN, SIZE)
    order, nodes = torch.tensor([2, 0, 3, 1]), torch.randperm(5)
    again = removable({"down_proj": folds[order][:, :, nodes]}, LABELS[order], DOWN, SIZE)
    assert_close("estimate", again.estimate, plain.estimate[:, nodes], "fp64 gradient")
    assert_close("error", again.error, plain.error[:, nodes], "fp64 gradient")
    double = removable({"down_proj": 2 * folds}, LABELS, DOWN, SIZE)
    assert_close("scale", double.estimate, 2 * plain.estimate, "fp64 gradient")
    assert_close("density", plain.density, plain.estimate / 24, "fp64 gradient")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_neurons_cover_each_neuron_once(name):
    """A stack whose entries are the numbers of their neurons, by the meaning of the forward pass, splits by number."""
    model = build(name, torch.float64)
    base = find_experts(model).sites[-1].base
    layouts, stacks = stack_layouts(base), expert_stacks(base)
    x = torch.randn(3, base.hidden_dim if hasattr(base, "hidden_dim") else model.config.hidden_size).double()
    index, weight = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.float64)
    width = stacks["down_proj"].shape[1 if base.is_transposed else 2]
    for block in (width, width // 2, 2):
        # what is left with only block 1's weights does not change when all others do
        count = width // block
        for chosen in {0, count - 1}:
            outputs = []
            for filling in (0.0, 7.0):
                with torch.no_grad():
                    kept = {n: stack.clone() for n, stack in stacks.items()}
                    for n, stack in stacks.items():
                        if layouts[n].neurons is None:
                            continue
                        matrix = stack[0].reshape(stack.shape[1], -1)
                        split = layouts[n].split(matrix, block)
                        assert split.shape[0] == count
                        assert split.numel() == matrix.numel()
                        mask = _mask_of(layouts[n], matrix.shape, block, chosen)
                        keep = mask if n != "down_proj" else torch.ones_like(mask)
                        filled = torch.where(keep, matrix, torch.full_like(matrix, filling))
                        if n == "down_proj":
                            filled = torch.where(mask, matrix, torch.zeros_like(matrix))
                        stack[0] = filled.reshape(stack[0].shape)
                    outputs.append(base(x, index, weight))
                    for n, stack in stacks.items():
                        stack.copy_(kept[n])
            assert torch.equal(*outputs) if count > 1 else True


def _mask_of(layout, shape, block, chosen):
    """Entries of a slice that `split` puts into one block."""
    numbers = torch.arange(shape[0] * shape[1], dtype=torch.float64).view(shape)
    mask = torch.zeros(shape, dtype=torch.bool).flatten()
    mask[layout.split(numbers, block)[chosen].flatten().long()] = True
    return mask.view(shape)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_resolutions_of_a_measured_map(name):
    emap = measure_errors(build(name, torch.float64), tokens(8).split(2), progress=False)
    whole, matrix, neurons = (emap.removable(resolution, 4) for resolution in ("expert", "matrix", "neurons"))
    assert_close("matrices add up", matrix.estimate.sum(-1), whole.estimate, "fp64 gradient")
    site = find_experts(build(name)).sites[0]
    sizes = {n: stack[0].numel() for n, stack in expert_stacks(site.base).items()}
    assert float(whole.parameters) == sum(sizes.values())
    assert matrix.names == ("gate_up_proj", "down_proj")
    gate_up = sizes["gate_up_proj"] + sizes.get("gate_up_proj_bias", 0)
    assert matrix.parameters.tolist() == [gate_up, sum(sizes.values()) - gate_up]
    assert neurons.estimate.shape == (*whole.estimate.shape, 4)
    assert float(neurons.parameters) * 4 == sum(sizes.values()) - sizes.get("down_proj_bias", 0)
    sketched = measure_errors(build(name, torch.float64), tokens(8).split(2), progress=False, sketch_dim=16)
    assert float(sketched.removable("neurons", 4).parameters) == float(neurons.parameters)
    with pytest.raises(ValueError, match=r"block=5 does not divide the experts' 16 intermediate"):
        emap.removable("neurons", 5)
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
