"""Growing on a base whose experts are packed: what is read before and after, saved, loaded, trained and measured."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from test_parts import config
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from close import assert_all_close
from loaders import LOADERS
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts
from peft_pcgrow.architectures.experts import expert_stacks, is_packed
from peft_pcgrow.packed.forms import Form, form_bytes
from peft_pcgrow.packed.quantize import BITS, quantize_experts
from tiny import (
    ARCHITECTURES,
    EXPERTS,
    LOCUS,
    assert_same,
    backward,
    build,
    domain,
    grown,
    logits,
    mixed,
    retain,
    snapshot,
    spawned,
    tokens,
    train,
    trainable,
)

QUANTIZATIONS = ["nf4", "int8"]


def packed_forms(model: nn.Module) -> set[str]:
    return {str(form) for site in find_experts(model).sites for form in getattr(site.base, "forms", [None])}


@pytest.fixture
def four_bit(tmp_path):
    """Loads a tiny model whose linear layers bitsandbytes stores in 4 bits, its experts in 16."""
    pytest.importorskip("bitsandbytes")
    build().save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return lambda dtype=torch.bfloat16: AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=dtype
    )


# ---- adapters on it


@pytest.mark.slow
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_banks_are_copies_of_what_was_there_before(name, quantization):
    base = build(name)
    model = get_peft_model(copy.deepcopy(base), PCGrowConfig(locus=LOCUS, base_quantization=quantization))
    assert packed_forms(model) == {str(Form(BITS[quantization]))}
    assert all(is_packed(site.base) for site in find_experts(model).sites)
    for site in find_experts(base).sites:
        for layer in model.base_model.tuner_layers():
            for stack, bank in layer.bank("default").items() if layer.layer_index == site.layer else ():
                assert torch.equal(bank, expert_stacks(site.base)[stack][LOCUS[site.layer]])
    packed = copy.deepcopy(base)
    quantize_experts(packed, quantization)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(packed))
    assert not torch.equal(logits(model), logits(packed))
    train(model)
    unloaded = model.unload()
    assert packed_forms(unloaded) == {str(Form(BITS[quantization]))}
    assert_same(snapshot(packed), snapshot(unloaded))


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("name", "quantization"), [("qwen3_moe", "nf4"), ("gpt_oss", "int8")])
def test_loaders_pack_the_base_alike(name, quantization, loader, tmp_path):
    """On a fresh base in full precision, every loader gives the trained model's logits, bit for bit."""
    build(name).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS, base_quantization=quantization))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_quantization"] == quantization
    loaded = LOADERS[loader](tmp_path / "base", tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert packed_forms(loaded) == {str(Form(BITS[quantization]))}


@pytest.mark.slow
def test_a_base_that_is_packed_already(tmp_path):
    """The same is nothing to do, also for loading; another is refused."""
    model = grown(base_quantization="nf4")
    train(model)
    model.save_pretrained(tmp_path)
    base = build()
    quantize_experts(base)
    held = [site.base._buffers["packed_down_proj"] for site in find_experts(base).sites]
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert all(a is s.base._buffers["packed_down_proj"] for a, s in zip(held, find_experts(loaded).sites, strict=True))
    other = build()
    quantize_experts(other, "3bit")
    with pytest.raises(ValueError, match=r"packed already \(3 bit\), and 'nf4' was asked for"):
        PeftModel.from_pretrained(other, tmp_path)


def test_merging_is_refused(tmp_path):
    """And the way that the message shows is one."""
    model = grown(base_quantization="nf4")
    train(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"experts are packed.* whose base_quantization is None, and merge"):
            merge()
    model.save_pretrained(tmp_path)
    settings = PCGrowConfig.from_pretrained(tmp_path)
    settings.base_quantization = None
    loaded = PeftModel.from_pretrained(build(), tmp_path, config=settings)
    before = logits(loaded)
    assert torch.equal(logits(loaded.merge_and_unload()), before)


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "direct", "backprop"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_trains(quantization, settle):
    """Losses fall, and nothing but the banks moves."""
    model = grown(base_quantization=quantization, settle=settle)
    before = snapshot(model)
    losses = train(model, steps=8, texts=lambda seed: tokens())
    assert losses[-1] < losses[0] - 0.02
    changed = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainable(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("resolution", ["expert", "matrix"])
def test_gradients_of_a_sweep_are_backprops(resolution, name):
    found = {}
    for settle in ("sweep", "backprop"):
        changes = {"settle": settle, "base_quantization": "nf4"}
        adapter = PCGrowConfig(locus=LOCUS, **changes) if resolution == "expert" else config(**changes)
        found[settle] = backward(get_peft_model(build(name, torch.float64), adapter))
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@pytest.mark.slow
def test_parts(tmp_path):
    """What is outside of the pieces is the packed base's; saved and loaded."""
    model = get_peft_model(build(), config(base_quantization="nf4"))
    packed = build()
    quantize_experts(packed)
    for layer in model.base_model.tuner_layers():
        base = next(site.base for site in find_experts(packed).sites if site.layer == layer.layer_index)
        birth, whole = layer.births["default"], layer.weights("default")
        for stack, held in layer.pieces(birth).items():
            of_base = held.to(torch.device("cpu"), torch.tensor([birth.grown.index(int(e)) for e in held.experts]))
            assert torch.equal(of_base.read(whole[stack]), layer.bank("default")[stack])
            rounded = expert_stacks(base)[stack][torch.tensor(birth.grown)]
            assert torch.equal(of_base.put(rounded, layer.bank("default")[stack].detach()), whole[stack])
            assert not torch.equal(rounded, whole[stack])
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path)), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_newborns(name, tmp_path):
    """Text that no gate lets pass has the packed base's logits; the rest is trained, saved and loaded."""
    packed = build(name)
    quantize_experts(packed)
    model = spawned(name, base_quantization="nf4")
    train(model, lr=3e-2, texts=domain)
    same = (logits(model, retain(seed=9)) == logits(packed, retain(seed=9))).all(dim=-1)
    assert same.float().mean() > 0.5
    assert not torch.equal(logits(model, domain(seed=9)), logits(packed, domain(seed=9)))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(name), tmp_path), mixed()), logits(model, mixed()))


