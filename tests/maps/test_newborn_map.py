"""A map shows every node that computes rows, newborns included."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from test_retain import held_out, rows_above, visits
from torch.nn.functional import cross_entropy

from close import TOLERANCE, assert_close
from peft_pcgrow import ErrorMap, Locus, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.gates.gate import RATES
from peft_pcgrow.maps.error_map import SUMS
from peft_pcgrow.maps.fit_gates import is_held_out
from tiny import DOMAIN_WORDS, EXPERTS, LOCUS, build, domain, gate_passes, mixed, retain, spawned, train, words

NODES = tuple((layer, donor, "default") for layer, donors in LOCUS.items() for donor in donors)


def measured(model, **options):
    return measure_errors(model, [mixed(seed=50), mixed(seed=60)], progress=False, **options)


def trained(**changes) -> PeftModel:
    model = spawned(dtype=torch.float64, autocast=False, gate_fpr=0.2, **changes)
    train(model, texts=domain)
    return model


@torch.no_grad()
def rows_of(model, ids):
    """Rows that the newborns take, by node: from the gate's definition, token by token."""
    found, handles = dict.fromkeys(NODES, 0), []

    def look(layer, args):
        passes = gate_passes(layer, "default", args[0].view(*ids.shape, -1), torch.ones_like(ids).bool()).view(-1, 1)
        for donor in LOCUS[layer.layer_index]:
            found[layer.layer_index, donor, "default"] += int((passes & (args[1] == donor)).sum())

    for layer in model.base_model.tuner_layers():
        handles.append(layer.register_forward_pre_hook(look))
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "direct", "relax"])
def test_rows_belong_to_who_computes_them(settle):
    model = trained()
    emap = measured(model, settle=settle)
    assert emap.newborns.nodes == NODES
    rows = [rows_of(model, mixed(seed=seed)) for seed in (50, 60)]
    assert emap.newborns.count.tolist() == [rows[0][node] + rows[1][node] for node in NODES]
    assert 0 < emap.newborns.count.sum() < emap.count.sum()


@pytest.mark.slow
def test_all_nodes_hold_the_sums_of_all_rows():
    """The donors' sums plus their newborns' are those of a map in which only routing counts."""
    model = trained()
    emap = measured(model)
    for layer in model.base_model.tuner_layers():
        layer.nodes_of = lambda hidden, index: index
    routed = measured(model)
    statistics = dict(zip(SUMS, ("frequency", "gate", "error", "square"), strict=True))
    for name, statistic in statistics.items():
        assert_close(name, emap.with_newborns(statistic), getattr(routed, name), "fp64 across batches")
        assert_close(name, emap.scores(statistic).sum(), getattr(routed, name).sum(), "fp64 across batches")


@pytest.mark.slow
def test_gradients_are_those_of_the_bank():
    """Against autograd through the whole model in fp64."""
    model = trained(settle="backprop")
    ids = mixed(seed=50)
    emap = measure_errors(model, [ids], progress=False)
    model.train().requires_grad_(True).zero_grad()
    logits = model(input_ids=ids).logits[:, :-1]  # the model's own loss rounds to fp32
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    sites = {site.layer: site for site in find_experts(model).sites}
    for place, (layer, donor, adapter) in enumerate(NODES):
        tuner, row = sites[layer].module, emap.layers.index(layer)
        for name, bank in tuner.bank(adapter).items():
            want = bank.grad[tuner.grown[adapter].index(donor)]
            got = emap.newborns.gradient[name][:, place].sum(0)
            assert_close(name, got, want, "fp64 gradient")
            base = expert_stacks(tuner.base_layer)[name].grad[donor]
            assert_close(name, emap.gradient[name][:, row, donor].sum(0), base, "fp64 gradient")
    assert emap.born.coherent.shape == (1, len(NODES))
    both = torch.stack([emap.with_newborns("removable"), emap.removable().estimate])
    assert (both[0] - both[1]).count_nonzero() == len(NODES)


