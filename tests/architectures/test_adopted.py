"""MLPs as nodes: dense ones, and those that serve every token beside routed experts."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

from close import assert_all_close, assert_close
from loaders import LOADERS
from mlp_models import apertus, every_case, gpt2, grown, linears, made
from peft_pcgrow import ErrorMapCallback, Locus, PCGrowConfig, export_flat, find_experts, measure_errors
from peft_pcgrow.architectures.find import adopt
from tiny import assert_same, backward, build, dense, domain, logits, retain, snapshot, tokens, train, trainable


@pytest.mark.slow
@every_case
def test_adoption_changes_nothing(name):
    """Neither what is computed nor what is saved, nor what a copy of the model computes."""
    model, nodes = made(name)
    before, weights, kinds = logits(model), snapshot(model), {type(m) for m in model.modules()}
    tree = adopt(find_experts(model, nodes))
    assert tree.nodes == nodes
    assert tree.experts_at == dict.fromkeys(linears(model, name), 1)
    assert torch.equal(logits(model), before)
    assert_same(weights, snapshot(model))
    assert all(any(isinstance(m, kind) for m in model.modules()) for kind in kinds)
    again = find_experts(model, nodes)
    assert [site.base for site in again.sites] == [site.base for site in tree.sites]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layers in linears(model, name).values():
            layers[-1].weight.mul_(2)
    assert torch.equal(logits(twin), before)
    assert not torch.equal(logits(model), before)


def test_which_nodes():
    """Without asking: routed experts where there are some, else the MLPs."""
    assert find_experts(dense()).nodes == "dense"
    model = build("deepseek_v3")
    assert find_experts(model).nodes == "routed"
    assert {nodes: list(find_experts(model, nodes).experts_at.items()) for nodes in ("routed", "shared", "dense")} == {
        "routed": [(1, 8), (2, 8), (3, 8)],
        "shared": [(1, 1), (2, 1), (3, 1)],
        "dense": [(0, 1)],
    }
    with pytest.raises(ValueError, match="unknown nodes='all'; choose from routed, shared, dense"):
        find_experts(model, "all")


@pytest.mark.slow
@every_case
def test_map_equals_autograd(name):
    """Every token is a row; its error is the norm of the loss's gradient at the MLP's output."""
    model, nodes = made(name, torch.float64)
    ids, outputs = tokens(), {}
    reference = copy.deepcopy(model)
    for layer, (*_, last) in linears(reference, name).items():
        last.register_forward_hook(lambda _, args, y, layer=layer: outputs.update({layer: y}))
    predicted = reference(input_ids=ids).logits[:, :-1]
    loss = cross_entropy(predicted.reshape(-1, predicted.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum")
    errors = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values()), retain_graph=True), strict=True))
    emap = measure_errors(model, [ids], nodes=nodes, progress=False)
    assert emap.base.get("nodes") == nodes
    assert emap.count.flatten().tolist() == [ids.numel()] * len(emap.layers)
    mass = torch.stack([errors[layer].norm(dim=-1).sum() for layer in emap.layers])
    assert_close("mass", emap.mass.flatten(), mass, "fp64 gradient")
    loss.backward()
    for row, layer in enumerate(emap.layers):
        *_, last = linears(reference, name)[layer]
        found = emap.gradient["down_proj"].sum(0)[row, 0]
        assert_close("down_proj", found.double(), last.weight.grad, "fp32")


@pytest.mark.slow
@every_case
def test_sweep_equals_autograd(name):
    model, nodes = made(name, torch.float64)
    ids, reference = tokens(), copy.deepcopy(model).train()
    for module in [*model.modules(), *reference.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    reference(input_ids=ids, labels=ids).loss.backward()
    model = grown(model, nodes, resolution="expert")
    found = backward(model)
    wanted = {}
    for site in find_experts(model, nodes).sites:
        *first, last = linears(reference, name)[site.layer]
        axis = 1 if site.base.is_transposed else 0
        key = next(key for key in found if f"{site.name}.pcgrow_" in key and "down" not in key and "bias" not in key)
        wanted[key] = torch.cat([layer.weight.grad for layer in first], dim=axis)[None]
        wanted[key.replace(key.split("pcgrow_")[1].split(".")[0], "down_proj")] = last.weight.grad[None]
        if last.bias is not None:
            stem = key.split("pcgrow_")[1].split(".")[0]
            wanted[key.replace(stem, f"{stem}_bias")] = torch.cat([layer.bias.grad for layer in first])[None]
            wanted[key.replace(stem, "down_proj_bias")] = last.bias.grad[None]
    assert_all_close(found, wanted, "fp64 gradient")


def test_dropout_after_the_mlp():
    """A settled step draws what backprop draws."""
    found = []
    for settle in ("sweep", "backprop"):
        model = grown(gpt2(resid_pdrop=0.5).double(), "dense", settle=settle)
        torch.manual_seed(3)
        found.append(backward(model))
    without = backward(grown(gpt2(resid_pdrop=0.0).double(), "dense"))
    assert_all_close(*found, "fp64 gradient")
    assert any(not torch.allclose(without[key], gradient, rtol=0.1) for key, gradient in found[0].items())


@pytest.mark.slow
@every_case
def test_grow_and_merge(name):
    """The base's bits at birth and while disabled, untouched weights throughout, and merging there and back."""
    model, nodes = made(name)
    before, weights = logits(model), snapshot(model)
    plain = copy.deepcopy(model)
    model = grown(model, nodes)
    assert torch.equal(logits(model), before)
    train(model)
    after = logits(model)
    assert not torch.allclose(after, before)
    base = {key.replace(".base_layer", ""): value for key, value in snapshot(model.base_model.model).items()}
    assert_same(weights, {key: value for key, value in base.items() if "pcgrow_" not in key})
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.merge_adapter()
    assert_close("logits", logits(model), after, "fp32")
    model.unmerge_adapter()
    assert torch.equal(logits(model), after)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == weights.keys()
    # a model of the architecture that has never been adopted
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(logits(plain), logits(merged))


