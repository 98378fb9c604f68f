"""Layers that accelerate has put on devices, or offloaded: the same numbers, or refused by name."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, measure_errors
from tiny import LOCUS, backward, build, grown, logits, spawned, tokens, train

CPU = torch.device("cpu")
PLACES = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
PLACES |= {f"model.layers.{i}": "cpu" for i in range(3)}
pytestmark = pytest.mark.cpu("what accelerate does with a device_map of the CPU's")


@pytest.mark.parametrize("first", ["dispatched", "grown"])
def test_hooks_of_a_device_map(first):
    """A hook around every module's forward, before growing or after."""
    model = build()
    if first == "dispatched":
        dispatch_model(model, PLACES, force_hooks=True)
    adapted = get_peft_model(model, PCGrowConfig(locus=LOCUS))
    if first == "grown":
        dispatch_model(model, PLACES, force_hooks=True)
    assert torch.equal(logits(adapted), logits(grown()))
    assert_all_close(backward(adapted), backward(grown()), "fp32")


def test_offloaded_attention_and_head():
    """What is brought for each call of its modules, in the forward and when layers run again."""
    model = build()
    for module in (model.lm_head, model.model.layers[0].self_attn, model.model.layers[2].self_attn):
        cpu_offload(module, execution_device=CPU)
    found, want = (measure_errors(m, [tokens()], progress=False) for m in (model, build()))
    assert torch.equal(found.mass, want.mass)
    adapted = get_peft_model(model, PCGrowConfig(locus=LOCUS))
    got, gradients = backward(adapted), backward(grown())
    assert all(torch.equal(got[name], gradient) for name, gradient in gradients.items())
    assert torch.equal(logits(adapted), logits(grown()))
    adapted.zero_grad()
    assert train(adapted) == train(grown())


@pytest.mark.parametrize("make", [grown, spawned])
@pytest.mark.parametrize("what", ["layer", "base", "banks"])
def test_offloaded_after_growing(make, what):
    """No call brings a bank back, nor the stacks that it stands beside; their place would be computed with."""
    model = make(init_weights=False)
    layer = model.get_base_model().model.layers[1]
    experts = layer.mlp.experts
    whole = {"layer": layer, "base": experts.base_layer, "banks": experts.pcgrow_down_proj}[what]
    cpu_offload(whole, execution_device=CPU)
    for call in (lambda: logits(model), lambda: train(model), lambda: model.generate(tokens(1, 4), max_new_tokens=2)):
        with pytest.raises(
            RuntimeError, match=r"weights of layer 1 are offloaded.*keep the experts of layers that grow"
        ):
            call()


@pytest.mark.parametrize("place", ["cpu", "auto", PLACES])
def test_loaded_with_a_device_map(place, tmp_path):
    model = grown(init_weights=False)
    build().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=place)
    assert_close("logits", logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))), logits(model), "fp32")


def test_experts_on_disk(tmp_path):
    build().save_pretrained(tmp_path / "base")
    places = {**PLACES, "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "off")
    for call in (
        lambda: get_peft_model(base, PCGrowConfig(locus=LOCUS)),
        lambda: measure_errors(base, [tokens()], progress=False),
    ):
        with pytest.raises(ValueError, match=r"layers.1.mlp.experts are offloaded.*device_map that keeps its experts"):
            call()
