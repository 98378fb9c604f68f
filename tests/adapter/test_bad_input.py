"""What cannot work is refused with a text that says why, and nothing is left changed or written."""

import copy
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import SafetensorError
from torch import nn
from torch.autograd import forward_ad
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DogeConfig,
    DogeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from peft_pcgrow import (
    ErrorMap,
    ErrorMapCallback,
    PCGrowConfig,
    compress,
    create_pcgrow_optimizer,
    find_experts,
    measure_errors,
)
from tiny import LOCUS, assert_same, build, dense, logits, snapshot, spawned, tokens, train


def facts(model: nn.Module) -> tuple:
    """Everything about a model that a failed call could leave behind, but its weights."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        hasattr(model, "peft_config"),
        torch.is_grad_enabled(),
    )


@contextmanager
def refused(model: nn.Module, error: type[Exception], text: str):
    """The block raises `error` with `text`, and the model is as before."""
    before, weights = facts(model), snapshot(model)
    with pytest.raises(error, match=text):
        yield
    assert facts(model) == before
    assert_same(weights, snapshot(model))


def grow(model: nn.Module, **settings) -> PeftModel:
    return get_peft_model(model, PCGrowConfig(**settings))


def emap(model: nn.Module, **settings) -> ErrorMap:
    return measure_errors(model, [tokens()], progress=False, **settings)


# ---- models


def test_dense_model_asked_for_experts():
    model = dense()
    with refused(model, ValueError, "LlamaForCausalLM has no mixture-of-experts layers.*nodes='dense'"):
        grow(model, locus={0: [0]}, nodes="routed")
    with refused(model, ValueError, "LlamaForCausalLM has no shared nodes that can be grown: no MLP.*beside routed"):
        grow(model, locus={0: [0]}, nodes="shared")


def test_mlps_that_are_no_blocks():
    """OPT's decoder layers hold the two linear layers themselves."""
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=128, max_position_embeddings=64, **sizes))
    text = "OPTForCausalLM has no dense nodes that can be grown: no MLP of linear layers was found"
    with refused(model, ValueError, text):
        grow(model, locus={0: [0]})
    with refused(model, ValueError, text):
        emap(model)


