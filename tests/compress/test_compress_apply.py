"""Applying plans: what is stored and computed, when it stops, and that nothing is left of what is taken back."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_compress_plan import state_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import fresh
from close import assert_close
from pcgrow_kernels import lowbit
from peft_pcgrow import compress, find_experts
from peft_pcgrow.architectures.experts import expert_stacks, first_matrix, is_packed, matrices, neuron_places
from peft_pcgrow.architectures.fingerprint import describe_base
from peft_pcgrow.compress.candidates import candidates
from peft_pcgrow.compress.compression_plan import CompressionPlan, NodePlan
from peft_pcgrow.packed.forms import WHOLE, Form, form_bytes
from tiny import ARCHITECTURES, EXPERTS, assert_same, build, grown, logits, retain, snapshot, tokens, train

pytestmark = pytest.mark.slow

EVERY = ("quantize", "thin", "sparsify", "skip")
MIXED = [Form(2), Form(4, 8), Form(neurons=0), WHOLE, Form(sparsity="half"), Form(3), Form(neurons=8), Form(8)]


def planned(model: nn.Module, forms=MIXED, skipped=(), texts=None) -> CompressionPlan:
    """A plan by hand; with what some texts looked like to the model, if any."""
    plan = compress.plan(model, target=1.0, methods=("quantize",), retain=texts or [tokens()], progress=False)
    base = find_experts(model).sites[0].base
    nodes = [
        replace(
            n,
            form=forms[n.expert],
            after=form_bytes(base, forms[n.expert]),
            predicted=0.001 * n.expert * (forms[n.expert] != WHOLE),
        )
        for n in plan.nodes
        if n.layer not in skipped
    ]
    return replace(plan, nodes=nodes, skipped=list(skipped), calibration=plan.calibration if texts else None)


def loss(model: nn.Module, ids: Tensor) -> float:
    predicted = logits(model, ids)[:, :-1]
    wide = predicted.to(torch.promote_types(predicted.dtype, torch.float32)).flatten(0, 1)
    return float(cross_entropy(wide, ids[:, 1:].flatten()))


def stored(model: nn.Module) -> int:
    """Of the experts' matrices, from what memory they own."""
    total = 0
    for site in find_experts(model).sites:
        held = [*site.base.named_parameters(recurse=False), *site.base.named_buffers(recurse=False)]
        total += sum(t.untyped_storage().nbytes() for name, t in held if t.dim() == 3 or name.startswith("packed_"))
    return total