@pytest.mark.slow
def test_maps_with_newborns_are_kept_added_and_cut(tmp_path):
    model = trained()
    emap = measured(model, checkpoint=tmp_path / "so far", checkpoint_every=1)
    emap.save(tmp_path / "map")
    back = ErrorMap.load(tmp_path / "map")
    resumed = measured(model, checkpoint=tmp_path / "so far")
    for other in (back, resumed):
        assert other.newborns.nodes == emap.newborns.nodes
        for name, tensor in emap.newborns.tensors().items():
            assert torch.equal(other.newborns.tensors()[name], tensor)
    twice = emap + back
    assert torch.equal(twice.newborns.mass, 2 * emap.newborns.mass)
    upper = emap.restrict((2,))
    assert upper.newborns.nodes == NODES[2:]
    assert torch.equal(upper.newborns.count, emap.newborns.count[2:])
    base = measured(build(dtype=torch.float64))
    with pytest.raises(ValueError, match="with other weights, or with other adapters in use"):
        emap + base
    with pytest.raises(ValueError, match="other newborns"):
        replace(emap, run={}) + replace(base, run={})  # as saved by versions that noted no weights
    with model.disable_adapter(), pytest.raises(ValueError, match="other weights"):
        measured(model, checkpoint=tmp_path / "so far")


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(tmp_path):
    model, batches = trained(), [mixed(seed=seed) for seed in range(6)]
    whole = measure_errors(model, batches, progress=False)

    def interrupted():
        yield from batches[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_errors(model, interrupted(), progress=False, checkpoint=tmp_path, checkpoint_every=1)
    resumed = measure_errors(model, batches, progress=False, checkpoint=tmp_path)
    for name, tensor in whole.newborns.tensors().items():
        assert torch.equal(resumed.newborns.tensors()[name], tensor)


@pytest.mark.slow
def test_without_the_adapter_there_are_none():
    model = trained()
    with model.disable_adapter():
        emap = measured(model)
    assert not emap.newborns.nodes
    plain = measured(build(dtype=torch.float64))
    for name in SUMS:
        assert_close(name, getattr(emap, name), getattr(plain, name), "fp64 across batches")


@pytest.mark.slow
def test_what_is_shown(tmp_path):
    model = trained()
    emap = measured(model)
    everything = emap.top(100)
    assert len(everything) == emap.count.numel() + len(NODES)
    named = {(n.layer, n.expert, n.adapter): n.count for n in everything if n.adapter}
    assert named == dict(zip(NODES, emap.newborns.count.int().tolist(), strict=True))
    assert sum(node.share for node in everything) == pytest.approx(1)
    largest = max((n for n in everything if n.adapter), key=lambda n: n.error)
    assert largest.name == f"{largest.layer}.{largest.expert} newborn of 'default'"
    assert "Newborns: 5 of 'default' compute" in str(emap)
    table = emap.to_pandas()
    assert len(table) == len(everything)
    assert table["count"].sum() == int(emap.count.sum() + emap.newborns.count.sum())
    assert set(table.adapter) == {"", "default"}
    before = measured(build(dtype=torch.float64))
    emap.page(tmp_path / "map.html", before=before)
    assert "computed by newborns" in (tmp_path / "map.html").read_text()
    # donors are grown, whether anybody names them or not
    assert torch.equal(emap.lifecycle(before, Locus(LOCUS)), emap.lifecycle(before))
    assert emap.scalars()["pcgrow/error_per_label"] == pytest.approx(float(emap.scores().sum()) / emap.labels)


@pytest.mark.slow
def test_gates_are_measured_on_the_rows_of_each_node():
    """Recall and rows of a second gate: at a donor on what its newborn leaves, at the newborn on what it takes."""
    model = trained()
    texts = domain(64, seed=1)
    emap = measure_errors(model, [texts], retain=[retain(64, seed=1)], window=8, gradients=False, progress=False)
    rows = rows_of(model, texts)
    assert emap.separation.newborns["domain_rows"].tolist() == [rows[node] for node in NODES]
    total = emap.separation.domain_rows.sum() + emap.separation.newborns["domain_rows"].sum()
    assert total == 3 * 3 * texts.numel()
    assert torch.equal(emap.newborns.count, emap.separation.newborns["domain_rows"])


@pytest.mark.slow
def test_a_rate_bounds_what_passes_of_what_newborns_compute():
    """A domain much like an earlier one, which is among the retain text: newborns of newborns take no more of it."""
    model, (first, last) = trained(), DOMAIN_WORDS
    alike = words(last - (last - first) // 3, last + (last - first) // 2, 64, 24, 9)
    theirs = torch.cat([retain(96, seed=1), domain(32, seed=1)])[torch.randperm(128)]
    separation = measure_errors(model, [alike], retain=[theirs], window=8, gradients=False, progress=False).separation
    seen = visits(model, [theirs])
    told = 0
    for row, texts in enumerate(seen):
        ratios, nodes = held_out(separation, row, texts)
        taken = (nodes >= EXPERTS).any(dim=1)
        limits, slack = separation.threshold[row].double(), TOLERANCE["fp32"] * ratios.abs().max()
        assert (limits[1:] >= limits[:-1]).all()
        places = torch.cat([torch.arange(1, len(x) + 1) for number, x, _ in texts if is_held_out(number)])
        for first, end in ((1, 25), (1, 2), (2, 4), (4, 8), (8, 16), (16, 25)):
            learned = ratios[taken & (places >= first) & (places < end)]
            rates = torch.tensor([rate for rate in RATES if rate * len(learned) >= 1], dtype=torch.float64)
            assert (rows_above(learned, limits[: len(rates)], slack) <= rates * len(learned)).all()
            told += len(rates)
    assert told > 100


def test_an_adapter_named_twice_is_active_once():
    model = spawned()
    model.base_model.set_adapter(["default", "default"])
    assert model.active_adapters == ["default"]
    found = {layer.layer_index: layer.newborns for layer in model.base_model.tuner_layers()}
    assert found == {layer: [("default", donor) for donor in donors] for layer, donors in LOCUS.items()}
