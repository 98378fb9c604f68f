"""Planning: what calibration notes, what is predicted, budgets, what is refused; and nothing is changed by it."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import architectures
from close import assert_close
from pcgrow_kernels import lowbit
from peft_pcgrow import compress, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks, first_matrix, matrices, neuron_places
from peft_pcgrow.architectures.fingerprint import describe_base
from peft_pcgrow.compress.calibrate import Calibration, calibrate
from peft_pcgrow.compress.candidates import candidates, check_whole, forms_of
from peft_pcgrow.compress.compression_plan import CompressionPlan
from peft_pcgrow.compress.skip import skip_damage
from peft_pcgrow.maps import batches
from peft_pcgrow.packed.forms import WHOLE, Form, form_bytes
from peft_pcgrow.say import ends
from tiny import ARCHITECTURES, EXPERTS, HIDDEN, assert_same, build, domain, grown, retain, snapshot, tokens

pytestmark = pytest.mark.slow

METHODS = [
    ("quantize",),
    ("thin",),
    ("quantize", "thin"),
    ("quantize", "thin", "sparsify", "skip"),
    ("sparsify", "thin"),
]


def padded(ids: Tensor) -> dict[str, Tensor]:
    """Two of the texts are shorter, one at its beginning."""
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def texts() -> dict[str, list]:
    return {"domain": [padded(domain(3, 10))], "retain": [padded(retain(2, 8)), retain(2, 12, seed=1)]}


def plain(model: nn.Module, batch: dict[str, Tensor] | Tensor) -> tuple[float, int, dict[int, dict[str, Tensor]]]:
    """Loss, labels and what enters and leaves the experts, by autograd through the whole model; padding left out."""
    given = batch if isinstance(batch, dict) else {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    mask = given["attention_mask"].bool()
    target = given["input_ids"].clone()
    target[:, 1:][~(mask[:, 1:] & mask[:, :-1])] = -100
    seen, handles = {}, []

    def look(layer: int, kind: str):
        def hook(module, args, kwargs, output):
            output = output[0] if isinstance(output, tuple) else output
            output.retain_grad()
            seen.setdefault(layer, {})[kind] = (args[0] if args else kwargs["hidden_states"], *args[1:], output)

        return hook

    for site in find_experts(model).sites:
        handles.append(site.base.register_forward_hook(look(site.layer, "experts"), with_kwargs=True))
        handles.append(site.decoder_layer.register_forward_hook(look(site.layer, "layer"), with_kwargs=True))
    logits = model(**given, use_cache=False).logits[:, :-1]
    for handle in handles:
        handle.remove()
    loss = cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    keep, found = mask.flatten(), {}
    for layer, each in seen.items():
        x, index, weight, y = each["experts"][0], each["experts"][1], each["experts"][2], each["experts"][-1]
        before, after = each["layer"][0], each["layer"][-1]
        found[layer] = {
            "x": x.detach()[keep],
            "index": index[keep],
            "weight": weight.detach()[keep],
            "error": y.grad.view(-1, HIDDEN)[keep],
            "skipped": ((before - after) * after.grad).detach().sum(-1).flatten()[keep],
        }
    return float(loss.detach()), int((target[:, 1:] != -100).sum()), found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_calibration_is_what_autograd_finds(name):
    model, given = build(name, torch.float64), texts()
    found = calibrate(model, given, progress=False)
    assert found.names == ("domain", "retain")
    want = {key: [plain(model, batch) for batch in batches] for key, batches in given.items()}
    for place, key in enumerate(given):
        total, labels = (sum(each[i] for each in want[key]) for i in range(2))
        assert found.labels[place] == labels
        assert found.losses[place] == pytest.approx(total / labels, rel=1e-12)
    assert batches.losses(model, found.batches) == pytest.approx(found.losses, rel=1e-12)
    pieces = [each[2] for batches in want.values() for each in batches]
    assert found.layers.keys() == pieces[0].keys()
    for layer, sample in found.layers.items():
        joined = {key: torch.cat([piece[layer][key] for piece in pieces]) for key in pieces[0][layer]}
        assert torch.equal(sample.index, joined["index"])
        for key in ("x", "weight", "error", "skipped"):
            assert_close(f"{layer} {key}", getattr(sample, key), joined[key], "fp64 gradient")
        counts = [10 * 3 - 8, 8 * 2 - 8, 24]
        assert torch.equal(sample.text, torch.tensor([0] * counts[0] + [1] * (counts[1] + counts[2])))
        assert sample.row.unique().tolist() == list(range(7))


def test_max_tokens_ends_with_a_batch():
    found = calibrate(build(), {"retain": (retain(2, 8, seed) for seed in range(5))}, max_tokens=20, progress=False)
    assert len(found.layers[0].x) == 32


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v4"])
def test_skipping_is_the_derivative_by_how_much_is_left_out(name):
    """First order: of the loss by t where a layer adds (1 - t) of its update, in all streams. Second: by token."""
    model = build(partial(architectures.build, name) if name == "deepseek_v4" else name, torch.float64)
    found = calibrate(model, {"retain": [tokens()]}, progress=False)
    for site in find_experts(model).sites:
        share = torch.zeros((), dtype=torch.float64, requires_grad=True)
        handle = site.decoder_layer.register_forward_hook(lambda m, args, out, t=share: out + t * (args[0] - out))
        # the model's own loss, like its routers, is in fp32
        logits = model(input_ids=tokens(), use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, tokens()[:, 1:].flatten())
        handle.remove()
        (slope,) = torch.autograd.grad(loss, share)
        each = found.layers[site.layer].skipped
        assert_close("first order", each.sum() / found.labels[0], slope, "fp64 across batches")
        want = slope + each.square().sum() / (2 * found.labels[0])
        assert_close("damage", skip_damage(found, site.layer), want[None], "fp64 across batches")


def written(base: nn.Module, data: dict[str, list[Tensor]], form: Form, kept: Tensor | None, expert: int) -> nn.Module:
    """A copy of the module in which one expert is in a form: matrices of full size, removed neurons silenced."""
    module = copy.deepcopy(base)
    first = first_matrix(base)
    for name in matrices(base):
        stack = expert_stacks(module)[name].data
        whole = stack[expert].mT if base.is_transposed else stack[expert]
        rows, columns = torch.arange(whole.shape[0]), torch.arange(whole.shape[1])
        if form.neurons is not None and name == first:
            rows = neuron_places(base, name, kept)[1]
        elif form.neurons is not None:
            columns = kept
        matrix = lowbit.decode(data[name][expert], len(rows), len(columns), form.width, form.sparsity, torch.float32)
        # a view: of what neurons do that are gone, nothing comes out
        if name == "down_proj":
            whole[:] = 0
        whole[rows[:, None], columns] = matrix.to(whole.dtype)
    return module


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_damage_from_its_definition(name):
    """Each form put into a copy of the experts, errors of each token as calibrated; by text."""
    model = build(name, torch.float64)
    found = calibrate(model, texts(), progress=False)
    site = find_experts(model).sites[1]
    sample = found.layers[site.layer]
    forms = (WHOLE, Form(4), Form(2), Form(3, 8), Form(neurons=8), Form(sparsity="half"), Form(neurons=0))
    made = candidates(site.base, sample, forms, 2)
    assert made.bytes.tolist() == [form_bytes(site.base, form) for form in forms]
    before = site.base(sample.x, sample.index, sample.weight).detach()
    for place, form in enumerate(forms):
        for expert in range(EXPERTS):
            if form.neurons == 0:
                module, weight = site.base, sample.weight.masked_fill(sample.index == expert, 0.0)
            else:
                kept = made.kept[form][expert] if form.neurons is not None else None
                module = site.base if form == WHOLE else written(site.base, made.data[form], form, kept, expert)
                weight = sample.weight
            change = (module(sample.x, sample.index, weight) - before).detach()
            along, size = (change * sample.error).sum(-1), change.square().sum(-1)
            error = sample.error.square().sum(-1)
            p = (sample.weight * (sample.index == expert)).sum(-1)
            for text in range(2):
                here = sample.text == text
                want = {
                    "fisher": (along[here].square() / 2).sum(),
                    "isotropic": (size * error)[here].sum() / (2 * HIDDEN),
                    "output": size[here].sum(),
                    "gradient": along[here].sum().abs(),
                }
                for key, value in want.items():
                    got = made.damage[key][expert, place, text]
                    # sums of products that nearly cancel are left in fp32
                    assert float((got - value).abs()) <= 1e-3 * float(value) + 1e-9, (key, form, expert)
            if bool((p > 0).any()):
                spread = (size[p > 0] / p[p > 0].square()).mean()
                assert float((made.spread[expert, place] - spread).abs()) <= 1e-3 * float(spread) + 1e-9


def state_of(model: nn.Module) -> dict:
    modules = dict(model.named_modules())
    hooks = {n: [len(v) for k, v in vars(m).items() if k.endswith("hooks")] for n, m in modules.items()}
    return {
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "training": {n: m.training for n, m in modules.items()},
        "classes": {n: type(m) for n, m in modules.items()},
        "hooks": hooks,
        "config": model.config.to_dict(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("methods", METHODS, ids="-".join)
def test_targets_are_met_and_nothing_is_changed(methods, dtype):
    model = build("qwen3_moe", dtype).train()
    next(model.parameters()).requires_grad_(False)
    before, state = snapshot(model), state_of(model)
    found = compress.survey(model, methods=methods, retain=[retain(4, 12)], domain=[domain(4, 12)], progress=False)
    sites = find_experts(model).sites
    whole = sum(2 * expert_stacks(site.base)[name].numel() for site in sites for name in matrices(site.base))
    last = None
    for target in (0.9, 0.7, 0.5, 0.4):
        plan = found.plan(target)
        assert plan.total == whole
        assert plan.bytes <= target * whole
        assert plan.bytes == sum(form_bytes(sites[0].base, node.form) for node in plan.nodes)
        # no more is given up than has to be: within one form of one expert, unless a layer is gone
        assert plan.skipped or plan.bytes > target * whole - form_bytes(sites[0].base, WHOLE)
        assert last is None or plan.predicted >= last
        last = plan.predicted
        assert {node.layer for node in plan.nodes} | set(plan.skipped) == {0, 1, 2}
        assert all(len(forms) == EXPERTS for forms in plan.forms().values())
    assert_same(before, snapshot(model))
    assert state_of(model) == state


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plan_is_printed_saved_and_read(name, tmp_path):
    plan = compress.plan(
        build(name), target=0.4, methods=("quantize", "thin", "sparsify", "skip"), retain=[tokens()], progress=False
    )
    shown = str(plan)
    assert f"{plan.total:,} -> {plan.bytes:,} bytes" in shown
    ranked = sorted(plan.nodes, key=lambda node: node.predicted, reverse=True)
    assert shown.splitlines()[3:] == [f"  {line}" for line in ends(ranked)]
    plan.save(tmp_path / "new" / "plan.json")
    plan.save(tmp_path / "new" / "plan.json")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["plan.json"]
    read = CompressionPlan.load(tmp_path / "new" / "plan.json")
    assert read == plan
    assert read.base == describe_base(build(name), find_experts(build(name)))
    assert read.calibration is None
    assert isinstance(plan.calibration, Calibration)
    assert str(read) == shown


def test_files_that_are_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    plan = compress.plan(build(), target=0.5, retain=[tokens()], progress=False)
    plan.save(path)
    held = json.loads(path.read_text())
    for text in ("{", "[1]", "{}", json.dumps(held | {"format": 99}), json.dumps(held | {"nodes": [{"layer": 1}]})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"plan.json is not a compression plan \(.*make it again"):
            CompressionPlan.load(path)
    with pytest.raises(FileNotFoundError):
        CompressionPlan.load(tmp_path / "none.json")


def test_a_map_spares_the_nodes_where_the_error_is():
    """Without the domain's text, by the square of the error that the map noted there."""
    model = build()
    emap = measure_errors(model, [domain(8, 16, seed) for seed in range(3)], progress=False)
    options = {"methods": ("quantize",), "retain": [retain(8, 16)], "progress": False}
    without, with_map = (compress.survey(model, given, **options) for given in (None, emap))
    both = compress.survey(model, emap, **options, domain=[domain(8, 16)])
    assert without.by_map is None
    assert both.by_map is None
    assert_close("mean", with_map.score(), (without.score() + with_map.by_map) / 2, "fp64")
    square = emap.square[:, :, None].double()
    # its own definition: |dy / p|^2 on the retain text, spread evenly, times the error
    moved = with_map.by_map / (square / (2 * HIDDEN * emap.labels))
    one = candidates(find_experts(model).sites[1].base, without.calibration.layers[1], without.forms, 1).spread
    assert_close("spread", moved[1], one, "fp64")

    def bytes_at_error(plan: CompressionPlan) -> float:
        after = torch.tensor([node.after for node in plan.nodes]).view(3, EXPERTS)
        return float((after * emap.square).sum() / emap.square.sum())

    assert bytes_at_error(with_map.plan(0.3)) > bytes_at_error(without.plan(0.3))
    emap.square[1, 6] *= 1e6
    node = next(n for n in compress.survey(model, emap, **options).plan(0.3).nodes if (n.layer, n.expert) == (1, 6))
    assert node.form == WHOLE


