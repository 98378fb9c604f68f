"""Settling by `direct`, and the hops of `relax`, against plain autograd through one layer at a time."""

import json
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.settling.descent import Probe, Way
from peft_pcgrow.settling.layer_run import LayerRun
from peft_pcgrow.settling.layer_stack import LayerStack
from tiny import ARCHITECTURES, LOCUS, backward, build, grown, logits, spawned, tokens, train, trainable

DEPTH = 5
DOUBLE = {"dtype": torch.float64}


@dataclass
class Chain:
    """Layers of one forward, each with an autograd graph of its own."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    experts: list[Tensor | None]
    delta: Tensor

    def vjp(self, index: int, error: Tensor) -> Tensor:
        return torch.autograd.grad(self.outputs[index], self.inputs[index], error, retain_graph=True)[0]

    def direct(self, depth: int) -> list[Tensor]:
        """Errors at the lowest input and at every output: the top `depth` layers exact, carried unchanged below."""
        errors = [self.delta]
        for index in range(len(self.inputs) - 1, -1, -1):
            exact = index >= len(self.inputs) - depth
            errors.insert(0, self.vjp(index, errors[0]) if exact else errors[0])
        return errors

    def relaxed(self, hops: int) -> list[list[Tensor]]:
        """The same after 0, 1, .. hops, by the formula."""
        total = len(self.inputs)
        found = [[self.delta] * (total + 1)]
        for _ in range(hops):
            old = found[-1]
            branches = [self.vjp(k, old[k + 1]) - old[k + 1] for k in range(total)]
            found.append([self.delta + sum(branches[l:], torch.zeros_like(self.delta)) for l in range(total + 1)])
        return found

    def gradients(self, model, errors: list[Tensor]) -> dict[str, Tensor]:
        """Gradients of what trains in the layers, by name, for these errors at their outputs."""
        layers, found = find_experts(model).layers, {}
        names = {id(p): name for name, p in trainable(model).items()}
        for layer, output, error in zip(layers, self.outputs, errors[1:], strict=True):
            mine = [p for p in layer.parameters() if p.requires_grad]
            if not mine:
                continue
            for p, gradient in zip(mine, torch.autograd.grad(output, mine, error, retain_graph=True), strict=True):
                found[names[id(p)]] = gradient
        return found


def chain(model, ids=None) -> Chain:
    """A forward by plain autograd, cut between layers; `model` must not settle by itself."""
    ids = tokens() if ids is None else ids
    tree = find_experts(model)
    inputs, outputs, seen = [], [], {}

    def cut(layer, args):
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[-1], *args[1:])

    handles = [layer.register_forward_pre_hook(cut) for layer in tree.layers]
    handles += [layer.register_forward_hook(lambda *a: outputs.append(a[-1])) for layer in tree.layers]
    for site in tree.sites:
        keep = lambda *a, layer=site.layer: seen.__setitem__(layer, a[-1])  # noqa: E731
        handles.append(site.module.register_forward_hook(keep))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    for handle in handles:
        handle.remove()
    (delta,) = torch.autograd.grad(loss, outputs[-1], retain_graph=True)
    return Chain(inputs, outputs, [seen.get(index) for index in range(len(inputs))], delta)


def control(**settings) -> tuple[torch.nn.Module, Chain]:
    model = grown(**DOUBLE, settle="backprop", **settings).train()
    return model, chain(model)


def deep(settle: str = "sweep", locus=None, **config):
    base = build(num_hidden_layers=DEPTH, **DOUBLE)
    return get_peft_model(base, PCGrowConfig(locus=locus or {0: [1, 4], 3: [0, 3, 7]}, settle=settle, **config)).train()


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_direct_is_its_closed_form(name, depth):
    settings = {"name": name, "locus": {site.layer: [1, 4, 6] for site in find_experts(build(name)).sites}}
    model, layers = control(**settings)
    want = layers.gradients(model, layers.direct(depth))
    got = backward(grown(**settings, **DOUBLE, settle="direct", settle_depth=depth))
    assert_all_close(got, want, "fp64 gradient")
    exact = backward(grown(**settings, **DOUBLE))
    assert (next(iter(got.values())) - next(iter(exact.values()))).norm() > 0.1 * next(iter(exact.values())).norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extra", [0, 4])
def test_direct_through_all_layers_is_sweep(dtype, extra):
    want = backward(grown(dtype=dtype, modules_to_save=["embed_tokens"]))
    got = backward(grown(dtype=dtype, modules_to_save=["embed_tokens"], settle="direct", settle_depth=3 + extra))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_newborns(name):
    model = spawned(name, torch.float64, settle="backprop").train()
    layers = chain(model)
    want = layers.gradients(model, layers.direct(1))
    model = spawned(name, torch.float64, settle="direct", settle_depth=1).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert_all_close({key: p.grad for key, p in trainable(model).items()}, want, "fp64 gradient")


class Watcher(Probe):
    """Keeps the errors at the experts' outputs, and the hops."""

    def __init__(self, model):
        self.sites = {site.layer: site for site in find_experts(model).sites}
        self.errors, self.hops = {}, []

    @contextmanager
    def watch(self, index):
        seen = []
        if index not in self.sites:
            yield lambda: seen
            return
        handle = self.sites[index].module.register_forward_hook(lambda *a: seen.append(a[-1]))
        yield lambda: seen
        handle.remove()

    def receive(self, index, errors):
        if errors:
            self.errors[index] = errors[0]

    def settled(self, hops):
        self.hops.append(hops)


