"""LoRA beside newborns holds for tokens that a gate lets pass; all others keep the base's bits."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_bad_input import refused
from torch import Tensor, nn

from close import assert_all_close, assert_close
from loaders import LOADERS
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, export_flat, measure_errors
from peft_pcgrow.gates.gate import RATES
from tiny import (
    LOCUS,
    backward,
    build,
    contrast,
    domain,
    gate_passes,
    logits,
    mixed,
    retain,
    spawned,
    spawning,
    taken,
    tokens,
    train,
)  # fmt: skip

# LoRA that moves nearly nothing but what follows from it
TARGETS = ["q_proj", "v_proj", "o_proj"]


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes})


def gated(name: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **changes) -> PeftModel:
    torch.manual_seed(0)
    return spawned(name, dtype, **{"lora": lora(), **changes})


@torch.no_grad()
def entry_passes(model: nn.Module, ids: Tensor, **inputs) -> dict[int, Tensor]:
    """Which tokens pass the gate of what enters each layer's attention, `[B, S]` by layer: from its definition, token
    by token."""
    found, handles = {}, []
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()

    def look(layer: nn.Module):
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            found[layer.layer_index] = gate_passes(layer, "default", hidden, real, kind="entry")

        return hook

    for layer in model.base_model.tuner_layers():
        attention = model.get_base_model().model.layers[layer.layer_index].self_attn
        handles.append(attention.register_forward_pre_hook(look(layer), with_kwargs=True))
    try:
        model(input_ids=ids, use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def adapted(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """The projections that have LoRA, with the indices of their layers."""
    layers = model.get_base_model().model.layers
    return [
        (index, getattr(layer.self_attn, name))
        for index, layer in enumerate(layers)
        for name in TARGETS
        if hasattr(getattr(layer.self_attn, name), "lora_A")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_it_adds_to_tokens_that_pass(name):
    """Every projection gives W x + s B A x where the gate's definition lets a token pass, and W x to the bit elsewhere;
    texts that turn from one domain to the other among them."""
    model, ids, seen = gated(name).eval(), mixed(), {}
    passes = entry_passes(model, ids)
    handles = [
        module.register_forward_hook(lambda m, args, out, key=(index, module): seen.update({key: (args[0], out)}))
        for index, module in adapted(model)
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(adapted(model)) > 0
    assert all(bool(p.any()) and not bool(p.all()) for p in passes.values())
    for (index, module), (x, out) in seen.items():
        base = module.base_layer(x)
        a, b = (getattr(module, f"lora_{n}")["default"].weight for n in ("A", "B"))
        expected = base + module.scaling["default"] * (x @ a.mT @ b.mT)
        assert torch.equal(out[~passes[index]], base[~passes[index]])
        assert_close("projection", out[passes[index]], expected[passes[index]], "fp32")
        assert not torch.equal(out[passes[index]], base[passes[index]])


@pytest.mark.slow
def test_tokens_before_any_that_pass_keep_their_bits():
    model, ids = gated(), mixed()
    train(model, texts=domain)
    model.eval()
    plain = logits(build(), ids)
    after, passes = logits(model, ids), entry_passes(model, ids)
    touched = torch.stack([*passes.values(), *taken(model, ids).values()]).any(0)
    # through the attention, what follows a token that passes changes too
    reached = touched.cumsum(1) > 0
    assert bool(reached.any())
    assert not bool(reached.all())
    assert torch.equal(after[~reached], plain[~reached])
    assert not torch.equal(after[reached], plain[reached])


@pytest.mark.parametrize("open_", [True, False])
def test_extremes(open_):
    """With open gates it is PEFT's LoRA on these modules, with closed ones the base, bit for bit."""
    model, ids = gated(), tokens()
    expected = build()
    for layer in model.base_model.tuner_layers():
        layer.pcgrow_entry_threshold["default"].fill_(-1e30 if open_ else 1e30)
        layer.pcgrow_gate_threshold["default"].fill_(1e30)
    if open_:
        layers = sorted({index for index, _ in adapted(model)})
        expected = get_peft_model(expected, lora(layers_to_transform=layers))
        mine = {k.rpartition("model.layers.")[2]: p for k, p in model.named_parameters() if ".lora_" in k}
        theirs = {k.rpartition("model.layers.")[2]: p for k, p in expected.named_parameters() if ".lora_" in k}
        assert mine.keys() == theirs.keys()
        for key, parameter in theirs.items():
            parameter.data.copy_(mine[key])
    assert torch.equal(logits(model, ids), logits(expected.eval(), ids))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_gradients_are_autograds(name):
    targets = ["q_proj", "v_proj"] if name == "qwen3_moe" else ["q_b_proj", "o_proj"]
    found = {}
    for settle in ("sweep", "backprop"):
        model = gated(name, torch.float64, settle=settle, gate_fpr=0.5, lora=lora(target_modules=targets))
        found[settle] = backward(model)
    assert {".lora_" in key for key in found["sweep"]} == {True, False}
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_gradients_under_checkpointing():
    found = {}
    for checkpointing in (True, False):
        model = gated(dtype=torch.float64, settle="backprop", gate_fpr=0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found[checkpointing] = backward(model)
    assert_all_close(found[True], found[False], "fp64 gradient")


def test_a_token_that_does_not_pass_gives_no_gradient():
    model = gated(settle="sweep").train()
    for layer in model.base_model.tuner_layers():
        layer.pcgrow_entry_threshold["default"].fill_(1e30)
    model(input_ids=domain(), labels=domain()).loss.backward()
    assert all(not bool(p.grad.any()) for name, p in model.named_parameters() if ".lora_" in name)


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_restore_it(loader, tmp_path):
    build().save_pretrained(tmp_path / "base")
    base = type(build()).from_pretrained(tmp_path / "base")
    plain = logits(base, mixed())
    model = get_peft_model(base, spawning(lora=lora(init_lora_weights=True)))
    assert torch.equal(logits(model, mixed()), plain)
    train(model, texts=domain)
    model.save_pretrained(tmp_path / "adapter")
    loaded = LOADERS[loader](tmp_path / "base", tmp_path / "adapter")
    expected = logits(model.eval(), mixed())
    assert not torch.equal(expected, plain)
    assert torch.equal(logits(loaded.eval(), mixed()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_with_a_cache(options):
    """The text that is written is that of whole forwards, also behind padding on the left."""
    model, ids = gated().eval(), mixed()[:, :12]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    plain = {**settings, "use_cache": False}
    plain.pop("cache_implementation", None)
    assert torch.equal(model.generate(input_ids=ids, **settings), model.generate(input_ids=ids, **plain))
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    mask = torch.cat([torch.zeros_like(ids[:, :3]), torch.ones_like(ids)], dim=1)
    behind = model.generate(input_ids=padded, attention_mask=mask, **settings)
    assert torch.equal(behind[:, 3:], model.generate(input_ids=ids, **settings))


def assert_the_same_token_by_token(model: nn.Module, ids: Tensor) -> None:
    whole, cache, single = logits(model, ids), None, []
    with torch.no_grad():
        for place in range(ids.shape[1]):
            out = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            single.append(out.logits)
    assert_close("token by token", torch.cat(single, dim=1), whole, "fp32")


@pytest.mark.slow
def test_tokens_one_by_one():
    """Every token's logits with a cache are those of the whole text, within rounding."""
    model, ids = gated().eval(), mixed()
    assert_the_same_token_by_token(model, ids)


def test_samples_that_name_adapters():
    model, ids = gated(), mixed()
    model.add_adapter("second", spawning(lora=lora(), gate_fpr=0.3))
    model.eval()
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model, ids)
    assert not torch.equal(expected["default"], expected["second"])
    names = ["default", "second"] * 4
    found = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(name, found[row], expected[name][row], "fp32")
    assert_close("none", logits(model, ids, adapter_names=["__base__"] * 8), logits(build(), ids), "fp32")


@pytest.mark.slow
def test_switches_and_copies():
    model, ids = gated().eval(), mixed()
    expected = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(build(), ids))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)
        for layer in other.base_model.tuner_layers():
            layer.pcgrow_entry_threshold["default"].fill_(1e30)
        assert not torch.equal(logits(other, ids), expected)
        assert torch.equal(logits(model, ids), expected)
    model.set_gate_fpr(RATES[-1])
    assert not torch.equal(logits(model, ids), expected)
    model.set_gate_fpr(0.05)
    assert torch.equal(logits(model, ids), expected)


