"""Shrunk adapters: what they compute, weigh, save and refuse."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from close import assert_close
from pcgrow_kernels import lowbit
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.compress.shrink import shrink_adapter
from tiny import (
    assert_same,
    build,
    domain,
    grown,
    logits,
    mixed,
    snapshot,
    spawned,
    train,
)

NAMES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
PARTS = {
    "matrix": {"parts": {1: {1: ["down_proj"]}, 2: {0: ["gate_up_proj", "down_proj"]}}, "resolution": "matrix"},
}


def trained(**changes) -> PeftModel:
    model = grown(**changes)
    train(model, steps=5)
    return model


def layers(model: nn.Module) -> list[PCGrowExperts]:
    return [m for m in model.modules() if isinstance(m, PCGrowExperts)]


def banks(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of all weights that an adapter computes with, as they are read."""
    return {
        f"{layer.layer_index} {name}": weight.detach().clone()
        for layer in layers(model)
        for name, weight in layer.bank(adapter).items()
    }


def bases(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The base's own slices, by the definition of pieces."""
    found = {}
    for layer in layers(model):
        for name, held in layer.pieces(layer.births[adapter]).items():
            found[f"{layer.layer_index} {name}"] = held.read(getattr(layer.base_layer, name).detach()).clone()
    return found


def packed_bytes(model: nn.Module) -> int:
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name.endswith(".packed"))


# ---- what it computes


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("name", NAMES)
def test_computes_base_plus_rounded_delta(name, bits):
    """Every slice is the base's plus its delta as the codec rounds it, of each matrix by itself; biases lose 8 bits."""
    model = trained(name=name)
    before, base, transposed = banks(model), bases(model), layers(model)[0].base_layer.is_transposed
    report = shrink_adapter(model, bits=bits)
    lost = total = 0.0
    for key, weight in banks(model).items():
        delta = before[key] - base[key]
        if delta.dim() == 2:
            want = delta.to(torch.bfloat16).float()
        else:
            turned = delta.mT if transposed else delta
            rounded = torch.cat([lowbit.rounded(matrix[None], bits) for matrix in turned])
            want = rounded.mT if transposed else rounded
        assert torch.equal(weight, base[key] + want), key
        lost += float((want - delta).double().square().sum())
        total += float(delta.double().square().sum())
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert 0 < report.error < {8: 0.01, 4: 0.12, 3: 0.22, 2: 0.4}[bits]


def test_untrained_is_the_base():
    """A delta of zero stays one."""
    model = grown()
    report = shrink_adapter(model, bits=2)
    assert torch.equal(logits(model), logits(build()))
    assert report.error == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("resolution", PARTS)
def test_parts(name, resolution):
    """Of parts only they are stored; all else of an expert is the base's, bit for bit."""
    model = trained(name=name, locus=None, **PARTS[resolution])
    before, base = banks(model), bases(model)
    shrink_adapter(model, bits=8)
    for key, weight in banks(model).items():
        assert_close(key, weight - base[key], before[key] - base[key], "bf16")
    merged = copy.deepcopy(model).merge_and_unload()
    plain, found = build(name).state_dict(), merged.state_dict()
    held = {name for layer in layers(model) for name in layer.bank("default")}
    changed = {key.rpartition(".")[2] for key in plain if not torch.equal(plain[key], found[key])}
    assert changed == held
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", [{"bits": 4}, {"target": 0.3}])
def test_newborns(way, tmp_path):
    """Gates stay as they are: text that they do not take keeps the base's bits, before and after saving."""
    build().save_pretrained(tmp_path / "base")
    model = spawned(protect=0.5)
    train(model, texts=domain)
    kinds = ("gate_direction", "gate_law", "gate_threshold", "protect_gate_up_proj", "protect_down_proj")
    gates = {k: v for k, v in snapshot(model).items() if any(f".pcgrow_{kind}." in k for kind in kinds)}
    before, plain = logits(model, mixed()), logits(build(), mixed())
    kept = (before == plain).all(-1)
    shrink_adapter(model, **way)
    after = logits(model, mixed())
    assert_same(gates, {k: v for k, v in snapshot(model).items() if k in gates})
    assert len(gates) == 10
    assert kept.any()
    assert not kept.all()
    assert torch.equal(kept, (after == plain).all(-1))
    assert float((after - before).norm()) < 0.8 * float((before - plain).norm())
    model.set_gate_fpr(0.2)
    assert not torch.equal(logits(model, mixed()), after)
    model.set_gate_fpr(0.05)
    model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", experts_implementation="eager")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(logits(loaded, mixed()), after)
    with pytest.raises(ValueError, match="newborns"):
        loaded.merge_adapter()


# ---- what it weighs


@pytest.mark.slow
def test_bytes(tmp_path):
    """What is reported is what the tensors hold, and nearly what the file takes."""
    model = trained()
    whole = {key: weight.numel() for key, weight in banks(model).items()}
    report = shrink_adapter(model, bits=4)
    assert report.before == 2 * sum(whole.values())
    assert report.after == packed_bytes(model)
    # 4 bits a weight, and 16 for each 64
    assert report.after == sum(whole.values()) * (64 * 4 + 16) // (64 * 8)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    # beside the seals, which say what it is
    seals = sum(t.numel() for key, t in saved.items() if "pcgrow_seal" in key)
    assert 0 < seals < 1500 * len(model.base_model.tuner_layers())
    assert sum(t.numel() * t.element_size() for t in saved.values()) == report.after + report.kept + seals
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < report.after + report.kept + seals + 2000
    assert f"{report.after:,} bytes" in str(report)