@pytest.mark.slow
def test_protected_directions_stay_those_of_the_unpacked_donors():
    """The packed donors differ from them; steps must not pull the bank there."""
    model = spawned(protect=0.6, gate_fpr=0.3, base_quantization="nf4")
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = create_pcgrow_optimizer(model, lr=0.02)
    for seed in range(3):
        model.train()(input_ids=domain(seed=seed), labels=domain(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in model.base_model.tuner_layers():
        for stack, weight in layer.bank("default").items():
            before = next(start[name] for name, p in trainable(model).items() if p is weight)
            moved, kept = weight.detach() - before, layer.directions("default", stack)
            assert moved.any()
            assert float((moved @ kept).norm() / moved.norm()) < 1e-4


@pytest.mark.slow
def test_two_adapters():
    """The second reads packed donors; each alone, both together, and none."""
    model = grown(base_quantization="nf4")
    packed = build()
    quantize_experts(packed)
    with pytest.raises(ValueError, match=r"packed already \(4 bit\), and 'int8' was asked for"):
        model.add_adapter("wrong", PCGrowConfig(locus={0: [2]}, base_quantization="int8"))
    assert list(model.peft_config) == ["default"]
    train(model)
    one = logits(model)
    model.add_adapter("second", PCGrowConfig(locus={0: [2], 2: [5]}, base_quantization="nf4"))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(packed))
    train(model, lr=3e-2)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(logits(model), one)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(packed))


# ---- bitsandbytes' own bases


