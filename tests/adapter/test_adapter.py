"""The contract of a PEFT method: create, train, switch off, merge, leave."""

import copy
import json
import pickle

import pytest
import torch
from peft import get_layer_status, get_model_status, get_peft_model

from close import assert_all_close
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from tiny import ARCHITECTURES, LOCUS, assert_same, backward, build, grown, logits, snapshot, tokens, train, trainable

# ---- creating


@pytest.mark.slow
@pytest.mark.parametrize("given", ["object", "str", "path"])
@pytest.mark.parametrize("select", ["error", "removable", "gate", "frequency"])
def test_map_leads_to_its_highest_nodes(given, select, tmp_path):
    """The grown nodes are the round(budget L E) with the highest statistic, whichever way the map is given."""
    model = build("qwen3_moe")
    emap = measure_errors(model, [tokens()], progress=False)
    score = emap.score(select)
    highest = score.flatten().topk(round(0.2 * score.numel())).indices.tolist()
    expected = {(emap.layers[i // 8], i % 8) for i in highest}
    emap.save(tmp_path / "map")
    source = {"object": emap, "str": str(tmp_path / "map"), "path": tmp_path / "map"}[given]
    adapted = get_peft_model(model, PCGrowConfig(error_map=source, budget=0.2, select=select))
    chosen = {(layer, e) for layer, experts in adapted.peft_config["default"].locus.items() for e in experts}
    assert {(int(layer), e) for layer, e in chosen} == expected
    assert {(w.layer_index, e) for w in adapted.base_model.tuner_layers() for e in w.grown["default"]} == expected


def test_random_selection_follows_its_seed():
    """select='random' needs no map, draws round(budget L E) nodes, and repeats with its seed alone."""
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))
        model = get_peft_model(build("deepseek_v3"), PCGrowConfig(select="random", budget=0.25, seed=seed))
        drawn.append(model.peft_config["default"].locus)
    assert drawn[0] == drawn[1] != drawn[2]
    assert sum(map(len, drawn[0].values())) == round(0.25 * 3 * 8)
    assert "0" not in drawn[0]  # the dense layer


@pytest.mark.slow
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("given", [{}, {"layers_pattern": "layers"}])
@pytest.mark.parametrize(("layers", "expected"), [(1, "1"), ([0, 1], "01"), ([], "012"), (None, "012")])
def test_layers_to_transform(layers, expected, given, headless):
    """Decoder layers are counted alike in a model with a head and in one without."""
    model = build().model if headless else build()
    adapted = get_peft_model(model, PCGrowConfig(select="random", budget=1.0, layers_to_transform=layers, **given))
    assert "".join(adapted.peft_config["default"].locus) == expected


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_born_as_the_base(name, implementation):
    """At birth the adapted model computes the base's function, bit for bit where the architecture's own loop runs."""
    base = build(name, implementation=implementation)
    before = logits(base)
    after = logits(get_peft_model(base, PCGrowConfig(locus=LOCUS)))
    if implementation == "eager":
        assert torch.equal(before, after)
    else:
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_perturbed_birth():
    """init_weights=False gives visibly other experts."""
    change = logits(grown(init_weights=False)) - logits(build())
    assert float(change.abs().max()) > 1e-2


def test_counts(capsys):
    """Five experts of 3 * 16 * 32 weights train, and PEFT's own reports say so."""
    model = grown()
    weights = 5 * 3 * 16 * 32
    total = sum(p.numel() for p in build().parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {weights:,} || all params: {total + weights:,} ||")
    status = get_model_status(model)
    assert (status.base_model_type, status.peft_types) == ("Qwen3MoeForCausalLM", {"default": "PCGROW"})
    assert (status.trainable_params, status.num_adapter_layers) == (weights, 2)
    assert status.enabled is True
    assert status.active_adapters == status.available_adapters == ["default"]
    layers = get_layer_status(model)
    assert [layer.module_type for layer in layers] == ["pcgrow.PCGrowExperts"] * 2
    assert [layer.requires_grad for layer in layers] == [{"default": True}] * 2
    assert repr(model.base_model.tuner_layers()[0]).startswith("pcgrow.PCGrowExperts(")
    assert "layer=1, grown={'default': [1, 4]}" in repr(model)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtype(autocast):
    """Banks on a bf16 base are fp32, or the base's dtype with autocast_adapter_dtype=False; both train."""
    model = grown(dtype=torch.bfloat16, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32 if autocast else torch.bfloat16}
    assert torch.equal(logits(model), logits(build(dtype=torch.bfloat16)))
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    train(model)
    assert all(not torch.equal(p, before[name]) for name, p in trainable(model).items())


def test_config_pickles():
    """A config survives pickling, deepcopy and its own dict, with equal fields."""
    config = PCGrowConfig(locus=LOCUS, modules_to_save=["lm_head"], target_modules=["experts"])
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config
        assert other.peft_type is config.peft_type
    assert config.to_dict()["locus"] == {"1": [1, 4], "2": [0, 3, 7]}
    assert PCGrowConfig(locus=config.to_dict()["locus"]) == PCGrowConfig(locus=LOCUS)


def test_config_with_a_map_in_memory():
    """A map held in memory stays out of the config's dict, and in the config."""
    emap = measure_errors(build(), [tokens()], progress=False)
    config = PCGrowConfig(error_map=emap, budget=0.2)
    assert json.loads(json.dumps(config.to_dict(), default=list))["error_map"] is None
    assert config.error_map is emap
    assert PCGrowConfig(error_map="maps/first").to_dict()["error_map"] == "maps/first"


# ---- training


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_writes_the_banks_only(name, implementation):
    """After some steps every base tensor has its bits and no gradient; every grown expert has moved."""
    base = build(name, implementation=implementation)
    held, before = dict(base.named_parameters()), snapshot(base)
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    losses = train(model, steps=4)
    assert losses[-1] < losses[0] + 0.2
    for label, parameter in held.items():
        assert torch.equal(parameter, before[label]), label
        assert parameter.grad is None, label
    for site in find_experts(model).sites:
        if site.layer in LOCUS:
            for stack, weight in site.module.bank("default").items():
                donor = dict(site.base.named_parameters())[stack][LOCUS[site.layer]]
                assert (weight != donor).flatten(1).any(dim=1).all(), (site.layer, stack)


@pytest.mark.slow
@pytest.mark.parametrize("further", [["lm_head"], ["embed_tokens"], ["post_attention_layernorm"], ["gate", "norm"]])
def test_modules_to_save_train(further):
    """Further modules, above, below and among the decoder layers, get autograd's gradients from a sweep (fp64)."""
    swept = backward(grown(dtype=torch.float64, modules_to_save=further))
    control = backward(grown(dtype=torch.float64, modules_to_save=further, settle="backprop"))
    assert all(any(f"{module}.modules_to_save" in name for name in swept) for module in further)
    assert_all_close(swept, control, "fp64 gradient")


def test_copies_train_apart():
    """A deepcopy settles through its own layers: right gradients, and neither copy moves the other."""
    model = grown(dtype=torch.float64)
    expected = backward(model)
    twin = copy.deepcopy(model)
    assert_same(backward(twin), expected)
    model.zero_grad()
    before = snapshot(model)
    train(twin)
    assert_same(before, snapshot(model))
    assert not torch.equal(logits(twin), logits(model))
    assert_same(backward(model), expected)


def test_a_copy_is_guarded():
    """The checks of a training step hold for a deepcopy too."""
    twin = copy.deepcopy(grown())
    optimizer = torch.optim.AdamW(trainable(twin).values())
    backward(twin)
    for parameter in trainable(twin).values():
        parameter.grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step is refused"):
        optimizer.step()


def test_pickled_model():
    """A pickled model trains as the original: processes are started that way."""
    model = grown(dtype=torch.float64)
    assert_same(backward(pickle.loads(pickle.dumps(model))), backward(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_generation_with_a_cache(name):
    """Greedy text after training is the same with and without a KV cache, and not the base's."""
    model = get_peft_model(build(name), PCGrowConfig(locus=LOCUS))
    before = model.generate(input_ids=tokens(2, 5), max_new_tokens=16, do_sample=False)
    train(model, steps=8, lr=3e-2)
    cached = model.generate(input_ids=tokens(2, 5), max_new_tokens=16, do_sample=False, use_cache=True)
    plain = model.generate(input_ids=tokens(2, 5), max_new_tokens=16, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, before)


# ---- switching off, merging, leaving


def test_disabled_is_the_base():
    """Inside disable_adapter() a trained model has the base's bits, and its own again afterwards."""
    model = grown()
    train(model)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build()))
    assert torch.equal(logits(model), trained)
    assert not torch.equal(trained, logits(build()))
    assert len(trainable(model)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merge_is_undone_exactly(name, dtype):
    """Unmerging gives every base tensor its bits back; merged, the base computes what the adapter did."""
    model = grown(name=name, dtype=dtype)
    stacks = {label for label in snapshot(model) if ".experts.base_layer." in label}
    train(model)
    before, apart = snapshot(model), logits(model)
    model.merge_adapter()
    merged = logits(model)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged, apart, rtol=tolerance, atol=tolerance)
    changed = {label for label, tensor in snapshot(model).items() if not torch.equal(tensor, before[label])}
    assert changed == stacks
    model.unmerge_adapter()
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), apart)


