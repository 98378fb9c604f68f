"""What an adapter's tensors are for travels with them: every loader refuses those of another adapter, base or file."""

import json

import pytest
import torch
from accelerate import Accelerator
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from test_trainer import fit
from torch import nn
from transformers import AutoModelForCausalLM

from loaders import LOADERS
from peft_pcgrow import PCGrowConfig
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.architectures.find import find_experts
from tiny import LOCUS, assert_same, build, grown, logits, snapshot, spawned, train

OTHER = {1: [2, 5], 2: [0, 3, 6]}
BOTH = r"the file holds banks for layer 1: 1 4 \| layer 2: 0 3 7; this adapter \('default'\) grows layer 1: 2 5 \|"
PREFIX = "base_model.model.model.layers"


@pytest.fixture
def saved(tmp_path):
    """Folders of a base and of a trained adapter, with a further module."""
    return keep(tmp_path, locus=LOCUS, modules_to_save=["lm_head"])


def keep(folder, **settings):
    build().save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), PCGrowConfig(**settings))
    train(model)
    model.save_pretrained(folder / "adapter")
    return folder


def load(folder, loader="PeftModel") -> nn.Module:
    """A model as a loader gives it, after a first forward: transformers' asks no tuner while it loads."""
    model = LOADERS[loader](folder / "base", folder / "adapter")
    logits(model)
    return model


def change(folder, edit) -> None:
    """`edit` the tensors of a saved adapter."""
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder, **facts) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


# ---- another adapter


def resume(model, folder):
    fit(model, folder / "run", resume=str(folder / "run" / "checkpoint-1"), max_steps=2)


def through_accelerate(model, folder):
    first = Accelerator(cpu=True)
    first.prepare(get_peft_model(build(), PCGrowConfig(locus=LOCUS)))
    first.save_state(str(folder / "state"))
    second = Accelerator(cpu=True)
    second.prepare(model)
    second.load_state(str(folder / "state"))