def test_it_is_where_newborns_are():
    """In layers without newborns it is taken out; a deepening adapter beside keeps its own."""
    model = gated(locus={1: [0, 2]})
    assert {index for index, _ in adapted(model)} == {1}
    model.add_adapter("deep", PCGrowConfig(locus={0: [1]}, lora=lora()))
    assert {index for index, m in adapted(model) if "deep" in m.lora_A} == {0, 1, 2}
    model.add_adapter("second", spawning(locus={0: [3]}, lora=lora()))
    assert {index for index, m in adapted(model) if "second" in m.lora_A} == {0}
    model.delete_adapter("default")
    assert {index for index, m in adapted(model) if "default" in m.lora_A} == set()


def test_its_optimizer():
    model = gated(lora=lora(init_lora_weights=True))
    before = {name: p.clone() for name, p in model.named_parameters() if ".lora_" in name}
    optimizer = create_pcgrow_optimizer(model, lr=0.01)
    model.train()
    for _ in range(2):
        model(input_ids=domain(), labels=domain()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": lora(use_dora=True)}, r"rescales the weights of .*use plain LoRA"),
        ({"lora": lora(target_modules=["q_proj", "lm_head"])}, r"LoRA on lm_head has no gate"),
        ({"lora": lora(layers_to_transform=[0]), "locus": {1: [0]}}, r"none of the layers with newborns \(\[1\]\)"),
        ({"lora": lora(target_modules=["q_proj", "embed_tokens"])}, r"embed_tokens is an embedding"),
        ({"lora": lora(target_modules=["embed_tokens"])}, r"embed_tokens is an embedding"),
    ],
)
def test_refused(changes, message):
    model = build()
    with refused(model, ValueError, message):
        get_peft_model(model, spawning(**changes))


