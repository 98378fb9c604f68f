"""Shrunk adapters: saved and loaded, copied, merged, beside others, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_packed import packed
from test_shrink import NAMES, PARTS, banks, bases, layers, trained
from transformers import AutoModelForCausalLM

from close import assert_close
from loaders import LOADERS
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.compress.shrink import shrink_adapter
from tiny import ARCHITECTURES, LOCUS, assert_same, backward, build, grown, logits, snapshot, tokens, train

# ---- saving and loading


@pytest.fixture(params=NAMES)
def base(request, tmp_path):
    build(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def shrunk(base, tmp_path, dtype=torch.float32, **settings) -> PeftModel:
    """A shrunk adapter on the model in folder `base`, saved in tmp_path / "adapter"."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), PCGrowConfig(locus=LOCUS))
    train(model, steps=5)
    shrink_adapter(model, **settings or {"target": 0.3})
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"target": 0.3}, {"bits": 4}])
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_agree(base, loader, settings, tmp_path):
    """Every loader gives a model with the shrunk model's logits, bit for bit, and nothing of it trains."""
    model = shrunk(base, tmp_path, **settings)
    loaded = LOADERS[loader](base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(base)))
    assert not [name for name, p in loaded.named_parameters() if p.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_bf16_base(loader, tmp_path):
    """On a base in bf16, decoded weights are rounded as whole banks are, and packed bytes are not cast."""
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = shrunk(tmp_path / "base", tmp_path, dtype=torch.bfloat16)
    loaded = LOADERS[loader](tmp_path / "base", tmp_path / "adapter")
    assert logits(loaded).dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.slow
def test_saved_again(base, tmp_path):
    """A loaded shrunk adapter saves the same file; the config says how it is stored, on one short line a stack."""
    model = shrunk(base, tmp_path)
    loaded = LOADERS["PeftModel"](base, tmp_path / "adapter")
    assert list(loaded.state_dict()) == list(model.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert_same(saved, load_file(tmp_path / "again" / "adapter_model.safetensors"))
    assert {name.rpartition(".")[2] for name in saved} == {"packed", "_extra_state"}
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["shrunk"]
    assert written == model.peft_config["default"].shrunk
    assert written["layers"].keys() == {"1", "2"}


@pytest.mark.slow
def test_altered_bytes_are_noticed(base, tmp_path):
    shrunk(base, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = load_file(file)
    name = next(name for name in saved if name.endswith("down_proj.packed"))
    saved[name][5] ^= 1
    save_file(saved, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="altered"):
        LOADERS["PeftModel"](base, tmp_path / "adapter")


@pytest.mark.slow
def test_altered_config_is_noticed(base, tmp_path):
    shrunk(base, tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    fresh = AutoModelForCausalLM.from_pretrained(base)
    for change in ({"kind": "bits", "layers": {"1": config["shrunk"]["layers"]["1"]}}, {"kind": "words"}, "3 bits"):
        file.write_text(json.dumps({**config, "shrunk": change}))
        with pytest.raises(ValueError, match="shrunk"):
            PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    stacks = dict.fromkeys(config["shrunk"]["layers"]["2"], "4")
    file.write_text(json.dumps({**config, "shrunk": {"kind": "bits", "layers": {"1": stacks, "2": stacks}}}))
    with pytest.raises(ValueError, match=r"shrunk: .* in layer 1: no adapter of this base has that"):
        LOADERS["PeftModel"](base, tmp_path / "adapter")


# ---- copying, switching, merging, leaving


@pytest.mark.slow
def test_copies_and_moves():
    """Copied, pickled, cast and cast back, and with a base that has changed, it decodes for itself."""
    model = trained()
    shrink_adapter(model, bits=3)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    with torch.no_grad():
        for layer in layers(twin):
            layer.base_layer.down_proj.mul_(2)
    moved = banks(twin)
    for key, weight in banks(model).items():
        deltas = weight - bases(model)[key]
        torch.testing.assert_close(moved[key] - bases(twin)[key], deltas, rtol=1e-4, atol=1e-6)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert banks(half)["1 down_proj"].dtype == torch.bfloat16
    fresh = copy.deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(fresh(input_ids=tokens(seed=99), use_cache=False).logits, expected)
    measure_errors(fresh, [tokens()], progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_merging(name):
    """Merging and unmerging are as for whole banks: exact both ways."""
    model = trained(name=name)
    shrink_adapter(model, bits=4)
    before, apart, weights = snapshot(model), logits(model), banks(model)
    model.merge_adapter()
    assert_same(weights, bases(model))
    assert_same(weights, banks(model))
    torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), apart)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(name)))
    assert torch.equal(logits(model), apart)
    plain = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(plain), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_packed_experts(name):
    """On a base that is packed itself, deltas are taken from what it decodes to, and text is measured too."""
    base = packed(build(name, implementation="eager"))
    model = get_peft_model(copy.deepcopy(base), PCGrowConfig(locus={1: [0, 2], 2: [3]}))
    train(model, steps=5)
    before = banks(model)
    report = shrink_adapter(model, bits=8, batches=[tokens(8)])
    for layer in layers(model):
        for name, held in layer.pieces(layer.births["default"]).items():
            was, now = before[f"{layer.layer_index} {name}"], layer.bank("default")[name]
            born = expert_stacks(layer.base_layer)[name][held.experts]
            assert float((now - was).norm()) < 0.05 * float((was - born).norm())
    assert 0 < report.error < 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


@pytest.mark.slow
@pytest.mark.parametrize("resolution", ["expert", *PARTS])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_measured_like_a_whole_one(name, resolution):
    """The map of a shrunk adapter is that of a whole one with the same weights."""
    settings = {} if resolution == "expert" else {"locus": None, **PARTS[resolution]}
    model = trained(name=name, **settings)
    shrink_adapter(model, bits=3)
    whole = grown(name=name, **settings)
    for layer, other in zip(layers(whole), layers(model), strict=True):
        for stack, weight in other.bank("default").items():
            layer.bank("default")[stack].data = weight.clone()
    maps = [measure_errors(each, [tokens()], progress=False) for each in (model, whole)]
    assert torch.equal(maps[0].mass, maps[1].mass)
    assert float(maps[0].mass.sum()) > 0
    for stack, gradient in maps[0].gradient.items():
        assert torch.equal(gradient, maps[1].gradient[stack])


@pytest.mark.slow
def test_beside_another_adapter():
    """A second adapter trains beside a shrunk one, which keeps its bits; each is switched and deleted by itself."""
    model = trained()
    shrink_adapter(model, bits=4)
    first = logits(model)
    model.add_adapter("other", PCGrowConfig(locus={0: [5], 2: [1]}))
    assert torch.equal(logits(model), first)
    before = banks(model)
    model.base_model.set_adapter(["default", "other"])
    gradients = backward(model)
    assert len(gradients) == 4
    assert all(".other." in name for name in gradients)
    train(model)
    assert_same(before, {k: v for k, v in banks(model).items() if k in before})
    both = logits(model)
    model.set_adapter("other")
    alone = logits(model)
    assert not torch.equal(alone, both)
    report = shrink_adapter(model, "other", bits=8)
    assert report.error > 0
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    model.eval()
    assert not [name for name, _ in model.named_buffers() if ".default" in name]
    assert float((logits(model) - alone).norm()) < 0.1 * float((alone - logits(build())).norm())


# ---- what is refused


@pytest.mark.slow
def test_training_is_refused(tmp_path):
    build().save_pretrained(tmp_path / "base")
    model = shrunk(tmp_path / "base", tmp_path)
    model.train()
    with pytest.raises(RuntimeError, match=r"'default' is shrunk and cannot be trained.*Train the adapter that it was"):
        model(input_ids=tokens(), labels=tokens())
    with torch.no_grad():
        model(input_ids=tokens())
    with pytest.raises(ValueError, match="is shrunk and cannot be trained"):
        model.set_requires_grad("default", True)
    with pytest.raises(ValueError, match="grown experts of this model are shrunk"):
        create_pcgrow_optimizer(model, lr=0.02)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="is shrunk and cannot be trained"):
        PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.slow