@pytest.mark.parametrize("select", ["fisher", "output", "isotropic", "weights", "gradient", "random"])
def test_every_statistic_plans(select):
    found = compress.survey(build(), retain=[tokens()], progress=False)
    plan = found.plan(0.3, select)
    assert plan.select == select
    assert plan.bytes <= 0.3 * plan.total
    assert plan.nodes == found.plan(0.3, select).nodes
    # by the sum that it minimizes, the others are no better than one step
    assert found.plan(0.3).predicted <= plan.predicted + max(node.predicted for node in found.plan(0.3).nodes)


def test_experts_that_no_token_reaches_go_first():
    model, text = build(), tokens(1, 4)
    plan = compress.plan(model, target=0.9, methods=("quantize", "thin"), retain=[text], progress=False)
    layers = plan.calibration.layers
    idle = {(layer, e) for layer, sample in layers.items() for e in range(EXPERTS) if not (sample.index == e).any()}
    assert idle
    assert {(n.layer, n.expert) for n in plan.nodes if n.form == Form(neurons=0)} >= idle
    assert all(node.predicted == 0 for node in plan.nodes if (node.layer, node.expert) in idle)


def test_a_damage_that_is_no_number_is_named():
    """An expert that no token reaches lets the loss be finite."""
    model, text = build(), tokens(1, 4)
    index = calibrate(model, {"retain": [text]}, progress=False).layers[1].index
    idle = next(e for e in range(EXPERTS) if not (index == e).any())
    with torch.no_grad():
        expert_stacks(find_experts(model).sites[1].module)["down_proj"][idle, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"expert {idle} of layer 1 as .*: its weights, once made, are"):
        compress.survey(model, methods=("quantize",), retain=[text], progress=False)


