"""Several adapters on one model, PCGROW or not."""

from itertools import product

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig
from peft_pcgrow.compress.shrink import shrink_adapter
from tiny import LOCUS, assert_same, backward, build, grown, logits, needs_native, snapshot, train, trainable

OTHER = {1: [0, 2], 2: [5]}


@pytest.mark.slow
def test_two_adapters_switch():
    """set_adapter chooses which bank is used and trained; deleting one leaves the other's function alone."""
    model = grown()
    train(model)
    first = logits(model)
    model.add_adapter("second", PCGrowConfig(locus=OTHER))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(build()))
    assert all(".second." in name for name in trainable(model))
    train(model)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert all(".default." in name for name in trainable(model))
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert not [name for name in model.state_dict() if "default" in name]


@pytest.mark.slow
def test_disjoint_adapters_act_together():
    """Two disjoint adapters, both active, compute as one merged model; both get autograd's gradients (fp64)."""
    both = {}
    for settle in ("sweep", "backprop"):
        model = grown(dtype=torch.float64, settle=settle)
        model.add_adapter("second", PCGrowConfig(locus=OTHER, settle=settle))
        model.base_model.set_adapter(["default", "second"])
        both[settle] = backward(model)
    assert len(both["sweep"]) == 8
    assert_all_close(both["sweep"], both["backprop"], "fp64 gradient")
    model = grown()
    train(model)
    model.add_adapter("second", PCGrowConfig(locus=OTHER))
    model.base_model.set_adapter(["default", "second"])
    train(model)
    together, before = logits(model), snapshot(model)
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), together, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert_same(before, snapshot(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), together, rtol=1e-5, atol=1e-5)


def test_overlapping_adapters_are_refused():
    """Two adapters with a node in common cannot be active together; the refusal changes nothing."""
    model = grown()
    model.add_adapter("second", PCGrowConfig(locus={1: [0], 2: [7]}))
    before, training = snapshot(model), set(trainable(model))
    with pytest.raises(ValueError, match="'default' and 'second' both grow expert 7 of layer 2"):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    assert [layer.active_adapters for layer in model.base_model.tuner_layers()] == [["default"]] * 2
    assert set(trainable(model)) == training
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlapping_adapters_merge(dtype, at_once):
    """Merged, adapters with nodes in common add up what each changes of the base; undone, every bit is back.

    Oracle: their differences from the base, added in fp64; where a single adapter writes, its own weights.
    """
    model = grown(dtype=dtype, init_weights=False)
    model.add_adapter("matrix", PCGrowConfig(parts={2: {7: ["down_proj"]}}, resolution="matrix", init_weights=False))
    model.add_adapter("second", PCGrowConfig(locus={1: [0], 2: [6, 7]}, init_weights=False))
    names, layers = ["default", "matrix", "second"], model.base_model.tuner_layers()
    before, want = snapshot(model), {}
    for layer, stack in product(layers, ("gate_up_proj", "down_proj")):
        base = getattr(layer.base_layer, stack).detach().clone()
        total, alone, writers = base.double(), base.clone(), torch.zeros(len(base))
        for name in [name for name in names if stack in layer.bank(name)]:
            places, weight = list(layer.grown[name]), layer.bank(name)[stack].detach()
            total[places] += weight.double() - base[places].double()
            alone[places] = weight.to(dtype)
            writers[places] += 1
        want[layer, stack] = total, alone, writers
    for merged in [names] if at_once else [[name] for name in names]:
        model.merge_adapter(merged)
    for (layer, stack), (total, alone, writers) in want.items():
        got = getattr(layer.base_layer, stack).detach()
        assert_close(stack, got, total, "fp32" if dtype == torch.float32 else "bf16")
        assert torch.equal(got[writers < 2], alone[writers < 2])
    assert max(int(writers.max()) for _, _, writers in want.values()) == 3
    model.unmerge_adapter()
    assert_same(before, snapshot(model))


