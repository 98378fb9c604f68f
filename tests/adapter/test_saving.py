"""Saving and loading an adapter, by every loader that users have."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from loaders import LOADERS
from peft_pcgrow import PCGrowConfig, measure_errors
from tiny import LOCUS, assert_same, build, logits, needs_native, snapshot, tokens, train


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "deepseek_v3"])
def base(request, tmp_path):
    """Folder of a saved base model."""
    build(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base, tmp_path, **settings) -> nn.Module:
    """A trained adapter on the model in folder `base`, saved in tmp_path / "adapter"."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=settings.pop("dtype", torch.float32))
    model = get_peft_model(model, PCGrowConfig(**{"locus": LOCUS, **settings}))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_agree(base, loader, tmp_path):
    """Every loader gives a model with the trained model's logits, bit for bit."""
    expected = logits(trained(base, tmp_path))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    loaded = LOADERS[loader](base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    assert not torch.equal(expected, plain)
    assert not loaded.training


@pytest.mark.parametrize("loader", LOADERS)
def test_layers_of_two_digits(loader, tmp_path):
    """Files hold layers sorted as text, 10 before 2; models of more than ten layers load all the same."""
    build(num_hidden_layers=12).save_pretrained(tmp_path / "base")
    expected = logits(trained(tmp_path / "base", tmp_path, locus={2: [1, 4], 10: [0], 11: [3]}))
    assert torch.equal(logits(LOADERS[loader](tmp_path / "base", tmp_path / "adapter")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_bf16_base(loader, tmp_path):
    """fp32 banks on a bf16 base come back as they were."""
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    expected = logits(trained(tmp_path / "base", tmp_path, dtype=torch.bfloat16))
    assert expected.dtype == torch.bfloat16
    assert torch.equal(logits(LOADERS[loader](tmp_path / "base", tmp_path / "adapter")), expected)


@pytest.mark.slow
def test_map_is_not_needed_to_load(tmp_path):
    """The resolved locus is in adapter_config.json; the map may be gone."""
    build().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    measure_errors(model, [tokens()], progress=False).save(tmp_path / "map")
    model = get_peft_model(model, PCGrowConfig(error_map=tmp_path / "map", budget=0.2))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "map")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["locus"] == model.peft_config["default"].locus
    assert written["error_map"] is None


def test_config_round_trip(tmp_path):
    """A config read back equals the one saved, but for what PEFT notes on saving."""
    model = get_peft_model(build(), PCGrowConfig(locus=LOCUS, modules_to_save=["lm_head"], settle="backprop"))
    model.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    loaded.inference_mode, loaded.auto_mapping = False, None
    assert loaded == model.peft_config["default"]


@pytest.mark.slow
@pytest.mark.parametrize("further", [["lm_head"], ["post_attention_layernorm"]])
def test_modules_to_save(further, tmp_path):
    """Further modules are trained, saved and loaded with the banks."""
    build().save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", tmp_path, modules_to_save=further)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    fresh = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "base").named_parameters())
    mine = {name: tensor for name, tensor in saved.items() if further[0] in name}
    assert mine
    for name, tensor in mine.items():
        assert not torch.equal(tensor, fresh[name.removeprefix("base_model.model.")]), name
    for loader in ("PeftModel", "low_cpu_mem_usage", "AutoPeftModel"):
        assert torch.equal(logits(LOADERS[loader](tmp_path / "base", tmp_path / "adapter")), logits(model)), loader


def test_saved_keys(tmp_path):
    """The file holds the banks and their seals and nothing of the base; loading changes no key."""
    build().save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", tmp_path)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.{}.mlp.experts.pcgrow_"
    names = ("gate_up_proj.weight", "down_proj.weight", "seal._extra_state")
    assert set(saved) == {prefix.format(layer) + name for layer in LOCUS for name in names}
    assert saved[prefix.format(2) + "gate_up_proj.weight"].shape == (3, 32, 32)
    assert_same(saved, get_peft_model_state_dict(model))
    loaded = LOADERS["PeftModel"](tmp_path / "base", tmp_path / "adapter")
    assert list(loaded.state_dict()) == list(model.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    assert_same(saved, load_file(tmp_path / "again" / "adapter_model.safetensors"))


@pytest.mark.slow
def test_loaded_adapter_trains_on(tmp_path):
    """is_trainable=True: training a loaded adapter further equals training on without saving."""
    build().save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert train(loaded, seed=7) == train(model, seed=7)
    assert torch.equal(logits(loaded), logits(model))
    frozen = LOADERS["PeftModel"](tmp_path / "base", tmp_path / "adapter")
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad]


@pytest.mark.slow
def test_two_adapters_from_files(tmp_path):
    """load_adapter puts a second adapter beside the first; each keeps its own function, saved in folders of its own."""
    build().save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", tmp_path)
    first = logits(model)
    model.add_adapter("other", PCGrowConfig(locus={0: [5], 2: [1]}))
    model.set_adapter("other")
    train(model)
    other = logits(model)
    model.save_pretrained(tmp_path / "both")
    loaded = LOADERS["PeftModel"](tmp_path / "base", tmp_path / "both")
    loaded.load_adapter(tmp_path / "both" / "other", adapter_name="other")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), other)


@needs_native
def test_native_save(tmp_path):
    """An adapter added and saved by transformers alone is loaded by transformers and by PEFT."""
    build().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(PCGrowConfig(locus=LOCUS))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    for loader in LOADERS.keys() - {"AutoPeftModel"}:  # which asks for the model class that only PEFT notes
        assert torch.equal(logits(LOADERS[loader](tmp_path / "base", tmp_path / "adapter")), logits(model)), loader


@pytest.mark.slow
def test_saving_after_a_merge(tmp_path):
    """A merged adapter saves the same file, and the merged base saved as a plain model computes the same."""
    build().save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", tmp_path)
    expected, before = logits(model), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert_same(before, load_file(tmp_path / "merged" / "adapter_model.safetensors"))
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert_same(snapshot(plain), snapshot(loaded))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