@pytest.mark.parametrize("methods", METHODS[:3] + METHODS[4:], ids="-".join)
def test_the_nearest_target_is_named(methods):
    found = compress.survey(build("mixtral"), methods=methods, retain=[tokens()], progress=False)
    if "thin" in methods:
        assert found.plan(1e-9).bytes == 0
        return
    with pytest.raises(ValueError, match="out of reach") as caught:
        found.plan(0.001)
    assert found.plan(float(re.search(r"leave is (0\.\d+) ", str(caught.value)).group(1))).bytes


def test_wrapped_by_lora():
    """Adapters of attention are part of the model."""
    model = get_peft_model(build("qwen3_moe"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    plain_found, state = calibrate(build("qwen3_moe"), {"retain": [tokens()]}, progress=False), state_of(model)
    found = calibrate(model, {"retain": [tokens()]}, progress=False)
    for layer, sample in found.layers.items():
        assert_close("error", sample.error, plain_found.layers[layer].error, "fp32")
    with pytest.warns(UserWarning, match="'skip' is left out"):
        plan = compress.plan(model, target=0.4, methods=("quantize", "skip"), retain=[tokens()], progress=False)
    assert not plan.skipped
    assert state_of(model) == state


def test_layers_that_differ():
    model = build()
    base = find_experts(model).sites[1].base
    base.num_experts = 6
    for name, stack in list(base.named_parameters()):
        setattr(base, name, nn.Parameter(stack.data[:6]))
    with pytest.raises(ValueError, match=r"layers 0 and 1 differ in number or size .*\[6, 32, 32\]"):
        check_whole(find_experts(model))


def test_forms_fit_the_matrices():
    base = find_experts(build("qwen3_moe", moe_intermediate_size=18)).sites[0].base
    assert {form.sparsity for form in forms_of(base, ("sparsify",))} == {None, "half"}
    assert forms_of(base, ("thin",)) == (WHOLE, Form(neurons=8), Form(neurons=0))
    base = find_experts(build("qwen3_moe", moe_intermediate_size=8)).sites[0].base
    assert forms_of(base, ("thin",)) == (WHOLE, Form(neurons=0))


def test_refusals():
    model, text = build(), {"retain": [tokens()], "progress": False}
    before, state = snapshot(model), state_of(model)
    other = measure_errors(build("olmoe"), [tokens()], progress=False)
    empty = {"input_ids": tokens(2, 4), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    for match, options in (
        (r"target must be a share .* got 0", {"target": 0, **text}),
        (r"target must be a share .* got 1.5", {"target": 1.5, **text}),
        (r"target must be a share .* got nan", {"target": float("nan"), **text}),
        (r"target must be a share .* got True", {"target": True, **text}),
        (r"unknown select='loss'; choose from fisher", {"target": 0.5, "select": "loss", **text}),
        (r"methods must be some of .*; got 'thin'", {"target": 0.5, "methods": "thin", **text}),
        (r"methods must be some of .*; got \('prune',\)", {"target": 0.5, "methods": ("prune",), **text}),
        (r"methods must be some of .*; got \(\)", {"target": 0.5, "methods": (), **text}),
        (r"no text to calibrate on: give domain= or retain=", {"target": 0.5}),
        (r"the retain text has no token to predict", {"target": 0.5, "retain": [], "progress": False}),
        (r"the retain text has no token to predict", {"target": 0.5, "retain": [tokens(3, 1)], "progress": False}),
        (r"the domain text has no token to predict", {"target": 0.5, "domain": [empty], "progress": False}),
        (r"needs input_ids of shape", {"target": 0.5, "retain": [torch.zeros(3)], "progress": False}),
        (r"error map was measured on another model", {"target": 0.5, "emap": other, **text}),
    ):
        with pytest.raises(ValueError, match=match):
            compress.plan(model, **options)
    assert_same(before, snapshot(model))
    assert state_of(model) == state
    with pytest.raises(ValueError, match="adapter around it: compress what merge_and_unload"):
        compress.plan(grown(), target=0.5, **text)
    compress.quantize_experts(model)
    with pytest.raises(ValueError, match="is packed already"):
        compress.plan(model, target=0.5, **text)
    shared = measure_errors(build("qwen2_moe"), [tokens()], nodes="shared", progress=False)
    with pytest.raises(ValueError, match="map was measured on another model"):
        compress.plan(build("qwen2_moe"), shared, target=0.5, **text)
    with torch.device("meta"):
        nowhere = type(model)(build().config)
    with pytest.raises(ValueError, match="no values here"):
        check_whole(find_experts(nowhere))
