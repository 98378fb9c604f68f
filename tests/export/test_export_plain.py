"""Compressed models as plain checkpoints: what transformers alone makes of them."""

import copy
import json

import pytest
import torch
from peft import get_peft_model
from test_packed import FORMS, packed
from torch import nn
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fresh
from close import assert_close
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.architectures.experts import expert_stacks, intermediate_size
from peft_pcgrow.architectures.router_capacity import COUNTS
from peft_pcgrow.export.plain import export_plain
from peft_pcgrow.packed.checkpoint import note_packing
from peft_pcgrow.packed.forms import Form
from tiny import ARCHITECTURES, EXPERTS, LOCUS, assert_same, build, dense, logits, snapshot, tokens

THIN = [Form(neurons=8)] * EXPERTS
# two in each of DeepSeek-V3's groups
PRUNED = [Form(), Form(neurons=0)] * 2 + [Form(neurons=0), Form()] * 2
SIZES = {"qwen3_moe": "moe_intermediate_size", "qwen2_moe": "moe_intermediate_size"}


def compressed(name: str = "qwen3_moe", forms=THIN, dtype=torch.float32, layers=None, **changes) -> nn.Module:
    model = packed(build(name, dtype, **changes), forms, layers)
    note_packing(model)
    return model


def reloaded(folder, **settings) -> nn.Module:
    model, facts = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(facts.values()), facts
    model.set_experts_implementation("eager")
    return model


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "deepseek_v3"])
def test_thinned_experts_become_smaller_matrices(name, tmp_path):
    """The same function, in a file that knows nothing of it; the model is as it was."""
    model = compressed(name)
    before, want = snapshot(model), logits(model)
    report = export_plain(model, tmp_path / "plain", [tokens()])
    assert_same(before, snapshot(model))
    plain = reloaded(tmp_path / "plain")
    assert {intermediate_size(site.base) for site in find_experts(plain).sites} == {8}
    assert_close("logits", logits(plain), want, "fp32")
    config = config_of(tmp_path / "plain")
    assert config[SIZES.get(name, "intermediate_size")] == 8
    assert "quantization_config" not in config
    assert report.reload_difference == 0
    assert report.difference < 1e-4
    assert (report.experts, report.neurons, report.removed) == (EXPERTS, 8, 0)
    files = sum(file.stat().st_size for file in (tmp_path / "plain").glob("*.safetensors"))
    assert report.bytes == files
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("forms", [PRUNED, PRUNED[::-1]], ids=["forms", "reversed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removed_experts_are_left_out(name, forms, tmp_path):
    """As the dense model computes whose router's rows of the removed experts are switched off."""
    model = compressed(name, forms)
    report = export_plain(model, tmp_path, [tokens(seed=99), tokens(2, 9, seed=3)])
    plain = reloaded(tmp_path)
    kept = [expert for expert, form in enumerate(forms) if form.neurons is None]
    assert {value for key, value in config_of(tmp_path).items() if key in COUNTS} == {len(kept)}
    for ours, theirs in zip(find_experts(model).sites, find_experts(plain).sites, strict=True):
        assert theirs.experts == len(kept)
        for stack, held in expert_stacks(theirs.base).items():
            whole = expert_stacks(ours.base)[stack]
            assert torch.equal(held, torch.stack([whole[expert].detach() for expert in kept]))
        for key, tensor in theirs.router.state_dict().items():
            assert torch.equal(tensor, ours.router.state_dict()[key][kept])
    ours, theirs = logits(model), logits(plain)
    assert not torch.equal(ours, theirs)
    # the second batch is small: the largest difference is of both
    second = [logits(each, tokens(2, 9, seed=3)) for each in (model, plain)]
    largest = max(float((ours - theirs).abs().max()), float((second[0] - second[1]).abs().max()))
    assert report.difference == pytest.approx(largest, rel=1e-4)
    assert (report.experts, report.removed) == (4, 4)
    before = [log_softmax(each.double(), -1).flatten(0, 1) for each in (ours, second[0])]
    after = [log_softmax(each.double(), -1).flatten(0, 1) for each in (theirs, second[1])]
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True)) / (4 * 16 + 2 * 9)
    assert report.kl == pytest.approx(kl, rel=1e-3)
    assert "4 removed experts of each layer" in str(report)


def test_one_packed_layer_is_enough(tmp_path):
    """Layers that are not packed hold what they held; a removed expert in each needs all of them."""
    model = compressed(forms=[Form(4)] * EXPERTS, layers=[1])
    export_plain(model, tmp_path, [tokens()], dequantize=True)
    plain, whole = reloaded(tmp_path), build()
    for layer, (ours, theirs) in enumerate(zip(find_experts(plain).sites, find_experts(whole).sites, strict=True)):
        same = [torch.equal(a, b) for a, b in zip(ours.base.parameters(), theirs.base.parameters(), strict=True)]
        assert all(same) == (layer != 1)
    assert_close("logits", logits(plain), logits(model), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [Form(8), Form(2), Form(3, 8), Form(sparsity="half")])