def test_refusals_change_nothing():
    model = trained()
    before = snapshot(model)
    for settings, match in (
        ({"bits": 5}, "2, 3, 4, 8 bits"),
        ({"bits": 3, "target": 0.9}, "give one of"),
        ({"target": 1.5}, "target must be a share"),
        ({"target": 0.1}, "at least 0.141"),
        ({"bits": 3, "batches": []}, "no token to predict"),
        ({"bits": 3, "batches": [tokens(2, 1)]}, "no token to predict"),
        ({"bits": 3, "batches": [tokens().float()]}, "integers"),
        ({"adapter_name": "law"}, "no grown adapter 'law' to shrink; it has 'default'"),
    ):
        with pytest.raises(ValueError, match=match):
            shrink_adapter(model, **settings)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        shrink_adapter(model, bits=3)
    model.unmerge_adapter()
    assert_same(before, snapshot(model))
    model.add_adapter("other", PCGrowConfig(locus={0: [5]}))
    with pytest.raises(ValueError, match=r"set_adapter\('other'\)"):
        shrink_adapter(model, "other", bits=3, batches=[tokens()])
    model.delete_adapter("other")
    with torch.no_grad():
        layers(model)[1].bank("default")["down_proj"][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layer 1, down_proj .* not finite"):
        shrink_adapter(model, bits=3)
    for other in (build(), get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match="has no grown adapter"):
            shrink_adapter(other, bits=3)


@pytest.mark.slow
def test_factors_are_gone(tmp_path):
    with pytest.raises(TypeError, match=r"energy=...\) is gone: .*give bits= or target="):
        shrink_adapter(trained(), energy=0.9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bit'"):
        shrink_adapter(trained(), bit=4)
    model = trained()
    shrink_adapter(model, bits=4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"kind": "bits"', '"kind": "rank"'))
    with pytest.raises(ValueError, match=r"shrunk to factors \(energy=\), which are no longer read: shrink .* again"):
        PeftModel.from_pretrained(build(), tmp_path)


@pytest.mark.slow
def test_twice_is_refused():
    model = trained()
    shrink_adapter(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="is shrunk and cannot be shrunk again"):
        shrink_adapter(model, bits=2)
    assert_same(before, snapshot(model))


def test_a_config_that_says_shrunk_starts_nothing():
    config = PCGrowConfig(locus=LOCUS, shrunk={"kind": "bits", "layers": {}})
    with pytest.raises(ValueError, match="set by shrink_adapter"):
        get_peft_model(build(), config)


@pytest.mark.slow
def test_loaded_by_transformers_alone(tmp_path):
    """A native adapter is shrunk too."""
    build().save_pretrained(tmp_path / "base")
    trained().save_pretrained(tmp_path / "adapter")
    model = LOADERS["load_adapter"](tmp_path / "base", tmp_path / "adapter")
    before = logits(model)
    report = shrink_adapter(model, bits=8, batches=[tokens()])
    assert report.loss_base is not None
    assert_close("logits", logits(model), before, "bf16")