def watched(model, way: Way) -> Watcher:
    probe = Watcher(model)
    with LayerStack(find_experts(model).layers, lambda: way, probe):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    return probe


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way(), Way("direct"), Way("direct", depth=2), Way("relax", tol=1e-14)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_probe_sees_the_errors(way, name):
    """Where nothing trains at all."""
    model = build(name, torch.float64).requires_grad_(False)
    layers = chain(model)
    errors = layers.direct(way.depth if way.settle == "direct" else len(layers.inputs))
    probe = watched(model, way)
    assert list(probe.errors) == list(reversed(probe.sites))
    for index, got in probe.errors.items():
        output = layers.outputs[index]
        (want,) = torch.autograd.grad(output, layers.experts[index], errors[index + 1], retain_graph=True)
        assert_close(f"experts {index}", got, want, "fp64 gradient")
    assert len(probe.hops) == (way.settle == "relax")


@pytest.mark.slow
def test_hops_are_counted():
    model = build(num_hidden_layers=DEPTH, **DOUBLE).requires_grad_(False)
    layers = chain(model)
    errors = layers.relaxed(DEPTH)
    counts = []
    for tol in (0.9, 0.3, 0.1, 0.01, 1e-4):
        (hops,) = watched(model, Way("relax", tol=tol)).hops
        for index, got in enumerate(hops):
            want = torch.zeros_like(got)
            for hop in range(1, DEPTH + 1):
                old, new = errors[hop - 1][index + 1], errors[hop][index + 1]
                # what the oracle computes again of an error that is exact differs in the last bits
                still = (new - old).norm(dim=-1) <= max(tol, 1e-10) * new.norm(dim=-1)
                want[(want == 0) & still.flatten()] = hop
            assert got.dtype == torch.long
            assert got.shape == (tokens().numel(),)
            assert torch.equal(got, want), index
        counts.append(torch.stack(hops))
    assert all((tight >= loose).all() for loose, tight in pairwise(counts))
    assert all((count[-1] == 1).all() and count.max() <= DEPTH for count in counts)
    assert counts[2].unique().numel() > 2


def spy(monkeypatch) -> list[tuple[int, bool]]:
    """Layers that run again, and whether with a graph for their input."""
    calls, again = [], LayerRun.again

    def noted(run, x, *extras):
        calls.append((run.index, x.requires_grad))
        return again(run, x, *extras)

    monkeypatch.setattr(LayerRun, "again", noted)
    return calls


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("depth", "locus", "calls"),
    [
        (0, {1: [1], 3: [0]}, [(3, False), (1, False)]),
        (1, {1: [1], 3: [0]}, [(4, True), (3, False), (1, False)]),
        (2, {4: [1]}, [(4, False)]),
        (4, {2: [1]}, [(4, True), (3, True), (2, False)]),
    ],
)
def test_direct_runs_what_trains(depth, locus, calls, kept, monkeypatch):
    """Of layers that no error goes through, only those whose rows are not sorted once: others keep their graphs."""
    model, seen = deep("direct", locus, settle_depth=depth), spy(monkeypatch)
    model.get_base_model().set_experts_implementation("eager" if kept else "batched_mm")
    stored, stack = [], model.base_model._stack
    settle = stack.settle
    monkeypatch.setattr(
        stack, "settle", lambda way, runs, *rest: (stored.append(len(runs)), settle(way, runs, *rest))[1]
    )
    backward(model)
    exact = DEPTH - depth
    assert seen == [(index, below) for index, below in calls if index >= exact or not kept]
    assert stored == [len(calls)]


def test_relax_leaves_out_what_is_exact(monkeypatch):
    """After hop t the top t layers have passed on exact errors; then each layer is watched once."""
    seen = spy(monkeypatch)
    watched(build(num_hidden_layers=DEPTH, **DOUBLE).requires_grad_(False), Way("relax", tol=1e-14))
    hops = [layer for lowest in (4, 3, 2, 1) for layer in range(lowest, 0, -1)]
    assert [layer for layer, _ in seen] == [*hops, 4, 3, 2, 1, 0]


def test_relax_trains_nothing():
    model = grown(settle="backprop").train()
    model.requires_grad_(True)
    with (
        pytest.raises(ValueError, match="counts hops for a probe and trains nothing: train by settle='sweep'"),
        LayerStack(find_experts(model).layers, lambda: Way("relax")),
    ):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()