@pytest.mark.slow
def test_target_goes_by_effect():
    """Under the target, by less than a matrix takes more; none in 3 bits would save more per byte than one in 4."""
    model = trained()
    before, base = banks(model), bases(model)
    report = shrink_adapter(model, target=0.24)
    step = max(lowbit.size(*w.shape[1:], 4) - lowbit.size(*w.shape[1:], 3) for w in before.values())
    assert 0.24 * report.before - step < report.after <= 0.24 * report.before
    saved = {3: [], 4: []}
    for key, weight in before.items():
        layer, stack = key.split()
        delta = weight - base[key]
        widths = model.peft_config["default"].shrunk["layers"][layer][stack].split()
        for matrix, width in zip(delta, widths, strict=True):
            errors = [float((lowbit.rounded(matrix[None], w)[0] - matrix).square().sum()) for w in (3, 4)]
            cost = lowbit.size(*matrix.shape, 4) - lowbit.size(*matrix.shape, 3)
            saved[int(width)].append(((errors[0] - errors[1]) / cost, cost))
    assert min(len(saved[3]), len(saved[4])) > 0
    for gain, cost in saved[3]:
        # a larger one may not have fitted any more
        assert all(gain <= other for other, size in saved[4] if size >= cost)
    assert f"{len(saved[4])} matrices in 4 and {len(saved[3])} in 3 bits" in report.form


@pytest.mark.slow
@pytest.mark.parametrize(("target", "widths"), [(0.16, {"2", "3"}), (0.35, {"4", "8"}), (1.0, {"16"})])
def test_targets(target, widths):
    model = trained()
    report = shrink_adapter(model, target=target)
    assert report.share <= target
    stacks = model.peft_config["default"].shrunk["layers"].values()
    assert {width for stack in stacks for numbers in stack.values() for width in numbers.split()} == widths


# ---- with text


def output_errors(before: PeftModel, after: PeftModel, ids: Tensor) -> dict[str, float]:
    """Summed squared error of what each stack of the lowest grown layer puts out, weighted by the router.

    Of whole experts or parts of them, for architectures with `silu(gate) * up` and no biases, or the first stack only.
    """
    layer, other = layers(before)[0], layers(after)[0]
    seen: list[tuple] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    logits(before, ids)
    handle.remove()
    ((hidden, index, weight),) = seen
    birth, base, found = layer.births["default"], layer.base_layer, {}
    whole = {name: stack.detach() for name, stack in layer.weights("default").items()}
    for stack, held in layer.pieces(birth).items():
        found[stack] = 0.0
        change = (other.bank("default")[stack] - layer.bank("default")[stack]).detach()
        for n, expert in enumerate(held.experts.tolist()):
            token, choice = torch.where(index == expert)
            x = hidden[token]
            if stack == "down_proj":
                gate, up = (x @ whole["gate_up_proj"][birth.grown.index(expert)].mT).chunk(2, dim=-1)
                x = nn.functional.silu(gate) * up
            out = weight[token, choice, None] * (x @ (change[n] if base.is_transposed else change[n].mT))
            found[stack] += float(out.square().sum())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("resolution", ["expert", *PARTS])
def test_rounding_fitted_to_text(name, resolution):
    """Rounding that knows the inputs moves outputs less than rounding to the nearest, though it moves weights more."""
    model = trained(name=name, **({} if resolution == "expert" else {"locus": None, **PARTS[resolution]}))
    text = domain(32, seed=3)
    errors, reports = {}, {}
    for compensate in (True, False):
        twin = copy.deepcopy(model)
        reports[compensate] = shrink_adapter(twin, bits=2, batches=text.split(16), compensate=compensate)
        errors[compensate] = output_errors(model, twin, text)
    assert errors[True].keys() == layers(model)[0].bank("default").keys()
    for stack, error in errors[True].items():
        assert error < 0.97 * errors[False][stack], stack
    assert reports[True].error > reports[False].error
    plain = copy.deepcopy(model)
    shrink_adapter(plain, bits=2)
    assert_same(snapshot(plain), snapshot(twin))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_losses(name):
    """Losses are the model's own, without the adapter, with it, and with what became of it."""
    model = trained(name=name)
    ids = domain(16, seed=3)
    half = {"input_ids": ids[8:], "labels": ids[8:]}
    before = copy.deepcopy(model)
    report = shrink_adapter(model, bits=3, batches=[ids[:8], half])
    found = report.loss_base, report.loss_before, report.loss_after
    for got, each in zip(found, (build(name), before, model), strict=True):
        with torch.no_grad():
            assert got == pytest.approx(float(each(input_ids=ids, labels=ids, use_cache=False).loss), rel=1e-5)
    gain = found[0] - found[1]
    assert (report.gain_lost is None) == (gain <= 0)
    if gain > 0:
        assert report.gain_lost == pytest.approx((found[2] - found[1]) / gain)
    assert f"{report.loss_after:.4f} after" in str(report)


@pytest.mark.slow
def test_text_for_newborns():
    """Padding and rows that no gate lets pass do not count: the same text, padded, gives the same bytes."""
    model = spawned()
    train(model, texts=domain)
    ids = mixed()
    padded = {
        "input_ids": nn.functional.pad(ids, (0, 6)),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, 6)),
    }
    found = []
    for batch in (ids, padded):
        twin = copy.deepcopy(model)
        shrink_adapter(twin, bits=3, batches=[batch])
        found.append(banks(twin))
    for key in found[0]:
        assert_close(key, found[0][key], found[1][key], "fp32 ill-conditioned solve")