INTO = {
    "load_adapter": lambda model, folder: model.load_adapter(folder / "adapter", "default"),
    "set_peft_model_state_dict": lambda model, folder: set_peft_model_state_dict(
        model, load_file(folder / "adapter" / "adapter_model.safetensors")
    ),
    "ignore_mismatched_sizes": lambda model, folder: model.load_adapter(
        folder / "adapter", "default", ignore_mismatched_sizes=True
    ),
    "Trainer": resume,
    "accelerate": through_accelerate,
    "load_state_dict": lambda model, folder: model.load_state_dict(grown().state_dict()),
    "another name": lambda model, folder: (
        model.add_adapter("b", PCGrowConfig(locus=OTHER)),
        model.load_adapter(folder / "adapter", "b"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", INTO)
def test_another_locus(way, tmp_path):
    """Equally many experts in each layer, and others; nothing is written."""
    keep(tmp_path, locus=LOCUS)
    if way == "Trainer":
        fit(grown(), tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    model = grown(locus=OTHER)
    before = snapshot(model)
    with pytest.raises(ValueError, match=BOTH.replace("default", "b" if way == "another name" else "default")):
        INTO[way](model, tmp_path)
    assert_same(before, {name: tensor for name, tensor in snapshot(model).items() if name in before})


@pytest.mark.slow
def test_a_config_of_ones_own(tmp_path):
    keep(tmp_path, locus=LOCUS)
    for config in (PCGrowConfig(locus=OTHER), PCGrowConfig(locus={1: [1, 4, 5], 2: [0, 3, 7]})):
        with pytest.raises(ValueError, match=r"the file holds banks for layer 1: 1 4 .*this adapter .* grows layer 1"):
            PeftModel.from_pretrained(build(), tmp_path / "adapter", config=config)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    right = PeftModel.from_pretrained(base, tmp_path / "adapter", config=PCGrowConfig(locus=LOCUS))
    assert torch.equal(logits(right), logits(load(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "facts", "match"),
    [
        (
            {"resolution": "matrix", "parts": {1: {1: ["gate_up_proj"]}}},
            {"parts": {"1": {"1": ["down_proj"]}}},
            "parts=",
        ),
        (
            {"resolution": "matrix", "parts": {1: {1: ["down_proj"]}}},
            {"parts": {"1": {"1": ["gate_up_proj"]}}},
            "parts=",
        ),
        ({"locus": LOCUS}, {"locus": {"1": [1, 4]}}, "banks for layer 1: 1 4 | layer 2: 0 3 7; this"),
        ({"locus": LOCUS}, {"locus": {"1": [4, 5], "2": [0, 3, 7]}}, "grows layer 1: 4 5 "),
    ],
)
@pytest.mark.parametrize("loader", ["PeftModel", "transformers"])
def test_altered_config(settings, facts, match, loader, tmp_path):
    """Facts that leave every shape as it is, but for a layer that is gone."""
    keep(tmp_path, **settings)
    change_config(tmp_path, **facts)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        load(tmp_path, loader)
    assert match in str(caught.value) or "gate_up_proj" in str(facts)


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["PeftModel", "transformers"])
@pytest.mark.parametrize("facts", [{"spawned": None}, {"gate_window": 3}, {"spawned": {"1": [1]}}])
def test_altered_newborns(facts, loader, tmp_path):
    """Newborns that would be deepened experts, or whose gates would look at another stretch of text."""
    build().save_pretrained(tmp_path / "base")
    model = spawned()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    load(tmp_path, loader)
    change_config(tmp_path, **facts)
    with pytest.raises(ValueError, match=r"\(newborns: 1 4\).*this adapter|gate_window=8.*gate_window=3"):
        load(tmp_path, loader)


# ---- another base


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_another_base(saved, loader):
    """It shares the routers; meant, it is loaded when the config says so, and saved as that base's."""
    other = AutoModelForCausalLM.from_pretrained(saved / "base")
    with torch.no_grad():
        expert_stacks(find_experts(other).sites[0].base)["down_proj"].mul_(1.01)
    other.save_pretrained(saved / "base")
    with pytest.raises(ValueError, match=r"grown on another base \(other experts' weights.*config.verify = False"):
        load(saved, loader)
    config = PeftConfig.from_pretrained(saved / "adapter")
    config.verify = False
    meant = PeftModel.from_pretrained(other, saved / "adapter", config=config)
    meant.save_pretrained(saved / "again")
    assert "verify" not in (saved / "again" / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "again")
    assert torch.equal(logits(again), logits(meant))


@pytest.mark.slow
def test_a_file_cannot_switch_checks_off(saved):
    change_config(saved, verify=False)
    change(saved, lambda tensors: next(iter(tensors.values())).view(-1)[0].add_(1))
    with pytest.warns(UserWarning, match="verify"), pytest.raises(ValueError, match="altered"):
        load(saved)


# ---- another file


def remove(ending):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(ending)]


def unseal(tensors):
    """As a file from before there were seals, or one that was stripped of them."""
    remove("pcgrow_seal._extra_state")(tensors)


def zero(tensors):
    for key in tensors:
        if "pcgrow_seal" in key:
            tensors[key].zero_()


def mix(tensors):
    """A layer of another adapter on the same nodes, with its own seal."""
    other = get_peft_model(build(), PCGrowConfig(locus=LOCUS, modules_to_save=["lm_head"]))
    theirs = get_peft_model_state_dict(other)
    tensors.update({key: tensor for key, tensor in theirs.items() if "layers.2" in key})


def flip_seal(tensors):
    tensors[f"{PREFIX}.1.mlp.experts.pcgrow_seal._extra_state"][40] ^= 1


DAMAGE = {
    "one value": lambda tensors: tensors[f"{PREFIX}.2.mlp.experts.pcgrow_down_proj.weight"].view(-1)[5].add_(1e-3),
    "NaN": lambda tensors: tensors[f"{PREFIX}.2.mlp.experts.pcgrow_down_proj.weight"].fill_(float("nan")),
    "a further module": lambda tensors: tensors["base_model.model.lm_head.weight"].view(-1)[5].add_(1e-3),
    "no seals": unseal,
    "zeroed seals": zero,
    "a flipped seal": flip_seal,
    "mixed up": mix,
    "a missing bank": remove("layers.2.mlp.experts.pcgrow_down_proj.weight"),
    "a missing layer": lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.2." in key],
}


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["PeftModel", "low_cpu_mem_usage", "transformers"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_altered_tensors(saved, damage, loader):
    change(saved, DAMAGE[damage])
    with pytest.raises(ValueError, match=r"altered or mixed up|is not sealed|file holds banks for"):
        load(saved, loader)


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["PeftModel", "low_cpu_mem_usage", "transformers"])
@pytest.mark.parametrize(
    "key", ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.base_layer.down_proj", "norm.weight"]
)
def test_tensors_of_the_base(saved, key, loader):
    """None is overwritten by an adapter's file."""
    shapes = {"down_proj": (8, 32, 16), "weight": (32,)}
    key = f"base_model.model.model.{key}"
    change(saved, lambda tensors: tensors.update({key: torch.ones(shapes[key.rpartition(".")[2]])}))
    with pytest.raises(ValueError, match=r"would overwrite a weight of the base"):
        load(saved, loader)


@pytest.mark.slow
def test_tensors_of_nobody(saved):
    change(saved, lambda tensors: tensors.update({"base_model.model.model.extra": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"model\.extra, which this model has no place for"):
        load(saved)


def test_embeddings_of_a_resized_vocabulary(tmp_path):
    """PEFT adds them to the file; they are sealed too."""
    build().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(136)
    model = get_peft_model(model, PCGrowConfig(locus=LOCUS))
    model.save_pretrained(tmp_path / "adapter")
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(136)
    loaded = PeftModel.from_pretrained(resized, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    change(tmp_path, lambda tensors: tensors["base_model.model.lm_head.weight"].view(-1)[5].add_(1e-3))
    with pytest.raises(ValueError, match=r"lm_head.weight does not have the checksum"):
        PeftModel.from_pretrained(resized, tmp_path / "adapter")


@pytest.mark.slow
def test_files_from_before_seals(saved):
    """Refused, unless the config says that it is meant; saved again, it is sealed."""

    def age(tensors):
        unseal(tensors)
        tensors.update({f"{PREFIX}.{n}.mlp.experts.pcgrow_checksum": torch.zeros(32, dtype=torch.uint8) for n in LOCUS})

    expected = logits(load(saved))
    change(saved, age)
    with pytest.raises(ValueError, match=r"is not sealed.*config.verify = False"):
        load(saved)
    config = PeftConfig.from_pretrained(saved / "adapter")
    config.verify = False
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    PeftModel.from_pretrained(base, saved / "adapter", config=config).save_pretrained(saved / "adapter")
    assert torch.equal(logits(load(saved)), expected)


@pytest.mark.slow
def test_parameters_without_their_seals():
    """Those that train alone, as some loops save them, say nothing of what they are for."""
    model = grown()
    train(model)
    alone = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for other in (grown(), grown(locus=OTHER), grown(seed=5)):
        before = snapshot(other)
        with pytest.raises(ValueError, match=r"pcgrow_\w+.default.weight is not sealed.*names contain 'pcgrow'"):
            other.load_state_dict(alone, strict=False)
        assert_same(before, snapshot(other))
    same = grown()
    same.load_state_dict({key: value for key, value in model.state_dict().items() if "pcgrow" in key}, strict=False)
    assert torch.equal(logits(same), logits(model))
    config = PCGrowConfig(locus=LOCUS)
    config.verify = False
    meant = get_peft_model(build(), config)
    meant.load_state_dict(alone, strict=False)
    assert torch.equal(logits(meant), logits(model))
    # a state dict without banks is nobody's
    grown().load_state_dict({"base_model.model.model.norm.weight": torch.ones(32)}, strict=False)


def test_a_layer_is_missing():
    held = {key: tensor for key, tensor in get_peft_model_state_dict(grown()).items() if "layers.1." in key}
    with pytest.raises(ValueError, match=r"adapter 'default' has no bank for layer 2, where it grows too"):
        set_peft_model_state_dict(grown(), held)
