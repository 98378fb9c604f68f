"""Liger's patch of the experts goes round grown ones and is refused; its other patches are not."""

import importlib

import pytest
import torch
from peft import get_peft_model
from transformers.integrations.liger import apply_liger_kernel

from peft_pcgrow import PCGrowConfig, measure_errors
from tiny import LOCUS, build, dense, grown, logits, tokens

pytest.importorskip("liger_kernel")
ADVICE = r"liger_kernel_config=\{'swiglu': False\}"
# those that run without a GPU: none
OTHERS = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": False}
PATCHED = ["qwen3_moe", "mixtral", "deepseek_v3"]


@pytest.fixture(autouse=True)
def modeling():
    """Liger patches transformers' modules for the whole process: put back what was there."""
    names = ("llama", *PATCHED)
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in names]
    held = [dict(vars(module)) for module in modules]
    yield
    for module, before in zip(modules, held, strict=True):
        vars(module).update(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHED)
def test_experts_patched_before(name):
    base = build(name)
    apply_liger_kernel(base, OTHERS)
    with pytest.raises(ValueError, match=rf"experts \(\w+\) has its forward replaced, by Liger's.*{ADVICE}"):
        get_peft_model(base, PCGrowConfig(locus=LOCUS))
    with pytest.raises(ValueError, match=rf"was made with Liger's experts.*{ADVICE}"):
        get_peft_model(build(name), PCGrowConfig(locus=LOCUS))


@pytest.mark.parametrize("name", PATCHED)
def test_experts_patched_after(name):
    """As the Trainer does it when it begins to train: refused in training, in evaluation, and by a new map."""
    model = grown(name=name)
    apply_liger_kernel(model, OTHERS)
    for training in (True, False):
        with pytest.raises(RuntimeError, match=rf"layer 1 had their forward replaced after get_peft_model.*{ADVICE}"):
            model.train(training)(input_ids=tokens(), labels=tokens())
    with pytest.raises(ValueError, match=rf"has its forward replaced, by Liger's.*{ADVICE}"):
        measure_errors(model, [tokens()], progress=False)


def test_mlps_patched_before():
    base = dense()
    apply_liger_kernel(base, OTHERS)
    with pytest.raises(ValueError, match=ADVICE):
        get_peft_model(base, PCGrowConfig(locus={1: [0]}))


@pytest.mark.parametrize("name", PATCHED)
def test_without_swiglu(name):
    """Before or after: the same bits, and norms that run Liger's kernel (which takes a GPU) are accepted."""
    want = logits(grown(name=name))
    base = build(name)
    apply_liger_kernel(base, {**OTHERS, "swiglu": False})
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    apply_liger_kernel(model, {**OTHERS, "swiglu": False})
    assert torch.equal(logits(model), want)
    apply_liger_kernel(model, {**OTHERS, "swiglu": False, "rms_norm": True})
    assert repr(model.get_base_model().model.layers[1].input_layernorm).startswith("LigerRMSNorm")
    get_peft_model(model.unload(), PCGrowConfig(locus=LOCUS))
