"""Packed checkpoints are sealed: what changed in their files is refused, and nobody reads them as something else."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_packed_saving import compressed, saved, written
from transformers import AutoModel, AutoModelForCausalLM

import fresh
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.packed.packed_experts import PREFIX
from peft_pcgrow.packed.quantize import quantize_experts
from tiny import LOCUS, build, dense, logits, train


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.mark.slow
def test_changed_bytes(tmp_path):
    """One byte at a time, anywhere in the files: the model that was saved, or none."""
    want = logits(saved(tmp_path / "good"))
    drawn, refused, rounds = random.Random(0), 0, 48
    for number in range(rounds):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        # most bytes of the weights' file are no tensor of experts, and its header is small
        file = weights(folder) if number % 2 else folder / "config.json"
        held = bytearray(file.read_bytes())
        place = drawn.randrange(6000 if number % 4 == 1 else len(held))
        held[place] ^= 1 << drawn.randrange(7)
        file.write_bytes(held)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        except Exception:
            refused += 1
        else:
            assert torch.equal(logits(loaded), want), (file.name, place)
    # white space of a config.json means nothing
    assert refused > rounds * 0.7


@pytest.mark.slow
@pytest.mark.parametrize("part", ["experts", "router", "head"])
def test_altered_tensors(part, tmp_path):
    """With files that are whole, for all kinds of tensors, whatever dtype and devices they are read to."""
    saved(tmp_path)
    tensors = load_file(weights(tmp_path))
    key = next(k for k in tensors if {"experts": PREFIX, "router": "gate.weight", "head": "lm_head"}[part] in k)
    tensors[key].view(-1)[7] += 1
    save_file(tensors, weights(tmp_path), {"format": "pt"})
    for settings in ({}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="not those that this config"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(num_experts_per_tok=2),
        lambda config: config.update(rms_norm_eps=1e-3),
        lambda config: config.update(dtype="bfloat16"),
        lambda config: config["quantization_config"].update(half="float16"),
        lambda config: config["quantization_config"].update(tensors="0" * 64),
        lambda config: config["quantization_config"].pop("facts"),
        lambda config: config["quantization_config"].pop("tensors"),
        lambda config: config["quantization_config"].update(version=1),
    ],
)
def test_altered_config(change, tmp_path):
    """What the config says is sealed too; there is no way to ask for a file without a seal."""
    saved(tmp_path)
    config = written(tmp_path)
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is not what was saved|has no seal"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_files_of_two_models(tmp_path):
    saved(tmp_path / "one")
    other = build()
    with torch.no_grad():
        other.lm_head.weight += 0.01
    quantize_experts(other)
    other.save_pretrained(tmp_path / "two")
    shutil.copy(weights(tmp_path / "two"), tmp_path / "one")
    with pytest.raises(ValueError, match="is another checkpoint's"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "one")


@pytest.mark.slow
def test_settings_by_keyword_and_saved_again(tmp_path):
    """A config that is changed for a load is no altered file; and what was changed on purpose is sealed anew."""
    model = saved(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", use_cache=False, num_experts_per_tok=2)
    assert loaded.config.num_experts_per_tok == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert written(tmp_path / "one") == written(tmp_path / "two")
    with torch.no_grad():
        loaded.lm_head.weight += 1
    loaded.save_pretrained(tmp_path / "three", max_shard_size="20KB", save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "three")
    assert torch.equal(logits(again), logits(loaded))
    assert not torch.equal(logits(again), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"tie_word_embeddings": True}, {}], ids=["tied", "without head"])
def test_other_ways_to_hold_a_model(change, tmp_path):
    model = build(**change)
    quantize_experts(model)
    model.save_pretrained(tmp_path)
    if change:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    else:
        loaded, facts = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert facts["unexpected_keys"] == {"lm_head.weight"}
        assert torch.equal(loaded(input_ids=torch.tensor([[5, 6]]))[0], model.model(torch.tensor([[5, 6]]))[0])


def test_damaged_models_are_not_sealed(tmp_path):
    model = compressed()
    base = find_experts(model).sites[1].base
    held = base._buffers[f"{PREFIX}down_proj"]
    for bad in (held.float(), held[:-1]):
        base._buffers[f"{PREFIX}down_proj"] = bad
        with pytest.raises(ValueError, match=r"down_proj of model.layers.1.mlp.experts holds .* instead of \d+ bytes"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_a_base_inside_an_adapter_is_not_saved(tmp_path):
    model = get_peft_model(compressed(), PCGrowConfig(locus=LOCUS))
    train(model)
    with pytest.raises(ValueError, match="has an adapter around it"):
        model.base_model.model.save_pretrained(tmp_path)
    model.unload().save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(compressed()))


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded", folder)
    except RuntimeError as error:
        print("refused")
"""


@pytest.mark.slow
def test_without_this_package(tmp_path):
    """transformers alone raises, and the report above its error says what to import."""
    models = [build(), build("gpt_oss"), build("mixtral"), dense()]
    for number, model in enumerate(models):
        quantize_experts(model)
        model.save_pretrained(tmp_path / str(number))
    done = fresh.run(WITHOUT, *(tmp_path / str(number) for number in range(len(models))))
    assert done.stdout.split() == ["refused"] * len(models), done.stderr[-4000:]
    assert done.stderr.count("import_peft_pcgrow") == len(models)
    assert "import peft_pcgrow" in (tmp_path / "0" / "config.json").read_text()