@pytest.mark.slow
def test_a_base_loaded_in_4_bits(four_bit, tmp_path):
    """Linear layers by bitsandbytes, experts packed; trained, saved, loaded, merging refused."""
    model = get_peft_model(four_bit(), PCGrowConfig(locus=LOCUS, base_quantization="nf4"))
    assert packed_forms(model) == {"4 bit"}

    def loss(of: nn.Module) -> float:
        # in training mode: bitsandbytes' own inference on a CPU does not take layers this narrow
        return float(of.train()(input_ids=tokens(), labels=tokens()).loss.detach())

    before = loss(model)
    train(model, steps=5, texts=lambda seed: tokens())
    after = loss(model)
    assert after < before
    model.save_pretrained(tmp_path / "adapter")
    assert loss(PeftModel.from_pretrained(four_bit(), tmp_path / "adapter", is_trainable=True)) == after
    with pytest.raises(ValueError, match="experts are packed"):
        model.merge_and_unload()


def test_gradients_on_a_base_loaded_in_4_bits(four_bit):
    """In fp32, a sweep's gradients are backprop's with Linear4bit attention and packed experts."""
    found = {}
    for settle in ("sweep", "backprop"):
        adapter = PCGrowConfig(locus=LOCUS, settle=settle, base_quantization="nf4")
        model = get_peft_model(four_bit(torch.float32), adapter)
        found[settle] = backward(model)
    assert_all_close(found["sweep"], found["backprop"], "fp32")


def test_what_is_left_in_16_bits_is_said(four_bit, caplog):
    """Once, when the adapter is made, with the sizes; not where the experts are packed."""
    caplog.set_level("INFO", "peft_pcgrow")
    base = four_bit()
    sites = find_experts(base).sites
    now = sum(2 * stack.numel() for site in sites for stack in expert_stacks(site.base).values()) / 2**20
    then = sum(EXPERTS * form_bytes(site.base, Form(4)) for site in sites) / 2**20
    get_peft_model(copy.deepcopy(base), PCGrowConfig(locus=LOCUS))
    assert (
        f"loaded in 4 bit, but {now:.1f} MiB of experts are still in 16 bit; "
        f"PCGrowConfig(base_quantization='nf4') stores them in {then:.1f} MiB"
    ) in caplog.text
    caplog.clear()
    get_peft_model(base, PCGrowConfig(locus=LOCUS, base_quantization="nf4"))
    get_peft_model(build(), PCGrowConfig(locus=LOCUS))
    assert "still in" not in caplog.text


@pytest.mark.slow
def test_prepared_for_kbit_training(four_bit, recwarn):
    """It casts experts up that are not packed; packed ones keep their bytes."""
    model = four_bit()
    quantize_experts(model)
    before = {s.layer: s.base._buffers["packed_down_proj"].clone() for s in find_experts(model).sites}
    model = get_peft_model(prepare_model_for_kbit_training(model), PCGrowConfig(locus=LOCUS))
    assert not [w for w in recwarn if "casts them" in str(w.message)]
    for site in find_experts(model).sites:
        assert torch.equal(site.base._buffers["packed_down_proj"], before[site.layer])
    losses = train(model, steps=4, texts=lambda seed: tokens())
    assert losses[-1] < losses[0]


def test_saved_without_the_adapter(tmp_path):
    """The packed base that an adapter leaves behind, and one packed by itself, are saved and read back."""
    model = grown(base_quantization="int8")
    quantized = build()
    quantize_experts(quantized, "int8")
    for name, base in (("left", model.unload()), ("packed", quantized)):
        base.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert all(is_packed(site.base) for site in find_experts(loaded).sites)
        assert torch.equal(logits(loaded), logits(base))


@pytest.mark.slow
def test_shared_experts_on_packed_routed_ones():
    """What is packed are the routed experts, whichever nodes grow."""
    base = build("qwen2_moe")
    shared = {layer: [0] for layer in find_experts(base, "shared").experts_at}
    model = get_peft_model(base, PCGrowConfig(locus=shared, nodes="shared", base_quantization="nf4"))
    assert all(is_packed(site.base) for site in find_experts(model).sites)
    assert not any(is_packed(site.base) for site in find_experts(model, "shared").sites)
    losses = train(model, steps=5, texts=lambda seed: tokens(seed=1))
    assert losses[-1] < losses[0]