def test_few_bits_are_written_out(form, dtype, tmp_path):
    """What is read back computes the same bits by transformers' default way."""
    model = compressed(forms=[form] * EXPERTS, dtype=dtype)
    with pytest.raises(ValueError, match=r"expert 0 of layer 0 is stored as .*dequantize=True"):
        export_plain(model, tmp_path / "plain", [tokens()])
    assert not list(tmp_path.iterdir())
    report = export_plain(model, tmp_path / "plain", [tokens()], dequantize=True)
    assert report.bytes > report.compressed_bytes
    plain = reloaded(tmp_path / "plain", dtype="auto")
    assert plain.dtype == dtype
    plain.set_experts_implementation("grouped_mm")
    if form == Form(3, 8) and dtype == torch.float32:
        # some CPUs take another kernel for decoded experts of few neurons
        assert_close("logits", logits(plain), logits(model), "fp32")
    else:
        assert torch.equal(logits(plain), logits(model))


def test_thinned_and_removed_and_tied(tmp_path):
    forms = [Form(4, 8), Form(neurons=0)] + [Form(2, 8)] * 6
    model = compressed(forms=forms, tie_word_embeddings=True)
    model.train()
    report = export_plain(model, tmp_path, [{"input_ids": tokens(), "attention_mask": tokens() > 20}], dequantize=True)
    assert model.training
    assert (report.experts, report.neurons, report.removed) == (7, 8, 1)
    plain = reloaded(tmp_path)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert not plain.training


@pytest.mark.slow
def test_loads_without_this_package(tmp_path):
    model = compressed(forms=PRUNED)
    export_plain(model, tmp_path, [tokens()])
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r});"
        f"logits = model(input_ids=torch.tensor({tokens().tolist()})).logits;"
        "assert not {'peft_pcgrow', 'pcgrow_kernels'} & set(sys.modules);"
        "print(float(logits.double().square().sum()))"
    )
    run = fresh.run(code)
    assert run.returncode == 0, run.stderr
    want = float(logits(reloaded(tmp_path), tokens()).double().square().sum())
    assert float(run.stdout) == pytest.approx(want, rel=1e-5)


REFUSED = {
    "mixed neurons": (
        [Form(neurons=8)] * 7 + [Form()],
        {},
        "expert 0 of layer 0 has 8 neurons and expert 7 of layer 0 has 16 neurons: .* equally many neurons",
    ),
    "mixed layers": (THIN, {"layers": [2]}, "expert 0 of layer 2 has 8 neurons and expert 0 of layer 0 has 16"),
    "unequal layers": (PRUNED, {"layers": [0, 2]}, "layer 2 has 4 experts left and layer 1 has 8 experts left"),
    "too few": ([Form()] * 2 + [Form(neurons=0)] * 6, {}, "2 experts a layer are left, and .* chooses 3"),
    "none": ([Form(neurons=0)] * 8, {}, "0 experts a layer are left"),
    "groups": (
        [Form()] * 5 + [Form(neurons=0)] * 3,
        {"name": "deepseek_v3"},
        r"2 groups of experts \(n_group\), of which \[4, 1\] are left in layer 1",
    ),
    "shared experts": (
        THIN,
        {"name": "deepseek_v3"},
        "moe_intermediate_size also sizes model.layers.1.mlp.shared_experts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    forms, settings, match = REFUSED[case]
    model = compressed(forms=forms, **settings)
    with pytest.raises(ValueError, match=match):
        export_plain(model, tmp_path / "plain", [tokens()])
    assert not list(tmp_path.iterdir())


def test_another_size_that_is_equal(tmp_path):
    """Of two sizes with the same value, the one that is the experts' changes; the dense layer keeps its own."""
    model = compressed(intermediate_size=16, mlp_only_layers=[0])
    export_plain(model, tmp_path, [tokens()])
    config = config_of(tmp_path)
    assert (config["intermediate_size"], config["moe_intermediate_size"]) == (16, 8)
    assert_close("logits", logits(reloaded(tmp_path)), logits(model), "fp32")


def test_refuses_other_models(tmp_path):
    target = tmp_path / "plain"
    with pytest.raises(ValueError, match="no packed experts"):
        export_plain(build(), target, [tokens()])
    with pytest.raises(ValueError, match="no packed experts: save_pretrained writes it as it is"):
        export_plain(dense(), target, [tokens()])
    grown = get_peft_model(compressed(), PCGrowConfig(locus=LOCUS))
    for each in (grown, grown.base_model.model):
        with pytest.raises(ValueError, match=r"without adapters, got .*unload\(\)"):
            export_plain(each, target, [tokens()])
    export_plain(grown.unload(), target, [tokens()])
    with pytest.raises(FileExistsError, match="is not empty"):
        export_plain(compressed(), target, [tokens()])
    for batches in ([], [{"input_ids": tokens(), "attention_mask": torch.zeros_like(tokens())}]):
        with pytest.raises(ValueError, match="batches holds no tokens"):
            export_plain(compressed(), tmp_path / "other", batches)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_refuses_a_model_loaded_quantized(tmp_path):
    pytest.importorskip("bitsandbytes")
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    given = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=given, device_map="cpu")
    with pytest.raises(ValueError, match="loaded quantized"):
        export_plain(packed(model, FORMS), tmp_path / "plain", [tokens()])
    assert not (tmp_path / "plain").exists()


@pytest.mark.slow
def test_a_model_that_went_through_a_packed_checkpoint(tmp_path):
    model = compressed("mixtral")
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    first = export_plain(loaded, tmp_path / "plain", [tokens()])
    second = export_plain(copy.deepcopy(model), tmp_path / "direct", [tokens()])
    assert first.bytes == second.bytes
    assert_same(snapshot(reloaded(tmp_path / "plain")), snapshot(reloaded(tmp_path / "direct")))