def test_modules_that_run_on_the_cache():
    model = build("deepseek_v3")
    with refused(model, ValueError, r"kv_b_proj runs on the tokens of the KV cache too"):
        get_peft_model(model, spawning("deepseek_v3", lora=lora(target_modules=["kv_b_proj", "q_b_proj"])))


def test_rows_that_are_no_tokens():
    """A module that runs on something else says which, and what to do."""
    model = gated().eval()
    (index, module), *_ = adapted(model)
    layer = next(each for each in model.base_model.tuner_layers() if each.layer_index == index)
    hidden = torch.randn(2, 3, module.in_features)
    layer.call.passes = {"default": torch.ones(2, 3, dtype=torch.bool)}
    assert module(hidden).shape[:2] == (2, 3)
    with pytest.raises(RuntimeError, match=r"runs on rows of shape \(2, 2\).*leave that module out"):
        module(hidden[:, :2])
    layer.call.end()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minimax", "longcat_flash"])
def test_other_caches_and_two_attentions(name):
    """Caches that keep some layers elsewhere, and layers that attend twice: token by token as all at once."""
    from architectures import build as conformance

    model = conformance(name).eval()
    texts = [domain(16, seed=n) for n in range(4)], [retain(16, seed=n) for n in range(4)]
    emap = measure_errors(model, texts[0], retain=texts[1], window=8, gradients=False, progress=False)
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and "attn" in n}
    targets = sorted(names & {"q_proj", "qkv_proj", "out_proj", "q_b_proj", "o_proj"})
    config = PCGrowConfig(error_map=emap, grow="spawn", budget=0.3, gate_fpr=0.3, lora=lora(target_modules=targets))
    torch.manual_seed(0)
    model = get_peft_model(model, config).eval()
    ids = mixed()
    assert_the_same_token_by_token(model, ids)


def test_merging_a_deepening_adapter_switches_it_off():
    """As it does newborns."""
    model, ids = gated(), mixed()
    model.add_adapter("deep", PCGrowConfig(locus={0: [1], 1: [5], 2: [1]}, init_weights=False))
    model.base_model.set_adapter(["default", "deep"])
    model.eval()
    model.merge_adapter(["deep"])
    found = logits(model, ids)
    model.unmerge_adapter()
    model.base_model.set_adapter(["deep"])
    assert_close("deepened alone", found, logits(model, ids), "fp32")


@pytest.mark.slow
def test_a_map_without_entry_gates():
    emap = copy.deepcopy(contrast())
    emap.separation.entry["threshold"].fill_(float("inf"))
    model = build()
    with refused(model, ValueError, r"layer 1 has none that could be followed: leave lora out"):
        get_peft_model(model, spawning(error_map=emap, lora=lora()))
    assert get_peft_model(model, spawning(error_map=emap)) is not None


def test_a_cache_filled_without_the_adapter():
    """Which gate lacks the tokens is said in words."""
    model, ids = gated().eval(), mixed()
    with torch.no_grad(), model.disable_adapter():
        held = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"the gate of LoRA in adapter 'default' at layer \d+ rem"):
        model(input_ids=ids[:, 8:], past_key_values=held, use_cache=True)


def test_merging_and_exporting_are_refused(tmp_path):
    """Neither text advises the other."""
    model = gated("gpt_oss", router="branch")
    with pytest.raises(ValueError, match="for all tokens or none: keep the adapter, or grow without lora="):
        export_flat(model, tmp_path / "flat", [domain(), retain()])
    with pytest.raises(ValueError, match=r"newborns.*Keep the adapter, or grow without lora= and") as refusal:
        model.merge_adapter()
    assert "export_flat" in str(refusal.value)
    index, module = adapted(model)[0]
    with pytest.raises(ValueError, match="cannot be merged: keep the adapter, or grow without lora="):
        module.merge()
    assert index in LOCUS
    model.eval()
    with pytest.raises(RuntimeError, match="run the whole decoder layer"):
        module(torch.randn(2, 3, module.in_features))
