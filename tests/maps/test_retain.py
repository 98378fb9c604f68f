"""What a map measured with retain text says of gates and nodes: recounted from what enters the experts modules."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import sigmoid, silu

from close import TOLERANCE, assert_all_close, assert_close
from peft_pcgrow import ErrorMap, find_experts, measure_errors
from peft_pcgrow.gates.directions import MomentSketch
from peft_pcgrow.gates.gate import CERTAIN, ENOUGH, GATE_RIDGE, LATELY, RATES
from peft_pcgrow.maps.error_map import SUMS
from peft_pcgrow.maps.fit_gates import is_held_out
from peft_pcgrow.maps.newborns import nodes_of
from tiny import PAD, build, domain, retain

TABLES = ("threshold", "recall", "false_positive")


def measured(model, ours, theirs, **options):
    return measure_errors(model, ours, retain=theirs, progress=False, gradients=False, **options)


def padded(ids, side):
    """The texts of a batch, each short of some tokens at one side."""
    mask = torch.ones_like(ids)
    for text in range(len(ids)):
        missing = 3 * text % 14
        mask[text, slice(0, missing) if side == "left" else slice(ids.shape[1] - missing, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def packed(ids):
    """Two or three texts to a row."""
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    positions[:, 10:] -= 10
    positions[::2, 17:] -= 7
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


KINDS = {
    "whole": lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    "left padding": lambda ids: padded(ids, "left"),
    "right padding": lambda ids: padded(ids, "right"),
    "packed": packed,
}
# model, window, rows
CASES = [
    ("qwen3_moe", 8, "whole"),
    ("qwen3_moe", 0, "left padding"),
    ("gpt_oss", 1, "right padding"),
    ("deepseek_v3", 8, "packed"),
]


@cache
def case(name, window, kind):
    """A model, 18 + 10 texts of each corpus in two batches, and their separation."""
    model = build(name)
    ours, theirs = ([KINDS[kind](words(n, seed=seed)) for seed, n in ((1, 18), (2, 10))] for words in (domain, retain))
    return model, ours, theirs, measured(model, ours, theirs, window=window).separation


@torch.no_grad()
def visits(model, batches):
    """For each layer with experts, of each text: (its number, inputs `[S, H]`, nodes `[S, K]`), no padding."""
    sites = find_experts(model).sites
    calls, found = [], [[] for _ in sites]
    handles = [
        site.module.register_forward_pre_hook(lambda module, args: calls.append((args[0], nodes_of(module, args))))
        for site in sites
    ]
    for batch in batches:
        batch = batch if isinstance(batch, dict) else KINDS["whole"](batch)
        calls.clear()
        model(**batch, use_cache=False)
        shape, mask = batch["input_ids"].shape, batch["attention_mask"].bool()
        for row, (x, index) in enumerate(calls):
            x, index = x.view(*shape, -1), index.view(*shape, -1)
            for text in range(shape[0]):
                starts = [0, shape[1]]
                if "position_ids" in batch:
                    starts = [*(batch["position_ids"][text] == 0).nonzero().flatten().tolist(), shape[1]]
                for first, end in pairwise(starts):
                    real = mask[text, first:end]
                    found[row].append((len(found[row]), x[text, first:end][real], index[text, first:end][real]))
    for handle in handles:
        handle.remove()
    return found


def log_ratios(separation, row, x):
    """log p(domain) - log p(retain) of a text so far, at each of its tokens, from the definition."""
    middle, distance, between, within = separation.law[row].double().tolist()
    scores, found = (x.double() @ separation.direction[row].double()).tolist(), []
    window = separation.facts["window"] or len(scores)
    for token in range(len(scores)):
        said = []
        for size in (window, min(window, LATELY)):
            inside = scores[max(0, token + 1 - size) : token + 1]
            mean, variance = sum(inside) / len(inside), between + within / len(inside)
            off = [(mean - middle + side * distance / 2) ** 2 for side in (1, -1)]
            said.append((off[0] - off[1]) / (2 * variance))
        certain = abs(said[1]) > CERTAIN
        found.append((max if said[1] > 0 else min)(said) if certain else said[0])
    return torch.tensor(found, dtype=torch.float64)


def held_out(separation, row, texts):
    """Log ratios `[N]` and experts `[N, K]` of the tokens of texts that are held out."""
    mine = [(log_ratios(separation, row, x), index) for number, x, index in texts if is_held_out(number)]
    return [torch.cat(parts) for parts in zip(*mine, strict=True)]


@pytest.mark.parametrize("sources", range(1, 9))
def test_sources_that_come_in_turn_are_fitted_and_measured_on(sources):
    """One text in four is held out, of the first four already, and of each source no less than half its share."""
    numbers = range(48 * sources)
    assert all(sum(map(is_held_out, numbers[place : place + 4])) == 1 for place in numbers[::4])
    for source in range(sources):
        assert 6 <= sum(map(is_held_out, numbers[source::sources])) <= 18


def rows_above(ratios, limits, slack):
    return (ratios[:, None] > limits + slack).sum(0)


@pytest.mark.slow
@pytest.mark.parametrize("setting", CASES, ids=str)
def test_rates_are_those_of_the_held_out_rows(setting):
    model, ours, theirs, separation = case(*setting)
    for corpus, table in ((ours, separation.recall), (theirs, separation.false_positive)):
        for row, texts in enumerate(visits(model, corpus)):
            ratios, index = held_out(separation, row, texts)
            # a row on a threshold may fall to either side of it, by the rounding of its score
            slack, limits = TOLERANCE["fp32"] * ratios.abs().max(), separation.threshold[row].double()
            for expert in range(table.shape[1]):
                chosen = ratios[(index == expert).any(dim=1)]
                chosen = chosen if len(chosen) else ratios
                got = (table[row, expert].double() * len(chosen)).round()
                least, most = (rows_above(chosen, limits, side * slack) for side in (1, -1))
                assert ((least <= got) & (got <= most)).all()
                assert (most - least).max() <= 2  # the row on the threshold, and one that happens to lie as near
                assert_close("a share of whole rows", table[row, expert], got / len(chosen), "fp32")
    assert separation.recall.std() > 0


@pytest.mark.slow
def test_nodes_without_held_out_rows_have_their_layers_rates():
    model, ours, theirs = build("gpt_oss"), domain(4, 4), retain(4, 4)
    separation = measured(model, [ours], [theirs]).separation
    for corpus, table in ((ours, separation.recall), (theirs, separation.false_positive)):
        for row, texts in enumerate(visits(model, [corpus])):
            ratios, index = held_out(separation, row, texts)
            unseen = torch.bincount(index.flatten(), minlength=8) == 0
            assert unseen.any()
            slack, limits = TOLERANCE["fp32"] * ratios.abs().max(), separation.threshold[row].double()
            got = (table[row, unseen].double() * len(ratios)).round()
            assert (rows_above(ratios, limits, slack) <= got).all()
            assert (got <= rows_above(ratios, limits, -slack)).all()
    assert separation.recall.max() > 0


@pytest.mark.parametrize("setting", CASES, ids=str)
def test_a_rate_bounds_what_passes_a_layer(setting):
    """Of N held-out retain tokens at most f N pass, and of those of each stage of a text (1, 2 and 3, 4 to 7, ...) that
    half of the texts reach; no lower threshold would do."""
    model, _, theirs, separation = case(*setting)
    rates = torch.tensor(RATES, dtype=torch.float64)
    for row, texts in enumerate(visits(model, theirs)):
        ratios, index = held_out(separation, row, texts)
        routed = torch.bincount(index.flatten(), minlength=8).double()
        passed = (separation.false_positive[row].double() * routed[:, None]).sum(0) / index.shape[1]
        limits, slack = separation.threshold[row].double(), TOLERANCE["fp32"] * ratios.abs().max()
        assert (passed.round() <= rates * len(ratios)).all()
        lengths = torch.tensor([len(x) for number, x, _ in texts if is_held_out(number)])
        places = torch.cat([torch.arange(1, n + 1) for n in lengths])
        tight = torch.zeros(len(rates), dtype=torch.bool)
        for first in (0, 1, 2, 4, 8, 16, 32):
            if not first or 2 * (lengths >= first).sum() >= len(lengths):
                stage = ratios[(places >= first) & (places < 2 * first)] if first else ratios
                assert (rows_above(stage, limits, slack) <= rates * len(stage)).all()
                tight |= rows_above(stage, limits, -slack) + 1 > rates * len(stage)
        assert tight.all()


@pytest.mark.slow
@pytest.mark.parametrize("setting", CASES, ids=str)
def test_rows_and_tokens_of_both_corpora(setting):
    model, ours, theirs, separation = case(*setting)
    for corpus, rows, name in ((ours, separation.domain_rows, "domain"), (theirs, separation.retain_rows, "retain")):
        seen = visits(model, corpus)
        want = [torch.bincount(torch.cat([index.flatten() for *_, index in texts]), minlength=8) for texts in seen]
        assert torch.equal(rows, torch.stack(want).double())
        assert separation.facts[f"{name}_tokens"] == sum(len(x) for _, x, _ in seen[0])


def running_means(x, window):
    """Means of the last tokens of one text, where there are enough of them to fit a direction on, or all it has."""
    enough = min(ENOUGH, window or ENOUGH, len(x))
    places = range(enough - 1, len(x))
    return [x[max(0, t + 1 - window) if window else 0 : t + 1].mean(0) for t in places]


@pytest.mark.slow
@pytest.mark.parametrize("setting", CASES, ids=str)
def test_directions_are_fitted_on_the_other_texts(setting):
    model, ours, theirs, separation = case(*setting)
    window = separation.facts["window"]
    for row, pair in enumerate(zip(visits(model, ours), visits(model, theirs), strict=True)):
        fitted = [[(x.double(), index) for number, x, index in texts if not is_held_out(number)] for texts in pair]
        features = [torch.stack([m for x, _ in texts for m in running_means(x, window)]) for texts in fitted]
        apart = [part - part.mean(0) for part in features]
        covariance = sum(part.mT @ part for part in apart) / sum(len(part) for part in apart)
        covariance += GATE_RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
        want = torch.linalg.solve(covariance, features[0].mean(0) - features[1].mean(0))
        assert_close("direction", separation.direction[row], want, "fp32 solve")
        middle, distance = separation.law[row, :2].double()
        for texts, side in zip(fitted, (1, -1), strict=True):
            scores = torch.cat([x @ separation.direction[row].double() for x, _ in texts])
            assert_close("mean score", middle + side * distance / 2, scores.mean(), "fp32 solve")


@pytest.mark.slow
def test_held_out_texts_do_not_touch_the_fit():
    ours, theirs = domain(8, seed=3), retain(8, seed=3)
    before = measured(build(), [ours], [theirs]).separation
    for corpus in (ours, theirs):
        others = [number for number in range(len(corpus)) if is_held_out(number)]
        corpus[others] = corpus[others].flip(1)
    after = measured(build(), [ours], [theirs]).separation
    assert_close("direction", after.direction, before.direction, "fp32 solve")
    assert_close("law", after.law, before.law, "fp32 solve")
    assert not torch.equal(after.threshold, before.threshold)
    assert not torch.equal(after.recall, before.recall)


def inner_by_hand(name, base, x, expert):
    if name == "gpt_oss":
        projected = x @ base.gate_up_proj[expert] + base.gate_up_proj_bias[expert]
        gate, up = projected[:, 0::2].clamp(max=7.0), projected[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * sigmoid(1.702 * gate)
    gate, up = (base.gate_up_proj[expert] @ x.mT).mT.split(base.down_proj.shape[2], dim=1)
    return silu(gate) * up


@pytest.mark.parametrize("setting", CASES[:3], ids=str)
@torch.no_grad()
def test_second_moments_are_those_of_all_retain_rows(setting):
    model, _, theirs, separation = case(*setting)
    assert separation.moment.keys() == separation.trace.keys() == {"gate_up_proj", "down_proj"}
    for row, (texts, site) in enumerate(zip(visits(model, theirs), find_experts(model).sites, strict=True)):
        x, index = (torch.cat(parts) for parts in list(zip(*texts, strict=True))[1:])
        for expert in range(site.experts):
            mine = x[(index == expert).any(dim=1)]
            for stack, rows in (
                ("gate_up_proj", mine),
                ("down_proj", inner_by_hand(setting[0], site.base, mine, expert)),
            ):
                want = rows.double().mT @ rows.double()
                assert_close(stack, separation.moment[stack][row, expert], want, "fp32")
                assert_close("trace", separation.trace[stack][row, expert], want.trace(), "fp32")


@pytest.mark.slow
def test_wide_inputs_keep_a_sketch_of_their_moment():
    model, ours, theirs, exact = case(*CASES[0])
    sketched = measured(model, ours, theirs, window=8, sketch_dim=12).separation
    for stack, width in (("gate_up_proj", 32), ("down_proj", 16)):
        want = exact.moment[stack] @ MomentSketch(12).matrix(width)
        assert_close(stack, sketched.moment[stack], want, "fp32")
    assert_all_close(sketched.trace, exact.trace, "fp32")
    # eight tenths of the rows' energy, kept off in as few directions as a sketch can tell
    v = sketched.directions(1, "gate_up_proj", [0, 5], 0.8)
    for directions, expert in zip(v, (0, 5), strict=True):
        held = torch.einsum("ik,ij,jk->", directions, exact.moment["gate_up_proj"][1, expert], directions)
        assert float(held / exact.trace["gate_up_proj"][1, expert]) > 0.8 - TOLERANCE["sketch"]


def assert_same_separation(one, other):
    assert one.facts == other.facts
    for rows in ("domain_rows", "retain_rows"):
        assert torch.equal(getattr(one, rows), getattr(other, rows))
    assert_all_close(one.moment, other.moment, "fp32")
    assert_all_close(one.trace, other.trace, "fp32")
    for name in ("direction", "law", *TABLES):
        assert_close(name, getattr(one, name), getattr(other, name), "fp32 solve")


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 4, 64])
def test_any_batch_split_gives_the_same_separation(window):
    model, ours, theirs = build(dtype=torch.float64), domain(16, 20), retain(12, 20)
    whole = measured(model, [ours], [theirs], window=window).separation
    parts = measured(model, ours.split([5, 1, 10]), theirs.split([2, 7, 3]), window=window).separation
    assert_same_separation(parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_the_same_separation(side):
    model = build(dtype=torch.float64)
    ours, theirs = ([words(7, 12, seed=1), words(9, 20, seed=2)] for words in (domain, retain))
    apart = measured(model, ours, theirs).separation

    def together(batches):
        ids, mask = torch.full((16, 20), PAD), torch.zeros(16, 20, dtype=torch.long)
        place = slice(8, 20) if side == "left" else slice(0, 12)
        ids[:7, place], mask[:7, place], ids[7:], mask[7:] = batches[0], 1, batches[1], 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return [{"input_ids": ids, "attention_mask": mask, "position_ids": positions}]

    assert_same_separation(measured(model, together(ours), together(theirs)).separation, apart)


@pytest.mark.slow
def test_short_texts_count_alike_in_any_batch():
    """Texts of fewer tokens than a direction is fitted on: what stands beside them in a batch must not matter."""
    model = build(dtype=torch.float64)
    short, ours = retain(8, 5, seed=4), [domain(8, 16, seed=4)]
    beside = padded(retain(16, 16, seed=5), "right")
    beside["input_ids"][:8, :5], beside["input_ids"][:8, 5:] = short, PAD
    beside["attention_mask"][:8] = (torch.arange(16) < 5).long()
    beside["attention_mask"][8:] = 1
    beside["input_ids"][8:] = retain(16, 16, seed=5)[8:]
    together = measured(model, ours, [beside]).separation
    apart = measured(model, ours, [short, retain(16, 16, seed=5)[8:]]).separation
    assert_close("direction", apart.direction, together.direction, "fp32 solve")


@pytest.mark.slow
def test_the_sums_are_those_of_a_map_without_retain_text():
    model, ours, theirs, _ = case(*CASES[0])
    model.train()
    with_gates, without = (measured(model, ours, texts) for texts in (theirs, None))
    assert model.training
    assert without.separation is None
    for field in SUMS:
        assert torch.equal(getattr(with_gates, field), getattr(without, field))
    assert (with_gates.loss, with_gates.tokens) == (without.loss, without.tokens)
    for site in find_experts(model).sites:
        assert not site.module._forward_pre_hooks
        assert not site.decoder_layer._forward_pre_hooks
    model.eval()


@pytest.mark.slow
def test_retain_text_is_cut_like_the_corpus():
    separation = measured(build(), domain(24).split(4), iter(retain(24).split(4)), max_tokens=200).separation
    assert (separation.facts["domain_tokens"], separation.facts["retain_tokens"]) == (288, 288)


def tensors_of(emap):
    gradient = {name: folds.transpose(0, 1) for name, folds in emap.gradient.items()}  # layers first, as all else
    return {**{name: getattr(emap, name) for name in SUMS}, **gradient, **emap.separation.to_tensors()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_save_load_and_restrict(name, tmp_path):
    emap = measure_errors(build(name), [domain()], retain=[retain()], window=5, progress=False)
    emap.save(tmp_path)
    back = ErrorMap.load(tmp_path)
    assert back.separation.facts == emap.separation.facts
    assert back.gradient.keys() == emap.gradient.keys()
    want, got = tensors_of(emap), tensors_of(back)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)
    assert set(want) > {"separation.moment.down_proj", "separation.trace.gate_up_proj", "separation.law"}
    rows = [2, 0]
    part = back.restrict(tuple(emap.layers[row] for row in rows))
    assert all(torch.equal(tensor, want[key][rows]) for key, tensor in tensors_of(part).items())
    assert part.separation.facts == emap.separation.facts
    part.save(tmp_path / "part")
    assert_all_close(tensors_of(ErrorMap.load(tmp_path / "part")), tensors_of(part), "fp64")


@pytest.mark.slow
def test_maps_with_gates_do_not_add_up():
    plain, gated = (measured(build(), [domain()], texts) for texts in (None, [retain()]))
    for one, other in ((gated, gated), (gated, plain), (plain, gated)):
        with pytest.raises(ValueError, match="maps with retain= cannot be added"):
            one + other
    assert (plain + plain).separation is None


@pytest.mark.parametrize(("ours", "theirs", "name"), [(3, 8, "domain"), (8, 3, "retain")])
def test_too_few_texts_are_refused(ours, theirs, name):
    with pytest.raises(ValueError, match=f"the {name} batches hold 3 texts"):
        measured(build(), [domain(ours)], [retain(theirs)])


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="or 'self'; got 'none'"):
        measured(build(), [domain()], "none")
    with pytest.raises(ValueError, match="window must be"):
        measured(build(), [domain()], [retain()], window=-1)
