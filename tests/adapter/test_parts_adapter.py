"""Adapters of parts of experts do all that adapters of whole experts do."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from test_parts import PARTS, config, grown
from test_trainer import banks, fit, logged
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from close import assert_all_close, assert_close
from loaders import LOADERS
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks
from tiny import (
    LOCUS,
    assert_same,
    backward,
    build,
    logits,
    snapshot,
    tokens,
    train,
    trainable,
)

# ---- saving and loading


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_loaders_agree(name, loader, tmp_path):
    build(name).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = LOADERS[loader](tmp_path / "base", tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(build(name)))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a map", "locus="])
def test_parts_that_were_not_listed(how, tmp_path):
    """Chosen by a map, or all of them: what is saved loads, though files list parts in an order of their own."""
    if how == "a map":
        emap = measure_errors(build(), [tokens(8)], progress=False)
        given = {"error_map": emap, "budget": 0.3, "select": "removable"}
    else:
        given = {"locus": LOCUS}
    model = get_peft_model(build(), PCGrowConfig(resolution="matrix", **given))
    several = [parts for held in model.peft_config["default"].parts.values() for parts in held.values()]
    assert max(map(len, several)) > 1
    train(model, steps=2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path)), logits(model))


def test_config_round_trip(tmp_path):
    """What is saved names every part, sorted, and reads back equal."""
    given = {layer: {e: parts[::-1] for e, parts in reversed(chosen.items())} for layer, chosen in PARTS.items()}
    model = grown(parts=dict(reversed(given.items())))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    ordered = {str(a): {str(e): sorted(parts) for e, parts in chosen.items()} for a, chosen in PARTS.items()}
    assert json.dumps(written["parts"]) == json.dumps(ordered)
    assert written["locus"] == {layer: [int(e) for e in chosen] for layer, chosen in ordered.items()}
    loaded = PeftConfig.from_pretrained(tmp_path)
    loaded.inference_mode, loaded.auto_mapping = False, None
    assert loaded == model.peft_config["default"]
    for other in (
        pickle.loads(pickle.dumps(loaded)),
        copy.deepcopy(loaded),
        PCGrowConfig(**config().to_dict()),
    ):
        assert other.parts == ordered
    again = get_peft_model(build(), loaded)
    assert {k: p.shape for k, p in trainable(again).items()} == {k: p.shape for k, p in trainable(model).items()}


def test_an_altered_config_is_refused():
    config = grown().peft_config["default"]
    config.parts["2"]["5"] = ["down_proj"]
    with pytest.raises(ValueError, match="the adapter's config was altered"):
        get_peft_model(build(), config)


def test_all_parts_are_written_out():
    model = get_peft_model(build("mixtral"), PCGrowConfig(locus={1: [2]}, resolution="matrix"))
    assert model.peft_config["default"].parts == {"1": {"2": ["down_proj", "gate_up_proj"]}}
    assert "layer=1, grown={'default': [2]}, parts={'default': 2}" in repr(model)


# ---- switching, leaving, copying


@pytest.mark.slow
def test_leaving():
    model = grown()
    train(model)
    trained, plain = logits(model), build()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(copy.deepcopy(model).unload()), logits(plain))
    merged = model.merge_and_unload(safe_merge=True)
    assert list(merged.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(logits(merged), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_copies_train_apart():
    model = grown(dtype=torch.float64)
    expected = backward(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(backward(twin), expected)
        before = snapshot(model)
        train(twin)
        assert_same(before, snapshot(model))
        assert not torch.equal(logits(twin), logits(model))


@pytest.mark.slow
def test_beside_whole_experts():
    """Two adapters act together on experts of their own, at resolutions of their own; not on the same expert."""
    model = grown(dtype=torch.float64)
    model.add_adapter("whole", PCGrowConfig(locus={1: [0], 2: [5]}))
    model.base_model.set_adapter(["default", "whole"])
    swept = backward(model)
    control = grown(dtype=torch.float64, settle="backprop")
    control.add_adapter("whole", PCGrowConfig(locus={1: [0], 2: [5]}, settle="backprop"))
    control.base_model.set_adapter(["default", "whole"])
    assert_all_close(swept, backward(control), "fp64 gradient")
    train(model)
    before, together = snapshot(model), logits(model)
    model.merge_adapter(["default", "whole"])
    assert_close("merged", logits(model), together, "fp64 across batches")
    model.unmerge_adapter()
    assert_same(before, snapshot(model))
    model.add_adapter("same", config())
    with pytest.raises(ValueError, match="both grow expert 1 of layer 1"):
        model.base_model.set_adapter(["default", "same"])
    model.delete_adapter("default")
    model.base_model.set_adapter(["whole", "same"])
    assert len(trainable(model)) == len(swept)


def test_perturbed_birth():
    """init_weights=False moves the pieces only."""
    model = grown(init_weights=False)
    assert float((logits(model) - logits(build())).abs().max()) > 1e-3
    (first, _) = model.base_model.tuner_layers()
    for stack, weights in first.weights("default").items():
        changed = (weights != expert_stacks(first.base_layer)[stack][[1, 4]]).flatten(1).any(dim=1)
        assert changed.tolist() == [stack == "down_proj"] * 2


@pytest.mark.slow
def test_quantized_base(tmp_path):
    """Trains on it, loads onto it; merging is refused as for whole experts."""
    pytest.importorskip("bitsandbytes")
    build().save_pretrained(tmp_path / "base")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)

    def loss(model: nn.Module) -> torch.Tensor:
        # in training mode: bitsandbytes' own inference on a CPU does not take layers this narrow
        return model.train()(input_ids=tokens(), labels=tokens()).loss.detach()

    base, again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit) for _ in range(2)
    )
    before = loss(base)
    model = get_peft_model(base, config())
    assert_close("loss", loss(model), before, "fp32")  # in training mode rows of the bank are computed apart
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="the base was loaded quantized"):
            merge()
    assert loss(PeftModel.from_pretrained(again, tmp_path / "adapter", is_trainable=True)) == loss(model) != before


# ---- training


@pytest.mark.slow
def test_trainer_resumes(tmp_path):
    """The Trainer trains, and resumes from a checkpoint to the same bits."""
    losses, ends = [], []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = grown()
        optimizer = create_pcgrow_optimizer(model, lr=0.05)
        kept = {"save_strategy": "steps", "save_steps": 3, "optimizers": (optimizer, None)}
        losses.append(logged(fit(model, tmp_path, resume, **kept), "loss"))
        ends.append(banks(model))
    assert losses[0][-1] < losses[0][0]
    assert torch.equal(losses[0], losses[1])
    assert_same(ends[0], ends[1])


@pytest.mark.slow
def test_checkpointed_and_twice_before_backward():
    """Gradient checkpointing under backprop, and accumulation over two forwards: autograd's gradients."""
    found = []
    for settle, checkpointed in (("sweep", False), ("backprop", True), ("backprop", False)):
        model = grown(settle=settle, dtype=torch.float64).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = sum(model(input_ids=tokens(seed=s), labels=tokens(seed=s)).loss for s in (1, 2))
        loss.backward()
        found.append({name: p.grad for name, p in trainable(model).items()})
    assert_all_close(found[0], found[2], "fp64 gradient")
    assert_all_close(found[1], found[2], "fp64 gradient")


def test_the_guard_names_pieces():
    model, named = grown(), "1.4 down_proj"
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-30)
    bank = model.base_model.tuner_layers()[0].bank("default")["down_proj"]
    gradient = bank.grad.clone()
    bank.grad[1] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"the gradient of {named} \(adapter 'default'\) is NaN or infinite"):
        optimizer.step()
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)
    bank.grad[1] = gradient[1]
    with pytest.raises(RuntimeError, match=rf"located node\(s\) {named} that received error have not moved"):
        optimizer.step()


@pytest.mark.slow
def test_the_guard_sees_pieces_left_out():
    model = grown(modules_to_save=["lm_head"])
    optimizer = torch.optim.SGD([p for name, p in trainable(model).items() if "lm_head" in name], lr=1e-2)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"1\.1 down_proj, 1\.4 down_proj, 2\.0 gate_up_proj, .*no optimizer holds"):
        model(input_ids=tokens(), labels=tokens())