def test_embeddings_below_the_layers():
    _, layers = control()
    carried = layers.direct(0)[0]
    got = backward(grown(**DOUBLE, settle="direct", modules_to_save=["embed_tokens"]))
    name, table = next((name, gradient) for name, gradient in got.items() if "embed_tokens" in name)
    want = torch.zeros_like(table).index_add_(0, tokens().flatten(), carried.flatten(0, 1))
    assert_close(name, table, want, "fp64 gradient")


def test_two_forwards_before_one_backward():
    """Each forward settles by itself, and in the way that it began with."""
    model = deep("direct", settle_depth=1)
    config = model.peft_config["default"]

    def losses() -> list[Tensor]:
        model.zero_grad()
        found = []
        for way, ids in (("direct", tokens(seed=1)), ("sweep", tokens(seed=2))):
            config.settle = way
            logits = model(input_ids=ids).logits[:, :-1]
            found.append(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        return found

    def found() -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in trainable(model).items()}

    better, worse = losses()
    (-logsigmoid(worse - 0.5 * better)).backward()
    got, slope = found(), torch.sigmoid(0.5 * better - worse).detach()
    parts = []
    for place, weight in ((0, 0.5 * slope), (1, -slope)):
        (weight * losses()[place]).backward()
        parts.append(found())
    assert_all_close(got, {name: parts[0][name] + parts[1][name] for name in got}, "fp64 gradient")


def test_gradients_accumulate():
    model = deep("direct")
    parts = []
    for seed in (1, 2):
        model.zero_grad()
        model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        parts.append({name: p.grad.clone() for name, p in trainable(model).items()})
    model(input_ids=tokens(seed=1), labels=tokens(seed=1)).loss.backward()
    got = {name: p.grad for name, p in trainable(model).items()}
    assert_all_close(got, {name: parts[0][name] + parts[1][name] for name in got}, "fp64 gradient")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, monkeypatch):
    plain, model = deep("direct", settle_depth=1), deep("direct", settle_depth=1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = spy(monkeypatch)
    want = backward(plain)
    # no graph is kept of a layer that is checkpointed
    assert [index for index, _ in calls] == [4]
    assert_all_close(backward(model), want, "fp64 gradient")
    assert [index for index, _ in calls] == [4, 4, 3, 0]


def test_config_round_trip(tmp_path):
    model = grown(settle="direct", settle_depth=2)
    model.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    loaded.inference_mode, loaded.auto_mapping = False, None
    assert loaded == model.peft_config["default"]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    del written["settle_depth"]  # as before there was this setting
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    old = PeftConfig.from_pretrained(tmp_path)
    assert (old.settle, old.settle_depth) == ("direct", 0)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"settle": "relax", "settle_tol": 0.1}, {"settle": "direct", "settle_tol": 0.01}])
def test_an_adapter_from_before_relax_went(settings, tmp_path):
    """It loads; to relax, which it did, is to sweep from now on, and is said once."""
    model = grown()
    train(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with warnings.catch_warnings(record=True) as said:
        loaded = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
        found = PeftConfig.from_pretrained(tmp_path)
    texts = {str(each.message) for each in said}
    relaxed = settings["settle"] == "relax"
    assert [text for text in texts if "settle" in text] == [text for text in texts if "no longer trains" in text]
    assert any("no longer trains" in text for text in texts) == relaxed
    assert torch.equal(logits(loaded), logits(model))
    config = loaded.peft_config["default"]
    assert config.settle == found.settle == ("sweep" if relaxed else "direct")
    assert "settle_tol" not in config.to_dict()
    assert bool(backward(loaded))


@pytest.mark.parametrize("depth", [-1, 1.5, True, "two", None])
def test_depth_is_a_number_of_layers(depth):
    with pytest.raises(ValueError, match=r"settle_depth must be a whole number from 0 to \d+, got"):
        PCGrowConfig(locus=LOCUS, settle_depth=depth)


@pytest.mark.parametrize("tol", [0, 0.0, 1.0, -0.1, float("nan"), "a tenth", None, True])
def test_tolerance_is_a_share(tol):
    with pytest.raises(ValueError, match=r"settle_tol must be a share in \(0, 1\), got"):
        Way("relax", tol=tol)


def test_unknown_way():
    with pytest.raises(ValueError, match="unknown way to settle: 'backprop'; choose from sweep, direct, relax"):
        Way("backprop")


def test_adapters_settle_in_one_way():
    """Settings of another way make no difference; backprop in any of them goes for all."""

    def both(first: dict, second: dict):
        model = grown(**DOUBLE, **first)
        model.add_adapter("second", PCGrowConfig(locus={0: [6]}, **second))
        model.base_model.set_adapter(["default", "second"])
        return backward(model)

    shallow, deeper = ({"settle": "direct", "settle_depth": depth} for depth in (0, 1))
    for other in ({}, deeper):
        with pytest.raises(ValueError, match=r"settle in different ways \(default: Way.*second: Way.*the same settle"):
            both(shallow, other)
    both(deeper, deeper)
    want = both({}, {"settle_depth": 2})
    assert_all_close(both({"settle": "backprop"}, {"settle": "direct"}), want, "fp64 gradient")
