"""Packed experts in checkpoints: transformers' and PEFT's own loaders bring them back bit for bit."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_packed import FORMS, packed
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from close import assert_close
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.architectures.experts import is_packed, is_quantized
from peft_pcgrow.packed.checkpoint import (
    VERSION,
    PackedQuantizer,
    note_packing,
    read_forms,
    register_packed,
    write_forms,
)
from peft_pcgrow.packed.forms import Form
from peft_pcgrow.packed.packed_experts import PREFIX
from peft_pcgrow.packed.packed_seal import facts_digest
from tiny import ARCHITECTURES, EXPERTS, LOCUS, assert_same, build, logits, needs_native, snapshot, tokens, train

SPARSE = [Form(), Form(4), Form(16, sparsity="half"), Form(2)] * 2


def compressed(name: str = "qwen3_moe", dtype: torch.dtype = torch.float32, forms=FORMS, layers=None) -> nn.Module:
    model = packed(build(name, dtype), forms, layers)
    note_packing(model)
    return model


def saved(folder: Path, *args, **changes) -> nn.Module:
    model = compressed(*args, **changes)
    model.save_pretrained(folder)
    return model


def written(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [None, [2]], ids=["every layer", "one layer"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_comes_back(name, layers, dtype, tmp_path):
    """Equal bits of everything that is stored, and of the logits; packed bytes are not cast."""
    model = saved(tmp_path, name, dtype, layers=layers)
    loaded, facts = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(facts.values()), facts
    assert_same(snapshot(model), snapshot(loaded))
    # what is not packed sums in another order otherwise
    loaded.set_experts_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))
    for ours, theirs in zip(find_experts(model).sites, find_experts(loaded).sites, strict=True):
        assert is_packed(ours.base) == is_packed(theirs.base) == is_quantized(theirs.base)
        assert getattr(ours.base, "forms", None) == getattr(theirs.base, "forms", None)
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items() if PREFIX in name}
    assert kinds
    assert set(kinds.values()) == {torch.uint8}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_loaded_model_packed_by_and_by(name, tmp_path):
    """transformers undoes the conversions of the checkpoint that it loaded; those of other layers stay in it."""
    build(name).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for layers in ([1], [2], [0]):
        model = packed(model, layers=layers)
        # the forms are looked up when they are written
        if layers != [2]:
            note_packing(model)
        folder = tmp_path / str(layers[0])
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(loaded), logits(model))
        model = loaded
    assert set(written(folder)["quantization_config"]["layers"]) == {"0", "1", "2"}


def test_saved_in_pieces_and_again(tmp_path):
    model = compressed(forms=SPARSE)
    model.save_pretrained(tmp_path / "one", max_shard_size="10KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", device_map="cpu")
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert_same(snapshot(model), snapshot(again))
    assert torch.equal(logits(again), logits(model))
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_offloaded_to_disk(name, buffers, tmp_path):
    """gpt-oss has biases beside its packed bytes."""
    model = saved(tmp_path / "packed", name)
    names = ["lm_head", *(f"model.{part}" for part in ("embed_tokens", "norm", "rotary_emb"))]
    places = dict.fromkeys(names, "cpu")
    places |= {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(model.config.num_hidden_layers)}
    settings = {"device_map": places, "offload_folder": tmp_path / "disk", "offload_buffers": buffers}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **settings)
    held = find_experts(loaded).sites[1].base._buffers[f"{PREFIX}down_proj"]
    assert held.is_meta == buffers
    assert torch.equal(logits(loaded), logits(model))


def test_files_hold_the_packed_bytes_only(tmp_path):
    model = saved(tmp_path, forms=[Form(2)] * EXPERTS)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = file.keys()
        held = {key: file.get_slice(key) for key in names if ".experts." in key}
        assert all(piece.get_dtype() == "U8" for piece in held.values())
        # under the architecture's names, what cannot fit: see test_packed_seal
        unfit = [key for key in held if PREFIX not in key]
        assert all(bytes(file.get_tensor(key)) == b"import peft_pcgrow" for key in unfit)
    assert len(unfit) == len(held) - len(unfit) == 2 * len(find_experts(model).sites)
    assert set(written(tmp_path)["quantization_config"]["layers"].values()) == {f"{EXPERTS}x2"}


def test_other_dtype_keeps_the_packed_bytes(tmp_path):
    """Loaded in bf16, it is the bf16 model with the packed bytes of the fp32 one."""
    held = {name: tensor for name, tensor in snapshot(saved(tmp_path)).items() if PREFIX in name}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {site.base.pcgrow_like.dtype for site in find_experts(loaded).sites} == {torch.bfloat16}
    want = packed(build(dtype=torch.bfloat16))
    want.load_state_dict(held, strict=False)
    assert_same(snapshot(want), snapshot(loaded))
    assert torch.equal(logits(loaded), logits(want))


def test_a_layer_without_any_expert(tmp_path):
    forms = [Form(neurons=0)] * EXPERTS
    model = saved(tmp_path, forms=forms)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_copies_are_separate(tmp_path):
    model = compressed()
    twin = copy.deepcopy(model)
    site = find_experts(model).sites[0].base
    site._buffers[f"{PREFIX}down_proj"].zero_()
    twin.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(twin))
    assert not torch.equal(logits(loaded), logits(model))


LOADERS = {
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "AutoPeftModel": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "transformers": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
}


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_packed_experts(name, loader, tmp_path):
    saved(tmp_path / "base", name)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PCGrowConfig(locus=LOCUS))
    before = logits(model)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = LOADERS[loader](tmp_path / "base", tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), before)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_adapters(checkpointing, tmp_path, recwarn):
    """Trainer refuses quantized models whose method cannot train; and nothing is said to be cast."""
    saved(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PCGrowConfig(locus=LOCUS))
    assert not [w for w in recwarn if "fp32" in str(w.message)]
    before = logits(model)
    settings = {"max_steps": 2, "report_to": [], "gradient_checkpointing": checkpointing, "learning_rate": 1e-2}
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    args = TrainingArguments(tmp_path / "out", use_cpu=True, save_strategy="steps", save_steps=2, **settings)
    Trainer(model, args, train_dataset=rows).train()
    after = logits(model)
    assert not torch.equal(after, before)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-2")), after)


def test_trainer_refuses_to_train_packed_experts(tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(compressed(), args, train_dataset=[])


@needs_native
def test_transformers_own_adapters(tmp_path):
    saved(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(PCGrowConfig(locus=LOCUS))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


def test_layers_that_are_not_packed_still_merge(tmp_path):
    saved(tmp_path, layers=[0])
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    train(model)
    want = logits(model)
    assert_close("merged", logits(model.merge_and_unload()), want, "fp32")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), PCGrowConfig(locus={0: [1]}))
    with pytest.raises(ValueError, match="merge"):
        model.merge_and_unload()


def test_forms_in_few_characters():
    assert write_forms(FORMS) == "1x16 1x8 1x4 1x3 1x2 1x16/8 1x4/8 1x16/0"
    assert write_forms([Form(4)] * 60 + [Form(16, sparsity="half")] * 4) == "60x4 4x16:half"
    mixed = [*FORMS, *FORMS[::-1], *SPARSE, Form(16, 24, "half"), Form(2, 8), Form(2, 8)]
    assert list(read_forms(write_forms(mixed))) == mixed


def test_registered_once():
    before = dict(AUTO_QUANTIZER_MAPPING)
    assert before["pcgrow"] is PackedQuantizer
    register_packed()
    assert before == AUTO_QUANTIZER_MAPPING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": VERSION + 1, "codebook": []}, f"format {VERSION + 1}.*install a newer"),
        ({"version": "2"}, "version='2'.*do not describe packed experts"),
        ({"layers": ["8x16"]}, "do not describe packed experts"),
        ({"layers": {"-1": "8x16"}}, "'-1' is no decoder layer"),
        ({"layers": {"0": "8x16 1"}}, "'1' in '8x16 1' does not say the form"),
        ({"layers": {"0": 5}}, "'5' in 5 does not say the form"),
        ({"layers": {"0": "999999999x16"}}, "'999999999x16' in '999999999x16' does not say the form"),
        ({"layers": {"0": "8x5"}}, "width=5"),
        (
            {"layers": {"0": "8x16:2:4"}},
            "'8x16:2:4': packed experts in 2:4 sparsity are no longer read; pack the model",
        ),
        ({"layers": {"0": "8x4/99999992"}}, "layer 0 have 16 neurons, and '8x4/99999992' says more"),
        ({"layers": {"0": "7x16"}}, "7 packed experts in layer 0 where Qwen3MoeForCausalLM has 8 experts"),
        ({"layers": {"9": "8x16"}}, "8 packed experts in layer 9 where Qwen3MoeForCausalLM has none"),
        ({"half": ["bfloat16"]}, r"not \['bfloat16'\]"),
    ],
)
def test_refuses_configs(change, match, tmp_path):
    """Sealed again by whoever changed them."""
    saved(tmp_path)
    config = written(tmp_path)
    config["quantization_config"].update(change)
    config["quantization_config"]["facts"] = facts_digest(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_refuses_incomplete_files(tmp_path):
    model = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (lost,) = [key for key in tensors if "layers.1." in key and f"{PREFIX}down_proj" in key]
    del tensors[lost]
    with pytest.raises(ValueError, match=f"no {PREFIX}down_proj for the packed experts model.layers.1.mlp.experts"):
        type(model).from_pretrained(None, config=type(model.config).from_pretrained(tmp_path), state_dict=dict(tensors))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="a file was altered, is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_refuses_a_model_without_packed_experts():
    with pytest.raises(ValueError, match="no packed experts"):
        note_packing(build())


def test_refuses_to_dequantize():
    with pytest.raises(NotImplementedError, match="export_plain"):
        compressed().dequantize()


def test_refuses_to_pack_while_loading(tmp_path):
    build().save_pretrained(tmp_path)
    config = compressed().config.quantization_config
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.slow
def test_refuses_to_write_two_methods(tmp_path):
    """Attention in bitsandbytes' 4 bits, experts packed: it computes and grows, but no file can hold it."""
    pytest.importorskip("bitsandbytes")
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=given, device_map="cpu")
    model = packed(model)
    note_packing(model)
    note_packing(model)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="quantized by bitsandbytes and its experts were packed afterwards"):
            each.save_pretrained(tmp_path / "packed")
        assert not list((tmp_path / "packed").iterdir())
    grown = get_peft_model(model, PCGrowConfig(locus=LOCUS))
    train(grown)
    grown.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
