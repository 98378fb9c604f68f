"""Dense MLPs compressed, and on bases that another library quantized."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from close import assert_close
from mlp_models import CASES, grown, made
from peft_pcgrow import compress
from peft_pcgrow.packed.forms import Form
from tiny import COMMON, assert_same, dense, domain, logits, retain, snapshot, tokens, train


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_compress(name, tmp_path):
    """Dense MLPs are packed, saved, loaded, and grown on; a stage taken back leaves all as it was."""
    model, _ = made(name)
    known = domain(seed=1)
    train(model, steps=30, lr=3e-3, texts=lambda seed: known)
    before, weights = logits(model, known), snapshot(model)
    texts = {"retain": [known], "progress": False}
    plan = compress.plan(model, target=0.3, methods=("quantize", "thin"), **texts)
    harsh = compress.plan(model, target=0.05, methods=("thin",), **texts)
    assert torch.equal(logits(model, known), before)
    model, report = compress.apply(model, harsh, max_loss_rise=1e-3)
    assert report.stopped
    assert_same(weights, {key: value for key, value in snapshot(model).items() if key in weights})
    assert torch.equal(logits(model, known), before)
    model, report = compress.apply(model, plan)
    assert report.bytes_after <= 0.3 * report.bytes_before
    assert not any(f"mlp.{layer}." in key for layer in CASES[name][2] for key in model.state_dict())
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    packed = logits(loaded)
    assert torch.equal(packed, logits(model))
    loaded = grown(loaded, "dense")
    assert_close("logits", logits(loaded), packed, "fp32")
    train(loaded)
    assert not torch.allclose(logits(loaded), packed)


def test_thinned_mlps_are_plain_checkpoints(tmp_path):
    model = dense()
    plan = compress.plan(model, target=0.5, methods=("thin",), retain=[retain()], progress=False)
    for place, node in enumerate(plan.nodes):
        plan.nodes[place] = replace(node, form=Form(neurons=32), after=node.before // 2)
    compress.apply(model, plan)
    compress.export_plain(model, tmp_path / "plain", [retain()])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.intermediate_size == 32
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.slow
def test_base_in_four_bits(tmp_path):
    """Linear layers that bitsandbytes quantized: banks hold their decoded weights, and merging is refused."""
    pytest.importorskip("bitsandbytes")
    # bitsandbytes' kernel takes rows of whole blocks of 64
    LlamaForCausalLM(LlamaConfig(**{**COMMON, "hidden_size": 64}, intermediate_size=128)).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    before = logits(model)
    with pytest.raises(ValueError, match="quantized in another way"):
        compress.quantize_experts(model)
    with pytest.raises(ValueError, match="quantized in another way"):
        compress.plan(model, target=0.5, retain=[retain()])
    model = grown(model, "dense")
    # the base's own products may be in bf16
    assert_close("logits", logits(model), before, "bf16")
    losses = train(model, steps=5, texts=lambda seed: tokens(seed=1))  # one batch: others have other losses
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="the base was loaded quantized"):
        model.merge_adapter()
