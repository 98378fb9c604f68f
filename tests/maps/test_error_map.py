"""Laws of the error map: what it sums, against autograd through the whole model in fp64."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from close import assert_close
from peft_pcgrow import ErrorMap, Locus, PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.maps.error_map import SUMS
from tiny import ARCHITECTURES, PAD, build, tokens


def measured(model, batches, **options):
    return measure_errors(model, batches, progress=False, **options)


def by_autograd(model, ids):
    """The same statistics from one graph through the whole model."""
    sites, seen = find_experts(model).sites, {}

    def keep(layer):
        def hook(module, args, output):
            output.retain_grad()
            seen[layer] = args[1], args[2], output

        return hook

    handles = [site.module.register_forward_hook(keep(site.layer)) for site in sites]
    model.eval().requires_grad_(True)
    logits = model(input_ids=ids).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    rows = []
    for site in sites:
        index, weight, output = seen[site.layer]
        norm = output.grad.norm(dim=-1)
        row = torch.zeros(5, site.experts, dtype=torch.float64)
        for token in range(index.shape[0]):
            for expert, p in zip(index[token].tolist(), weight[token].tolist(), strict=True):
                error = p * float(norm[token])
                row[:4, expert] += torch.tensor([1.0, p, error, error**2], dtype=torch.float64)
        row[4] = sum(stack.grad.flatten(1).square().sum(1) for stack in expert_stacks(site.base).values()) ** 0.5
        rows.append(row)
    return torch.stack(rows, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_autograd(name):
    model, ids = build(name, torch.float64), tokens()
    emap = measured(model, [ids])
    want = by_autograd(copy.deepcopy(model), ids)
    for row, field in enumerate((*SUMS, "coherent")):
        assert_close(field, getattr(emap, field), want[row], "fp64 gradient")
    assert emap.tokens == ids.numel()
    assert emap.labels == ids[:, 1:].numel()


def assert_same_map(one, other, kind="fp64 across batches"):
    for field in (*SUMS, "coherent"):
        assert_close(field, getattr(one, field), getattr(other, field), kind)
    assert (one.labels, one.tokens) == (other.labels, other.tokens)
    assert one.loss == pytest.approx(other.loss, rel=1e-7)


@pytest.mark.slow
def test_any_batch_split():
    model, ids = build("qwen3_moe", torch.float64), tokens(6)
    whole = measured(model, [ids])
    assert_same_map(measured(model, ids.split([1, 3, 2])), whole)
    assert_same_map(measured(model, [{"input_ids": ids[:4]}, ids[4:]]), whole)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model, ids = build("qwen3_moe", torch.float64), tokens(2, 10)
    padded = torch.full((2, 14), PAD)
    mask = torch.zeros_like(padded)
    place = slice(4, 14) if side == "left" else slice(0, 10)
    padded[:, place], mask[:, place] = ids, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    assert_same_map(measured(model, [batch]), measured(model, [ids]))


def test_labels_choose_what_is_predicted():
    """Masked labels add no loss; those tokens still route, and the errors they pass on still count."""
    model, ids = build("qwen3_moe", torch.float64), tokens(1, 12)
    prompt = ids.clone()
    prompt[:, :6] = -100
    emap = measured(model, [{"input_ids": ids, "labels": prompt}])
    assert emap.labels == 6
    assert emap.tokens == 12
    assert emap.count.sum() == 3 * 12 * 3
    late = measured(model, [{"input_ids": ids, "labels": ids.masked_fill(prompt != -100, -100)}])
    whole = measured(model, [ids])
    gradient = {name: emap.gradient[name] + late.gradient[name] for name in whole.gradient}
    for name, want in whole.gradient.items():
        assert_close(name, gradient[name], want, "fp64 across batches")


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing():
    model, ids = build("olmoe", torch.float64), tokens()
    plain = measured(model, [ids])
    model.gradient_checkpointing_enable()
    assert_same_map(measured(model.train(), [ids]), plain)


@pytest.mark.slow
def test_permuting_experts_permutes_the_map():
    model, ids = build("qwen3_moe", torch.float64), tokens()
    before = measured(model, [ids])
    order = torch.randperm(8)
    with torch.no_grad():
        for site in find_experts(model).sites:
            for p in (*expert_stacks(site.base).values(), site.router.weight):
                p.copy_(p[order].clone())
    after = measured(model, [ids])
    for field in (*SUMS, "coherent"):
        assert_close(field, getattr(after, field), getattr(before, field)[:, order], "fp64 across batches")


@pytest.mark.slow
def test_maps_add_up():
    model, ids = build("gpt_oss", torch.float64), tokens(6)
    parts = [measured(model, [part]) for part in ids.split(2)]
    whole = measured(model, [ids])
    assert_same_map(parts[0] + parts[1] + parts[2], whole)
    assert_same_map(parts[0] + (parts[2] + parts[1]), whole)


@pytest.mark.slow
def test_sketched_maps_add_up_and_estimate_the_norm():
    model, ids = build("qwen3_moe", torch.float64), tokens(6)
    sketched = measured(model, [ids], sketch_dim=16)
    halves = measured(model, [ids[:2]], sketch_dim=16) + measured(model, [ids[2:]], sketch_dim=16)
    assert_same_map(halves, sketched)
    exact = measured(model, [ids]).coherent.square().sum()
    assert_close("summed energy", sketched.coherent.square().sum(), exact, "sketch")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_bf16_map_is_close(implementation):
    """A map needs no precision: in bf16 nodes rank nearly as in fp32."""
    ids = tokens(8, 24)
    exact = measured(build("gpt_oss"), [ids])
    rounded = measured(build("gpt_oss", torch.bfloat16, implementation), [ids])
    for field in ("mass", "coherent"):
        pair = torch.stack([getattr(exact, field).flatten(), getattr(rounded, field).flatten()])
        ranks = pair.argsort(dim=1).argsort(dim=1).double()
        assert torch.corrcoef(ranks)[0, 1] > 0.95


@pytest.mark.slow
def test_max_tokens_stops_reading():
    read = []

    def batches():
        for seed in range(10):
            read.append(seed)
            yield tokens(2, 16, seed)

    emap = measured(build("qwen3_moe"), batches(), max_tokens=70)
    assert emap.tokens == 96
    assert len(read) == 3


def test_save_and_load(tmp_path):
    emap = measured(build("mixtral"), [tokens()])
    emap.save(tmp_path / "deep" / "map")
    emap.save(tmp_path / "deep" / "map")  # over itself
    back = ErrorMap.load(tmp_path / "deep" / "map")
    assert (back.layers, back.base, back.loss, back.labels, back.tokens) == (
        emap.layers, emap.base, emap.loss, emap.labels, emap.tokens,
    )  # fmt: skip
    for field in SUMS:
        assert torch.equal(getattr(back, field), getattr(emap, field))
    assert all(torch.equal(back.gradient[name], gradient) for name, gradient in emap.gradient.items())
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["map"]
    assert_same_map(back + emap, emap + emap)


@pytest.mark.slow
def test_map_of_a_grown_model_measures_the_bank():
    """Wrapped and untrained it is the base's map; grown nodes carry the gradient of their bank."""
    base, ids = build("qwen3_moe", torch.float64), tokens()
    plain = measured(base, [ids])
    model = get_peft_model(base, PCGrowConfig(locus={0: [1, 2], 2: [7]}))
    assert_same_map(measured(model, [ids]), plain)
    layer = model.base_model.tuner_layers()[0]
    layer.bank("default")["down_proj"].data[0].zero_()
    changed = measured(model, [ids])
    with model.disable_adapter():
        assert_same_map(measured(model, [ids]), plain)
    merged = model.merge_and_unload()
    assert_same_map(changed, measured(merged, [ids]))