def test_experts_without_matrices():
    """Doge's are rows of embeddings."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_experts": 16, "num_experts_per_tok": 4, "is_moe": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = DogeForCausalLM(DogeConfig(vocab_size=128, num_hidden_layers=2, **sizes, **heads))
    text = r"experts of DogeForCausalLM cannot be nodes \(DogeCDMoE: .*rows of two embeddings.*use LoRA on this model"
    with refused(model, ValueError, text):
        grow(model, locus={0: [0]})
    with refused(model, ValueError, text):
        emap(model)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"seed": 1}, {"num_experts": 4}, {"num_hidden_layers": 2}, {"name": "olmoe"}])
def test_map_of_another_model(changes):
    model = build()
    with refused(model, ValueError, "this error map was measured on another model"):
        grow(model, error_map=emap(build(**changes)))


def test_no_experts_left():
    model = build()
    with refused(model, ValueError, "leave no experts to grow; the model's experts are model.layers.0.mlp.experts"):
        grow(model, locus={0: [0]}, target_modules=["mlp.expert"])
    with refused(model, ValueError, r"layer 0, .* is left out by .*layers_to_transform=\[1, 2\]: change one"):
        grow(model, locus={0: [0]}, layers_to_transform=[1, 2])


# ---- settings


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "x", float("nan"), None])
def test_budget(budget):
    with pytest.raises(ValueError, match=r"budget must be a share of the expert parameters in \(0, 1\], got"):
        PCGrowConfig(budget=budget, locus=LOCUS)


@pytest.mark.parametrize(
    ("locus", "text"),
    [
        ({}, "the locus is empty"),
        ({0: []}, "the locus is empty"),
        ({0: [-1]}, "expert -1 in the locus is not a whole number"),
        ({-1: [0]}, "layer -1 in the locus is not a whole number"),
        ({0: [1.5]}, "expert 1.5 in the locus is not a whole number"),
        ({0: [True]}, "expert True in the locus is not a whole number"),
        ({"first": [0]}, "layer 'first' in the locus is not a whole number"),
        ({0: "12"}, "in the locus"),
        ({0: None}, "in the locus"),
        ([0, 1], r"locus must map layer -> \[experts\]"),
    ],
)
def test_locus_that_is_none(locus, text):
    with pytest.raises(ValueError, match=text):
        PCGrowConfig(locus=locus)


@pytest.mark.parametrize(
    ("name", "locus", "text"),
    [
        ("qwen3_moe", {0: [3, 8]}, r"names expert 8 of layer 0, but this model has only 8 experts there \(0 to 7\)"),
        ("qwen3_moe", {3: [0]}, "names layer 3, which has no experts in this model; layers with experts: 0-2"),
        ("deepseek_v3", {0: [0]}, "names layer 0, which has no experts in this model; layers with experts: 1-3"),
    ],
)
def test_locus_outside_the_model(name, locus, text):
    model = build(name)
    with refused(model, ValueError, text):
        grow(model, locus=locus)


def test_unknown_words():
    with pytest.raises(ValueError, match="unknown select='loss'; choose from removable, error, gate, freq"):
        PCGrowConfig(locus=LOCUS, select="loss")
    with pytest.raises(ValueError, match="unknown settle='newton'; choose from sweep, direct, backprop"):
        PCGrowConfig(locus=LOCUS, settle="newton")
    with pytest.raises(
        ValueError, match=r"settle='relax' was removed after version 0.1: .* settle='sweep' has the same"
    ):
        PCGrowConfig(locus=LOCUS, settle="relax")
    with pytest.raises(ValueError, match="it was of settle='relax', which no longer trains: leave it out"):
        PCGrowConfig(locus=LOCUS, settle_tol=0.2)
    with pytest.raises(ValueError, match="unknown statistic 'loss'; a map can rank by error"):
        emap(build()).score("loss")
    with pytest.raises(ValueError, match=r"target_parameters=\['down_proj'\]: an experts module grows as a whole"):
        PCGrowConfig(locus=LOCUS, target_parameters=["down_proj"])
    with pytest.raises(ValueError, match="error_map must be a path or an ErrorMap, got int"):
        PCGrowConfig(error_map=3)


def test_nothing_to_choose_by():
    model = build()
    with refused(model, ValueError, "PCGrowConfig needs error_map=.*or locus=.*or select='random'"):
        grow(model)
    with refused(model, ValueError, "holds no weight gradients"):
        grow(model, error_map=emap(model, gradients=False), select="removable")


def test_optimizer_without_an_adapter():
    with pytest.raises(ValueError, match="get_peft_model"):
        create_pcgrow_optimizer(build(), lr=0.02)


# ---- measuring


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_corpus_without_labels(training):
    model = build().train(training)
    ids = tokens()
    empty = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    padded = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    for batches in ([], [empty], [ids[:, :1]], [padded]):
        with refused(model, ValueError, "the corpus has no label token"):
            measure_errors(model, batches, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(value):
    model = build()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    text = r"the loss of a batch is (nan|inf): check the model's weights and the batch's tokens"
    with pytest.raises(FloatingPointError, match=text):
        emap(model)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_errors_that_are_nan():
    """A loss that is finite, of a root that has no derivative at 0."""
    model = build()
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + (output * 0).sqrt())
    with pytest.raises(FloatingPointError, match=r"the loss is finite, but the errors of layers \[0, 1, 2\] are not"):
        measure_errors(model, [tokens()], progress=False)


def test_arguments_that_it_does_not_have():
    with pytest.raises(TypeError, match=r"measure_errors\(coherent=...\) is gone: it is called gradients="):
        measure_errors(build(), [tokens()], coherent=False)
    with pytest.raises(TypeError, match=r"measure_errors\(coherent=...\) is gone: it is called gradients="):
        ErrorMapCallback([tokens()], every=1, coherent=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'settle_tolerance'"):
        measure_errors(build(), [tokens()], settle_tolerance=0.1)


def test_a_corpus_is_not_its_own_retain_text():
    text = [tokens()]
    with refused(build(), ValueError, "retain is the corpus itself"):
        measure_errors(build(), text, retain=text, progress=False)


@pytest.mark.parametrize("batch", [{"input_ids": tokens()[0, 0]}, tokens().float(), {"input_ids": tokens()[None]}])
def test_batch_of_another_shape(batch):
    model = build()
    with refused(model, ValueError, r"item 0 of the corpus needs input_ids of shape \[B, S\] or \[S\], integers"):
        measure_errors(model, [batch], progress=False)


# ---- map files


@pytest.mark.slow
def test_maps_that_do_not_add():
    first = emap(build())
    with pytest.raises(ValueError, match=r"these maps cannot be added: they were measured on.*routers"):
        first + emap(build(seed=1))
    with pytest.raises(ValueError, match="different sketches"):
        first + emap(build(), sketch_dim=4)
    with pytest.raises(ValueError, match="these maps cannot be added"):
        first + emap(build(), gradients=False)
    other = build()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="measured with other weights, or with other adapters in use"):
        first + emap(other)
    with pytest.raises(TypeError):
        first + 1


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_map_onto_a_file(tmp_path):
    (tmp_path / "map").write_text("notes")
    with pytest.raises(FileExistsError, match="is a file; an error map is saved as a folder, give another name"):
        emap(build()).save(tmp_path / "map")
    assert [path.name for path in tmp_path.iterdir()] == ["map"]
    assert (tmp_path / "map").read_text() == "notes"


# ---- adapter files


@pytest.fixture
def saved(tmp_path):
    """A base and a trained adapter, in folders."""
    build().save_pretrained(tmp_path / "base")
    model = grow(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), locus=LOCUS)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def load_parts(folder) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")


def load_native(folder) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    logits(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("load", [load_parts, load_native])
def test_truncated_adapter(saved, load):
    cut(saved / "adapter" / "adapter_model.safetensors")
    with pytest.raises(SafetensorError, match="incomplete"):
        load(saved)


def test_adapter_on_fewer_experts(saved):
    model = build(num_experts=4)
    with refused(model, ValueError, "names expert 4 of layer 1, but this model has only 4 experts there"):
        PeftModel.from_pretrained(model, saved / "adapter")


@pytest.mark.slow
def test_merging_into_a_quantized_base(saved):
    pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    model = grow(AutoModelForCausalLM.from_pretrained(saved / "base", quantization_config=four_bit), locus=LOCUS)
    losses = train(model, steps=2)
    assert all(loss < 20 for loss in losses)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with refused(model, ValueError, "the base was loaded quantized, and what merges into it cannot be saved"):
            merge()
    assert not any(layer.merged for layer in model.base_model.tuner_layers())
    plain = model.unload()
    assert find_experts(plain).experts_at == {0: 8, 1: 8, 2: 8}


@pytest.mark.slow
def test_experts_of_a_quantized_base_cast_up(saved):
    """prepare_model_for_kbit_training doubles the experts' memory without a word."""
    pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(saved / "base", quantization_config=four_bit, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        grow(copy.deepcopy(model), locus=LOCUS)
    with pytest.warns(UserWarning, match="experts are in fp32: prepare_model_for_kbit_training casts"):
        grow(prepare_model_for_kbit_training(model), locus=LOCUS)


def test_texts_are_whole_sentences():
    """An error text names what was given: no empty list, no 'None' where a name should be."""
    with pytest.raises(ValueError, match="has no experts") as caught:
        grow(build(), locus={9: [0]})
    assert not re.search(r"None|\[\]|: $", str(caught.value))


def test_parts_in_a_locus():
    with pytest.raises(ValueError, match=r"layer 1 in the locus must list its.*resolution='matrix'"):
        get_peft_model(build(), PCGrowConfig(locus={1: {0: [1]}}))


@pytest.mark.parametrize("rate", [0.51, 0.9, 1e-5])
def test_rates_that_gates_have_no_threshold_for(rate):
    with pytest.raises(ValueError, match=rf"gate_fpr={rate}: gates have thresholds for rates from 0.0001 to 0.5"):
        PCGrowConfig(locus={1: [1]}, gate_fpr=rate)
    model = spawned()
    with pytest.raises(ValueError, match=r"from 0.0001 to 0.5"):
        model.set_gate_fpr(rate)
    for least_or_most in (1e-4, 0.5):
        model.set_gate_fpr(least_or_most)


def test_numbers_that_are_none():
    emap = measure_errors(build(), [tokens()], progress=False)
    for count in (-1, "10", True):
        with pytest.raises(ValueError, match="n must be a whole number of nodes, at least 0"):
            emap.top(count)
    for most in (0, "9"):
        with pytest.raises(ValueError, match="max_tokens must be a whole number of tokens, at least 1"):
            compress.plan(build(), target=0.5, retain=[tokens()], max_tokens=most, progress=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_measured_in_inference_mode(frozen):
    with torch.inference_mode():
        model = build()
    model.requires_grad_(False) if frozen else None
    with pytest.raises(RuntimeError, match=r"inference_mode\(\) keeps none: measure outside of it"):
        measure_errors(model, [tokens()], progress=False)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\) keeps none"):
        measure_errors(build(), [tokens()], progress=False)


def test_forward_mode_derivatives():
    """Of settled layers there would be none, without a word."""
    model = get_peft_model(build(), PCGrowConfig(locus={1: [1]})).train()
    model.base_model.model.set_attn_implementation("eager")
    embedded = model.get_input_embeddings()(tokens()).detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
        with pytest.raises(RuntimeError, match="forward-mode derivatives do not pass settled layers"):
            model(inputs_embeds=dual)
        assert bool(forward_ad.unpack_dual(model.eval()(inputs_embeds=dual).logits).tangent.any())
