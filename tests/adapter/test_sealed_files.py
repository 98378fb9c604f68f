"""What a seal survives: casts, copies, merges and every way of saving; and what files say to those who lack us."""

import copy
import pickle
import shutil

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from test_seal import DAMAGE, change, change_config, keep, load
from torch import nn
from transformers import AutoModelForCausalLM

import fresh
from peft_pcgrow.compress.shrink import shrink_adapter
from tiny import LOCUS, assert_same, build, grown, logits, snapshot, train


@pytest.fixture
def saved(tmp_path):
    """Folders of a base and of a trained adapter, with a further module."""
    return keep(tmp_path, locus=LOCUS, modules_to_save=["lm_head"])


# ---- what a seal survives


@pytest.mark.slow
def test_casts_and_copies(tmp_path):
    """Saved in half precision, after a merge, from a copy, by another name: it loads."""
    model = grown(modules_to_save=["lm_head"])
    train(model)
    made = {
        "half": copy.deepcopy(model).to(torch.bfloat16),
        "copied": pickle.loads(pickle.dumps(model)),
        "merged": copy.deepcopy(model),
        "trained on": copy.deepcopy(model),
    }
    made["merged"].merge_adapter()
    train(made["trained on"], seed=9)
    for name, each in made.items():
        each.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(build(), tmp_path / name, adapter_name="renamed")
        state = get_peft_model_state_dict(loaded, adapter_name="renamed")
        assert all(
            torch.equal(t, state[key].to(t.dtype))
            for key, t in load_file(next((tmp_path / name).glob("*.safetensors"))).items()
            if "seal" not in key
        )
    assert_same(get_peft_model_state_dict(made["copied"]), get_peft_model_state_dict(model))


@pytest.mark.slow
def test_a_native_adapter_in_half_precision(saved):
    """Values that the receiver cannot hold are not compared; those that it can are, before it is cast."""
    model = AutoModelForCausalLM.from_pretrained(saved / "base", dtype=torch.bfloat16)
    model.load_adapter(saved / "adapter")
    logits(model)
    cast = AutoModelForCausalLM.from_pretrained(saved / "base")
    cast.load_adapter(saved / "adapter")
    logits(cast.to(torch.bfloat16))


@pytest.mark.slow
def test_native_and_trainable(saved):
    """Nothing tells the tuner that the loader is done: the first forward compares."""
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    model.load_adapter(saved / "adapter", is_trainable=True)
    logits(model)
    change(saved, DAMAGE["one value"])
    for use in (logits, get_peft_model_state_dict, lambda model: model.to(torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(saved / "base")
        model.load_adapter(saved / "adapter", is_trainable=True)
        with pytest.raises(ValueError, match="does not have the checksum"):
            use(model)


@pytest.mark.slow
def test_states_of_ones_own():
    """A model's own state dict goes back into it, whole or in part, and into one that grows the same."""
    model = grown()
    before = snapshot(model)
    train(model)
    assert model.load_state_dict(before) == nn.modules.module._IncompatibleKeys([], [])
    ours = {name: tensor for name, tensor in before.items() if "pcgrow" in name}
    model.load_state_dict(ours, strict=False)
    assert_same(before, snapshot(model))
    grown().load_state_dict(model.state_dict())
    shrunk = grown()
    train(shrunk)
    shrink_adapter(shrunk, bits=8)
    with pytest.raises(ValueError, match=r"layer 1 has shrunk=.*shrunk="):
        shrunk.load_state_dict(before)


@pytest.mark.slow
def test_injected_by_hand(tmp_path):
    """set_peft_model_state_dict on a model without PEFT's wrapper."""
    keep(tmp_path, locus=LOCUS)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    model = inject_adapter_in_model(config, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    set_peft_model_state_dict(model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert torch.equal(logits(model), logits(load(tmp_path)))


# ---- who does not know the method


@pytest.mark.slow
def test_files_say_what_to_import(saved):
    """PEFT alone fails with a text that says what to do, and so does transformers; the model card says it too."""
    card = (saved / "adapter" / "README.md").read_text()
    assert card.count("import peft_pcgrow") == 1
    load(saved).save_pretrained(saved / "adapter")
    assert (saved / "adapter" / "README.md").read_text().count("import peft_pcgrow") == 1
    for statement in (
        "from peft import AutoPeftModelForCausalLM as Auto",
        "from transformers import AutoModelForCausalLM as Auto",
    ):
        done = fresh.run(f"{statement}; Auto.from_pretrained({str(saved / 'adapter')!r})")
        assert done.returncode
        assert "pip install peft-pcgrow" in done.stderr.splitlines()[-1]
        assert "import peft_pcgrow" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_files_from_before_that(saved):
    """A config that calls the method by its short name loads alike."""
    expected = logits(load(saved))
    change_config(saved, peft_type="PCGROW")
    assert torch.equal(logits(load(saved)), expected)


@pytest.mark.slow
def test_a_base_in_another_folder(saved):
    """Where the base lies is no part of what it is."""
    shutil.move(saved / "base", saved / "moved")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "moved"), saved / "adapter")
    assert not torch.equal(logits(model), logits(build()))