def constructed(mass, loss=3.0, vocabulary=100):
    mass = torch.tensor(mass, dtype=torch.float64)
    ones = torch.ones_like(mass)
    base = {"vocabulary": vocabulary}
    return ErrorMap(tuple(range(len(mass))), ones, ones, mass, mass**2, {}, loss * 10, 10, 10, base)


def test_diagnosis_of_constructed_maps():
    flat = constructed([[1.0] * 10] * 4)
    peaked = constructed([[100.0, 1, 1, 1, 1, 1, 1, 1, 1, 1]] * 4)
    assert flat.diagnosis.verdict == "distributed"
    assert flat.diagnosis.concentration == 0.5
    assert peaked.diagnosis.verdict == "concentrated"
    assert peaked.diagnosis.concentration == 3 / 40  # 218 of 436: three of the four peaks pass one half
    mastered = constructed([[1.0] * 10] * 4, loss=0.4)
    assert mastered.diagnosis.verdict == "covered"
    assert mastered.diagnosis.covered_below == pytest.approx(0.1 * math.log(100))
    assert flat.diagnose(reference=constructed([[1.0] * 10] * 4, loss=3.1)).verdict == "covered"
    assert flat.diagnose(reference=mastered).verdict == "distributed"


def test_top_is_ordered_and_shares_add_up():
    emap = measured(build("qwen3_moe"), [tokens()])
    everything = emap.top(24)
    assert [node.error for node in everything] == sorted((node.error for node in everything), reverse=True)
    assert sum(node.share for node in everything) == pytest.approx(1)
    assert {(node.layer, node.expert) for node in everything} == {(l, e) for l in range(3) for e in range(8)}
    best = emap.top(1, by="frequency")[0]
    assert best.count == int(emap.count.max())
    assert best.weight == float(emap.weight[best.layer, best.expert])


@pytest.mark.slow
def test_text_and_picture_show_the_map(tmp_path):
    emap = measured(build("deepseek_v3"), [tokens()])
    text = str(emap)
    best = emap.top(1)[0]
    assert f"{best.layer}.{best.expert}" in text
    assert emap.diagnosis.verdict in text
    figure = emap.plot(tmp_path / "deep" / "map.png", locus=Locus({best.layer: [best.expert]}))
    assert (tmp_path / "deep" / "map.png").read_bytes().startswith(b"\x89PNG")
    cells, sums = figure.axes[:2]
    shown = torch.as_tensor(cells.images[0].get_array().filled(0.0))
    assert torch.allclose(shown, 100 * emap.mass / emap.mass.sum())
    (outline,) = [drawn for drawn in cells.collections if drawn.get_gid() == "locus"]
    corner = best.expert - 0.5, emap.layers.index(best.layer) - 0.5
    assert [tuple(each[0]) for each in outline.get_segments()].count(corner) == 2
    assert len(outline.get_segments()) == 4
    assert [tick.get_text() for tick in cells.get_yticklabels()] == ["1", "2", "3"]
    assert len(sums.patches) == 3