def test_merged_then_disabled():
    """Disabling a merged adapter unmerges: the base's bits."""
    model = grown()
    train(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build()))


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False])
def test_leaving(merge):
    """merge_and_unload and unload give back a plain model: same class, no adapter module, no hook."""
    base = build()
    before, keys, kind = logits(base), list(base.state_dict()), type(base)
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    train(model)
    trained = logits(model)
    plain = model.merge_and_unload(safe_merge=True) if merge else model.unload()
    assert type(plain) is kind
    assert list(plain.state_dict()) == keys
    assert not [m for m in plain.modules() if type(m).__module__.startswith("peft")]
    for layer in find_experts(plain).layers:
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
    torch.testing.assert_close(logits(plain), trained if merge else before, rtol=1e-5, atol=1e-5)
    regrown = get_peft_model(plain, PCGrowConfig(locus={1: [0, 2], 2: [5]}))
    assert len(backward(regrown)) == 4


@pytest.mark.slow
def test_safe_merge_refuses_nan():
    """safe_merge finds NaN before anything is written, in the layers below it too."""
    model = grown()
    train(model)
    with torch.no_grad():
        model.base_model.tuner_layers()[1].bank("default")["down_proj"][0, 0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert_same({k: v.nan_to_num() for k, v in before.items()}, {k: v.nan_to_num() for k, v in snapshot(model).items()})