@pytest.mark.slow
@every_case
def test_save_and_load(name, tmp_path):
    model, nodes = made(name)
    model.save_pretrained(tmp_path / "base")
    model = grown(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), nodes)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    for load in LOADERS.values():
        assert torch.equal(logits(load(tmp_path / "base", tmp_path / "adapter")), logits(model))


def test_activations_with_parameters(tmp_path):
    """They are the block's, once: a merged model has the names of the base, and can be saved."""
    names = apertus().state_dict().keys()
    model = grown(apertus(), "dense")
    train(model)
    after, merged = logits(model), model.merge_and_unload()
    assert merged.state_dict().keys() == names
    merged.save_pretrained(tmp_path)
    assert_close("logits", logits(AutoModelForCausalLM.from_pretrained(tmp_path)), after, "fp32")


@pytest.mark.slow
@every_case
def test_two_branches(name):
    """A newborn beside an MLP: the MLP's bits for tokens that its gate keeps out, whatever it has learned."""
    model, nodes = made(name)
    texts = [domain(64, seed=1), domain(64, seed=2)], [retain(64, seed=1), retain(64, seed=2)]
    emap = measure_errors(model, texts[0], retain=texts[1], nodes=nodes, window=8, gradients=False, progress=False)
    top = emap.layers[-1]
    ids = torch.cat([domain(4, seed=9), retain(4, seed=9)])
    before = logits(model, ids)
    model = get_peft_model(model, PCGrowConfig(error_map=emap, locus={top: [0]}, grow="spawn", gate_fpr=0.2))
    assert model.peft_config["default"].nodes == nodes
    assert torch.equal(logits(model, ids), before)
    losses = train(model, steps=20, texts=domain)
    assert losses[-1] < losses[0]
    after = logits(model, ids)
    kept = (after == before).all(dim=-1)
    layer = next(site.module for site in find_experts(model, nodes).sites if site.layer == top)
    passed = []
    handle = layer.register_forward_pre_hook(lambda module, args: passed.append(module.margin("default", args[0]) > 0))
    logits(model, ids)
    handle.remove()
    # in the top layer nothing reaches other tokens
    last = top == len(find_experts(model, nodes).layers) - 1
    assert torch.equal(~kept, passed[0].view(ids.shape)) or not last
    assert passed[0].any()
    assert not passed[0].all()
    with pytest.raises(ValueError, match="newborns"):
        model.merge_adapter()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_parts(name):
    """Single matrices of an MLP: everything else keeps its bits, merged too."""
    model, _ = made(name)
    before = {layer: [copy.deepcopy(each) for each in found] for layer, found in linears(model, name).items()}
    emap = measure_errors(model, [domain()], progress=False)
    config = PCGrowConfig(error_map=emap, budget=0.25, resolution="matrix", select="removable")
    model = get_peft_model(model, config)
    train(model)
    after, parts = logits(model), model.peft_config["default"].parts
    merged = model.merge_and_unload()
    assert_close("logits", logits(merged), after, "fp32")
    for layer, found in linears(merged, name).items():
        grown = parts.get(str(layer), {}).get("0", [])
        for place, (now, was) in enumerate(zip(found, before[layer], strict=True)):
            down = place == len(found) - 1
            assert torch.equal(now.weight, was.weight) == (not any((p == "down_proj") == down for p in grown))
    assert parts


