"""What an adapter has from its map beside weights: an adapter made of a copy of its config has it too, or says so."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peft_pcgrow import PCGrowConfig, measure_errors
from tiny import LOCUS, assert_same, build, domain, logits, retain, spawned, spawning, train


def read_back(folder, **changes) -> PeftModel:
    """A trained model whose map is no longer at hand."""
    model = spawned(gate_fpr=0.3, **changes)
    train(model, lr=3e-2, texts=domain)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(build(), folder, is_trainable=True)


def copies(config, folder):
    """Ways to a config like another adapter's."""
    return {
        "the same object": lambda: config,
        "a copy": lambda: copy.deepcopy(config),
        "its file": lambda: PCGrowConfig.from_pretrained(folder),
    }


def given(model, adapter):
    """Gates and directions, by name without the adapter's."""
    return {
        name.replace(f".{adapter}", ""): tensor
        for name, tensor in model.named_buffers()
        if name.endswith(f".{adapter}") and ("gate" in name or "protect" in name)
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["the same object", "a copy", "its file"])
def test_a_reference_made_of_a_trained_adapter(way, tmp_path):
    """As TRL's trainers make one: a second adapter of the same config, then all parameters, not buffers, are copied."""
    model = read_back(tmp_path, protect=0.5)
    trained = logits(model)
    model.add_adapter("ref", copies(model.peft_config["default"], tmp_path)[way]())
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    assert_same(given(model, "default"), given(model, "ref"))
    assert given(model, "ref")
    assert torch.equal(logits(model), trained)
    model.set_adapter("ref")
    assert torch.equal(logits(model), trained)
    with model.disable_adapter():
        assert not torch.equal(logits(model), trained)
    train(model, steps=1)  # protected as the first
    assert_same(given(copy.deepcopy(model), "ref"), given(model, "ref"))


@pytest.mark.slow
def test_gates_of_another_map_are_not_taken(tmp_path):
    """Same nodes, same base, other text: other gates."""
    model = read_back(tmp_path)
    texts = [domain(64, seed=7)], [retain(64, seed=7)]
    emap = measure_errors(build(), texts[0], retain=texts[1], window=8, gradients=False, progress=False)
    other = spawned(error_map=emap)
    mine, theirs = model.peft_config["default"], other.peft_config["default"]
    assert (mine.locus, mine.spawned, mine.base) == (theirs.locus, theirs.spawned, theirs.base)
    assert mine.fingerprint != theirs.fingerprint
    other.save_pretrained(tmp_path / "other")
    model.add_adapter("other", PCGrowConfig.from_pretrained(tmp_path / "other"))
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"gates of adapter 'other' were never set \(layer 1\)"):
        logits(model)
    model.load_adapter(tmp_path / "other", "loaded")
    model.set_adapter("loaded")
    assert torch.equal(logits(model), logits(other))


@pytest.mark.slow
def test_unknown_gates_are_an_error_in_every_forward(tmp_path):
    read_back(tmp_path)
    config = PCGrowConfig.from_pretrained(tmp_path)
    model = get_peft_model(build(), config)
    for mode in (model.eval, model.train):
        mode()
        with pytest.raises(RuntimeError, match="never set"), torch.no_grad():
            model(input_ids=domain())
    with pytest.raises(RuntimeError, match="never set"):
        model.eval().generate(input_ids=domain(), max_new_tokens=2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build()))
    found = get_peft_model_state_dict(PeftModel.from_pretrained(build(), tmp_path))
    set_peft_model_state_dict(model, found)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(build(), tmp_path)))
    # known ones can be lost again
    for layer in model.base_model.tuner_layers():
        layer.pcgrow_gate_direction["default"].zero_()
    with pytest.raises(RuntimeError, match="never set"):
        logits(model)


def test_directions_that_were_never_set(tmp_path):
    """A protected adapter does not train unprotected."""
    emap = spawning().error_map
    model = get_peft_model(build(), PCGrowConfig(error_map=emap, locus=LOCUS, protect=0.5))
    model.save_pretrained(tmp_path)
    config = PCGrowConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    other = get_peft_model(build(), config)
    logits(other)
    with pytest.raises(RuntimeError, match=r"protect= keeps updates of adapter 'default' off was never set"):
        train(other)
    model.add_adapter("again", config)
    assert_same(given(model, "default"), given(model, "again"))