def staged(model: nn.Module, plan: CompressionPlan) -> nn.Module:
    """A dense copy with the same experts: each form made alone, neurons that are gone silenced where they stood."""
    whole, half = copy.deepcopy(model), lowbit.half_of(model.dtype)
    forms = plan.forms()
    for site in find_experts(whole).sites:
        base = site.base
        if site.layer not in forms:
            continue
        sample = plan.calibration.layers[site.layer] if plan.calibration else None
        chosen = tuple(dict.fromkeys(forms[site.layer]))
        made = candidates(find_experts(model).sites[plan.base["layers"].index(site.layer)].base, sample, chosen, 1)
        for expert, form in enumerate(forms[site.layer]):
            for name in matrices(base):
                stack = expert_stacks(base)[name].data
                matrix = stack[expert].mT if base.is_transposed else stack[expert]
                if form.neurons == 0:
                    matrix[:] = 0
                    continue
                rows, columns = torch.arange(matrix.shape[0]), torch.arange(matrix.shape[1])
                if form.neurons and name == first_matrix(base):
                    rows = neuron_places(base, name, made.kept[form][expert])[1]
                elif form.neurons:
                    columns = made.kept[form][expert]
                data = made.data[form][name][expert]
                found = lowbit.decode(data, len(rows), len(columns), form.width, form.sparsity, stack.dtype, half)
                if name == "down_proj":
                    matrix[:] = 0
                matrix[rows[:, None], columns] = found
            for stack in expert_stacks(base).values():
                if form.neurons == 0 and stack.dim() == 2:
                    stack.data[expert] = 0
    return whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("texts", [None, [retain(4, 12)]], ids=["no text", "text"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_computes_what_was_planned(name, texts, dtype, tmp_path):
    """Every form beside every other, biases too: logits of a dense model, bytes, and what comes back from disk."""
    model = build(name, dtype)
    last = find_experts(model).sites[-1].layer
    plan = planned(model, skipped=[last], texts=texts)
    dense = staged(model, plan)
    dropped = find_experts(dense).layers[last]
    dropped.register_forward_hook(lambda m, args, kw, out: args[0] if args else kw["hidden_states"], with_kwargs=True)
    base = find_experts(model).sites[0].base
    want = sum(form_bytes(base, form) for form in MIXED) * len(plan.forms())
    found, report = compress.apply(model, plan, progress=False)
    assert found is model
    kind = "fp64 across batches" if dtype == torch.float64 else "bf16"
    assert_close("logits", logits(model), logits(dense), kind)
    assert report.bytes_after == stored(model) == want == plan.bytes
    assert report.bytes_before == plan.total
    assert (report.done, report.planned, report.skipped) == (len(plan.nodes) - len(plan.forms()),) * 2 + ((last,),)
    assert report.stopped is None
    assert report.predicted == pytest.approx(plan.predicted)
    held = {t.data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    assert report.model_bytes == sum(held.values())
    if texts:
        assert report.after[0] == pytest.approx(loss(model, texts[0]), rel=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    again.set_experts_implementation("eager")
    assert_same(snapshot(model), snapshot(again))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plan_and_apply(name):
    """The whole way, as users write it."""
    text = [retain(4, 16)]
    model = build(name, torch.bfloat16)
    before = loss(model, text[0])
    plan = compress.plan(model, target=0.35, methods=EVERY, retain=text, progress=False)
    model, report = compress.apply(model, plan, max_loss_rise=0.5, progress=False)
    assert report.bytes_after == stored(model) == plan.bytes <= 0.35 * plan.total
    assert report.before[0] == pytest.approx(before, rel=1e-6)
    assert report.after[0] == pytest.approx(loss(model, text[0]), rel=1e-6)
    assert "nodes changed; losses retain" in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_whole_keeps_its_bits(dtype, tmp_path):
    """In packed layers and in others, which stay as they were; and in a checkpoint that is read in another type."""
    model = build("qwen3_moe", dtype)
    forms = [WHOLE] * 7 + [Form(4)]
    plan = planned(model, forms)
    for i, node in enumerate(plan.nodes):
        if node.layer != 1:
            plan.nodes[i] = replace(node, form=WHOLE, after=node.before)
    before, parameters = snapshot(model), dict(model.named_parameters())
    compress.apply(model, plan, progress=False)
    for site in find_experts(model).sites:
        assert is_packed(site.base) == (site.layer == 1)
        for name, stack in expert_stacks(site.base).items():
            assert torch.equal(stack[torch.arange(7)], before[f"{site.name}.{name}"][:7])
    assert all(parameters[name] is p for name, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for site in find_experts(wide).sites:
        for name, stack in expert_stacks(site.base).items():
            assert torch.equal(stack[torch.arange(7)], before[f"{site.name}.{name}"][:7].float())
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace(f'"half": "{str(dtype)[6:]}"', '"half": "int16"'))
    with pytest.raises(ValueError, match=r"as bfloat16 or float16, not 'int16': the config.json was altered"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_stops_before_the_limit(name, dtype):
    """Harmless changes stay, harmful ones do not come; the losses then obey, and what was taken back is as it was."""
    text = [tokens(4, 16)]
    model = build(name)
    # learns it by heart, so that there is something to lose
    train(model, 40, texts=lambda seed: text[0])
    model.to(dtype)
    plan = compress.plan(model, target=0.1, methods=("quantize", "thin"), retain=text, progress=False)
    _, all_of_it = compress.apply(copy.deepcopy(model), plan, progress=False)
    rise = (all_of_it.after[0] - all_of_it.before[0]) / 3
    assert rise > 0
    whole, before = copy.deepcopy(model), snapshot(model)
    model, report = compress.apply(model, plan, max_loss_rise=rise, progress=False)
    assert "would have raised the retain loss by" in report.stopped
    assert 0 < report.done < report.planned
    assert report.after[0] <= report.before[0] + rise
    assert loss(model, text[0]) <= loss(whole, text[0]) + rise
    assert report.bytes_after == stored(model) < stored(whole)
    # least harm a byte first
    order = sorted((n for n in plan.nodes if n.form != WHOLE), key=lambda n: n.predicted / (n.before - n.after))
    done = {(node.layer, node.expert) for node in order[: report.done]}
    assert report.predicted == pytest.approx(sum(node.predicted for node in order[: report.done]))
    for site in find_experts(model).sites:
        forms = site.base.forms if is_packed(site.base) else [WHOLE] * EXPERTS
        for expert, form in enumerate(forms):
            assert (form != WHOLE) == ((site.layer, expert) in done)
            for stack, held in expert_stacks(site.base).items():
                if form == WHOLE:
                    was = before[f"{site.name}.{stack}"][expert]
                    in_bits = was.bfloat16().to(dtype) if is_packed(site.base) and held.dim() == 3 else was
                    assert torch.equal(held[expert], in_bits)


@pytest.mark.parametrize("skipped", [[], [1]])
def test_no_rise_at_all(skipped):
    """Of a plan that hurts at once, nothing is done."""
    text = [tokens(4, 16)]
    for seed in range(20):
        model = build("qwen3_moe", torch.bfloat16, seed=seed)
        plan = planned(model, [Form(neurons=0)] * 4 + [Form(2)] * 4, skipped, text)
        plan = replace(plan, nodes=[replace(node, predicted=-1.0 * node.expert) for node in plan.nodes])
        before, state, parameters = snapshot(model), state_of(model), dict(model.named_parameters())
        _, report = compress.apply(model, plan, max_loss_rise=0, progress=False)
        if not report.done and not report.skipped:
            break
    assert "stage 1 of" in report.stopped
    assert (report.done, report.skipped, report.after) == (0, (), report.before)
    assert_same(before, snapshot(model))
    assert state_of(model) == state
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert report.bytes_after == report.bytes_before == stored(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_interrupted(name, error):
    """In any forward of it: the model is as it was, and the same call then goes through."""
    text = [tokens(4, 16)]
    model = build(name)
    plan = planned(model, skipped=[1], texts=text)
    before, config, whole = snapshot(model), model.config.to_dict(), logits(model)
    runs = []
    handle = model.register_forward_pre_hook(lambda *given: runs.append(1))
    compress.apply(copy.deepcopy(model), plan, max_loss_rise=99.0, progress=False)
    handle.remove()
    assert len(runs) > 5
    for last in range(1, len(runs) + 1):
        left = [last]

        def interrupt(*given, left=left):
            left[0] -= 1
            if not left[0]:
                raise error("stop")

        handle = model.register_forward_pre_hook(interrupt)
        with pytest.raises(error, match="stop"):
            compress.apply(model, plan, max_loss_rise=99.0, progress=False)
        handle.remove()
        assert_same(before, snapshot(model))
        assert model.config.to_dict() == config
        assert not [site for site in find_experts(model).sites if is_packed(site.base)]
        assert torch.equal(logits(model), whole)
    _, report = compress.apply(model, plan, max_loss_rise=99.0, progress=False)
    assert report.bytes_after == plan.bytes


def test_hooks_outlive_what_is_taken_back():
    """On the experts themselves; and handles still find them."""
    model, text, seen = build("qwen3_moe", torch.bfloat16), [tokens(4, 16)], []
    base = find_experts(model).sites[0].base
    handle = base.register_forward_hook(lambda *given: seen.append(1))
    compress.apply(model, planned(model, [Form(neurons=0)] * EXPERTS, texts=text), max_loss_rise=0, progress=False)
    logits(model)
    assert seen
    handle.remove()
    seen.clear()
    logits(model)
    assert not seen


def test_read_from_a_file(tmp_path):
    """With text given anew it does the same; without, rounding is plain."""
    text = [retain(4, 16)]
    plan = compress.plan(build(), target=0.3, methods=EVERY[:3], retain=text, progress=False)
    plan.save(tmp_path / "plan.json")
    read = CompressionPlan.load(tmp_path / "plan.json")
    one, _ = compress.apply(build(), plan, max_loss_rise=1.0, progress=False)
    other, report = compress.apply(build(), read, max_loss_rise=1.0, retain=text, progress=False)
    assert_same(snapshot(one), snapshot(other))
    bare, empty = compress.apply(build(), read, progress=False)
    assert (empty.names, empty.before, empty.after) == ((), (), ())
    assert "losses not measured" in str(empty)
    assert empty.bytes_after == report.bytes_after == read.bytes
    for site in find_experts(bare).sites:
        assert site.base.forms == tuple(read.forms()[site.layer])
    with pytest.raises(ValueError, match="was read from a file: give apply"):
        compress.apply(build(), read, max_loss_rise=1.0)


def test_wrapped_by_lora(tmp_path):
    """The base within learns that it is packed."""
    model = get_peft_model(build("qwen3_moe"), LoraConfig(target_modules=["q_proj"], r=2))
    plan = compress.plan(model, target=0.4, retain=[tokens()], progress=False)
    _, report = compress.apply(model, plan, max_loss_rise=1.0, progress=False)
    assert report.bytes_after == stored(model) == plan.bytes
    base = model.unload()
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(base))


def test_idle_experts_cost_nothing():
    text = [tokens(1, 4)]
    model = build("qwen3_moe")
    plan = compress.plan(model, target=1.0, methods=("thin",), retain=text, progress=False)
    gone = [node for node in plan.nodes if node.form == Form(neurons=0)]
    assert gone
    assert plan.predicted == 0
    model, report = compress.apply(model, plan, max_loss_rise=1e-3, progress=False)
    assert report.stopped is None
    assert report.bytes_after == plan.bytes < plan.total


def test_refusals():
    text = [tokens()]
    model = build()
    plan = compress.plan(model, target=0.4, retain=text, progress=False)
    before, state = snapshot(model), state_of(model)
    higher = replace(plan, losses=[loss - 0.5 for loss in plan.losses])
    short = replace(plan, nodes=plan.nodes[1:])
    wide = replace(plan, nodes=[replace(plan.nodes[0], form=Form(neurons=16)), *plan.nodes[1:]])
    other = NodePlan(7, 0, WHOLE, 1, 1, 0.0)
    for match, given, options in (
        ("max_loss_rise must be nats per token, 0 or more; got -1", plan, {"max_loss_rise": -1}),
        ("max_loss_rise must be .* got nan", plan, {"max_loss_rise": float("nan")}),
        ("max_loss_rise must be .* got '2%'", plan, {"max_loss_rise": "2%"}),
        ("max_loss_rise must be .* got True", plan, {"max_loss_rise": True}),
        (r"retain loss is .* already, 0\.5000 above what .* plan again", higher, {"max_loss_rise": 0.4}),
        ("takes a CompressionPlan, got .*Path", Path("plan.json"), {}),
        ("this plan was altered", short, {}),
        ("this plan was altered.* than the 16 that there are", wide, {}),
        ("this plan was altered", replace(plan, nodes=[*plan.nodes, other]), {}),
        (
            r"made for another model \(model_type: 'olmoe' against",
            replace(plan, base=describe(build("olmoe"))),
            {},
        ),
        (r"made for another model \(other routers' weights", replace(plan, base=describe(build(seed=1))), {}),
        ("the retain text has no token", plan, {"retain": []}),
    ):
        with pytest.raises(ValueError, match=match):
            compress.apply(model, given, **options, progress=False)
    assert_same(before, snapshot(model))
    assert state_of(model) == state
    with pytest.raises(ValueError, match="adapter around it"):
        compress.apply(grown(), plan)
    compress.apply(model, plan, progress=False)
    with pytest.raises(ValueError, match="is packed already: compress the model in full precision, once"):
        compress.apply(model, plan)


def describe(model: nn.Module) -> dict:
    return describe_base(model, find_experts(model))


def test_a_plan_that_the_config_cannot_take():
    model = build("qwen3_moe", mlp_only_layers=[1])
    plan = planned(model, skipped=[0], texts=[tokens()])
    before = snapshot(model)
    with pytest.raises(ValueError, match="plan without the method 'skip'"):
        compress.apply(model, plan, progress=False)
    assert_same(before, snapshot(model))


def test_without_bitsandbytes():
    """Its kernels are one way to read what is stored, not the only one."""
    script = """
import sys
sys.modules["bitsandbytes"] = None
import torch
from peft_pcgrow import compress
from pcgrow_kernels.lowbit import bitsandbytes_kernels
from tiny import build, tokens
assert bitsandbytes_kernels() is None
model = build("qwen3_moe", torch.bfloat16)
plan = compress.plan(model, target=0.3, retain=[tokens()], progress=False)
model, report = compress.apply(model, plan, max_loss_rise=0.5, progress=False)
print(report.bytes_after, round(report.after[0], 2))
"""
    done = fresh.run(script)
    assert done.returncode == 0, done.stderr
    model = build("qwen3_moe", torch.bfloat16)
    plan = compress.plan(model, target=0.3, retain=[tokens()], progress=False)
    _, report = compress.apply(model, plan, max_loss_rise=0.5, progress=False)
    size, after = done.stdout.split()
    assert int(size) == report.bytes_after
    assert float(after) == pytest.approx(report.after[0], abs=0.03)