@pytest.mark.slow
def test_kinds_side_by_side():
    """Adapters on the routed and on the shared experts of one model, active together."""
    base = build("qwen2_moe", torch.float64)
    before = logits(base)
    model = get_peft_model(base, PCGrowConfig(locus={1: [2, 5]}))
    model.add_adapter("shared", PCGrowConfig(locus={1: [0], 2: [0]}, nodes="shared"))
    model.base_model.set_adapter(["default", "shared"])
    model.set_requires_grad(["default", "shared"], True)
    assert torch.equal(logits(model), before)
    found = backward(model)
    assert {name.split(".pcgrow_")[0].split("layers.")[1] for name in found} == {
        "1.mlp.experts", "1.mlp.shared_expert.experts", "2.mlp.shared_expert.experts"
    }  # fmt: skip
    reference = copy.deepcopy(model)
    for config in reference.peft_config.values():
        config.settle = "backprop"
    assert_all_close(found, backward(reference), "fp64 gradient")
    train(model)
    after = logits(model)
    model.base_model.set_adapter(["shared"])
    assert not torch.equal(logits(model), after)
    assert Locus(model.peft_config["shared"].locus) == Locus({1: [0], 2: [0]})


def test_targets():
    """MLPs go by the names that LoRA's users give them."""
    for given in (["mlp"], ["mlp.experts"], r".*layers\.1\.mlp"):
        model = get_peft_model(dense(), PCGrowConfig(select="random", budget=1.0, target_modules=given))
        assert set(model.peft_config["default"].locus) == ({"1"} if isinstance(given, str) else {"0", "1", "2"})
    model = get_peft_model(dense(), PCGrowConfig(select="random", budget=1.0, layers_to_transform=[2]))
    assert set(model.peft_config["default"].locus) == {"2"}


@pytest.mark.parametrize("adopted", [False, True])
def test_beside_lora(adopted):
    """On the attention it is trained along; on the MLPs' own layers a bank would compute without it."""
    model = dense()
    if adopted:
        adopt(find_experts(model))
    wrapped = inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"mlp of layer 0 \(LlamaMLP\) has another adapter on its linear layers"):
        find_experts(wrapped)
    beside = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    before = logits(beside)
    assert torch.equal(logits(grown(beside, "dense")), before)


@pytest.mark.slow
def test_callback_measures_what_grows(tmp_path):
    model = grown(build("qwen2_moe"), "shared")
    callback = ErrorMapCallback([tokens()], every=2, max_share=1.0)
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
    assert callback.map.base["nodes"] == "shared"


def test_what_cannot_be_adopted():
    """Blocks that compute more than their layers tell are left as they are."""
    model = dense()
    mlp = model.model.layers[1].mlp
    kind = type(mlp)
    mlp.__class__ = type("Scaled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    before = logits(model)
    with pytest.raises(ValueError, match=r"mlp of layer 1 \(Scaled\) computes something else than its linear layers"):
        find_experts(model)
    assert torch.equal(logits(model), before)
    assert not hasattr(mlp, "experts")


@pytest.mark.parametrize(
    "needed", [lambda layer: {0: 2.0}[layer], lambda layer: [2.0][layer], lambda layer: layer.scale]
)
def test_what_needs_to_be_told_its_layer_cannot_be_adopted(needed):
    """As blocks that several layers share do (Zamba 2)."""
    model = dense()
    mlp = model.model.layers[1].mlp
    kind = type(mlp)
    forward = {"forward": lambda self, x, layer=None: needed(layer) * kind.forward(self, x)}
    mlp.__class__ = type("Told", (kind,), forward)
    with pytest.raises(ValueError, match=r"mlp of layer 1 \(Told\) computes something else than its linear layers"):
        find_experts(model)
    assert not hasattr(mlp, "experts")


def test_no_router_to_export(tmp_path):
    model = dense()
    emap = measure_errors(model, [domain(64)], retain=[retain(64)], window=8, gradients=False, progress=False)
    model = get_peft_model(model, PCGrowConfig(error_map=emap, locus={2: [0]}, grow="spawn", gate_fpr=0.2))
    with pytest.raises(ValueError, match="beside an MLP that no router chooses"):
        export_flat(model, tmp_path / "flat", [domain()])


@every_case
def test_autocast(name):
    """16 and 32 bits meet where rows are put together: at birth the bits of the base, in training one gradient."""
    base, nodes = made(name)
    texts = torch.cat([domain(4), retain(4)])
    emap = measure_errors(base, [domain()], retain=[retain()], nodes=nodes, gradients=False, window=8, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(base, texts)
    for grow in ("spawn", "deepen"):
        gradients = []
        for settle in ("sweep", "backprop"):
            config = PCGrowConfig(error_map=emap, grow=grow, budget=1.0, select="error", settle=settle, gate_fpr=0.2)
            model = get_peft_model(made(name)[0], config)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(logits(model, texts), plain)
                torch.manual_seed(0)  # of what is dropped
                model.train()(input_ids=texts, labels=texts).loss.backward()
            gradients.append({name: p.grad for name, p in trainable(model).items()})
        assert any(gradient.any() for gradient in gradients[0].values())
        assert_all_close(*gradients, "bf16")