def test_shrunk_adapter_merges_after_another():
    """A shrunk bank holds differences from the base, also while another adapter has written over it."""
    model = grown()
    train(model)
    shrink_adapter(model, bits=8)
    alone = {layer: layer.bank("default")["down_proj"][-1].clone() for layer in model.base_model.tuner_layers()}
    model.add_adapter("second", PCGrowConfig(locus={2: [7]}, init_weights=False))
    before = snapshot(model)
    model.merge_adapter(["second"])
    model.merge_adapter(["default"])
    layer = model.base_model.tuner_layers()[-1]
    base = before["base_model.model.model.layers.2.mlp.experts.base_layer.down_proj"][7]
    added = layer.bank("second")["down_proj"][0].detach() - base
    assert torch.equal(layer.bank("default")["down_proj"][-1], alone[layer])
    assert_close("both", layer.base_layer.down_proj[7].detach(), alone[layer] + added, "fp32")
    model.unmerge_adapter()
    assert_same(before, snapshot(model))


def test_second_adapter_on_further_layers():
    """A later adapter may grow layers that the first one left alone, and is trained there."""
    model = grown()
    model.add_adapter("second", PCGrowConfig(locus={0: [6]}))
    model.set_adapter("second")
    control = grown(locus={0: [6]}, settle="backprop")
    swept = {name.replace(".second.", ".default."): gradient for name, gradient in backward(model).items()}
    assert_all_close(swept, backward(control), "fp32")


def test_lora_on_attention_beside():
    """LoRA injected on attention first: both train in one sweep, with autograd's gradients (fp64)."""
    found = {}
    for settle in ("sweep", "backprop"):
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
        model = inject_adapter_in_model(lora, build(dtype=torch.float64), adapter_name="lora")
        found[settle] = backward(get_peft_model(model, PCGrowConfig(locus=LOCUS, settle=settle)))
    assert sum("lora_" in name for name in found["sweep"]) == 12
    assert sum("pcgrow_" in name for name in found["sweep"]) == 4
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@needs_native
def test_native_adapters():
    """transformers' own add_adapter: PCGROW and LoRA side by side on a plain model, both trained."""
    found = {}
    for settle in ("sweep", "backprop"):
        torch.manual_seed(0)
        model = build(dtype=torch.float64)
        model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="low")
        model.add_adapter(PCGrowConfig(locus=LOCUS, settle=settle), adapter_name="high")
        model.set_adapter(["low", "high"])
        found[settle] = backward(model)
    assert len(found["sweep"]) == 3 * 2 + 4
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@needs_native
def test_two_native_adapters():
    """Two PCGROW adapters by transformers' own add_adapter, each a tuner of its own, switch and train in turn."""
    model = build(dtype=torch.float64)
    model.add_adapter(PCGrowConfig(locus=LOCUS), adapter_name="one")
    model.add_adapter(PCGrowConfig(locus={0: [6], 2: [0, 1]}), adapter_name="two")
    for name, locus in (("two", {0: [6], 2: [0, 1]}), ("one", LOCUS)):
        model.set_adapter(name)
        control = grown(dtype=torch.float64, locus=locus, settle="backprop")
        expected = {k.removeprefix("base_model.model."): g for k, g in backward(control).items()}
        assert_all_close(
            {k.replace(f".{name}.", ".default."): g for k, g in backward(model).items()}, expected, "fp64 gradient"
        )


def test_added_while_another_is_merged(tmp_path):
    """A new adapter is of the base as it is without the merged one, which stays merged, bit for bit."""
    model, plain = grown(), logits(build())
    train(model)
    model.merge_adapter()
    merged = logits(model)
    model.add_adapter("second", PCGrowConfig(locus={1: [1, 4], 2: [5]}))
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    model.base_model.set_adapter("second")
    assert torch.equal(logits(model), plain)
    # what it notes of its base is that one too
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / "second")), plain)
