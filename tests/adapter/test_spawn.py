"""Newborns: born as the base, taking the domain's rows only, trained, saved, combined and refused like any adapter."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_trainer import banks, fit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM

from close import assert_all_close, assert_close
from loaders import LOADERS
from peft_pcgrow import ErrorMap, PCGrowConfig, find_experts
from tiny import (
    ARCHITECTURES,
    LOCUS,
    PAD,
    assert_same,
    build,
    contrast,
    domain,
    logits,
    mixed,
    snapshot,
    spawned,
    spawning,
    taken,
    train,
    trainable,
)

CASES = [(name, implementation) for implementation in ("eager", "grouped_mm") for name in ARCHITECTURES]
TOP = {2: [0, 1, 2, 3, 4, 5, 6, 7]}


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """After steps on domain text that move every newborn by far."""
    train(model, lr=3e-2, seed=seed, texts=domain)
    return model


def any_taken(model: nn.Module, ids: Tensor, adapter: str = "default", **inputs) -> Tensor:
    """Tokens of which a newborn takes a row at any layer, `[B, S]`; some are, and some are not."""
    found = torch.stack(list(taken(model, ids, adapter, **inputs).values())).any(dim=0)
    assert 0.05 < float(found.float().mean()) < 0.95
    return found


def moved(after: Tensor, before: Tensor) -> Tensor:
    """Tokens whose logits are others, `[B, S]`."""
    return (after != before).any(dim=-1)


# ---- birth, and what must not change


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_born_as_the_base(name, implementation):
    """Rows are taken from every donor's layer, and the function is the base's, bit for bit."""
    before = logits(build(name, implementation=implementation), mixed())
    model = spawned(name, implementation=implementation)
    assert {int(layer) for layer in model.peft_config["default"].spawned} == set(LOCUS)
    assert all(0 < int(rows.sum()) < rows.numel() for rows in taken(model, mixed()).values())
    assert torch.equal(logits(model, mixed()), before)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 1, 8])
def test_a_gate_takes_what_its_definition_says(window):
    """At the one grown layer a token's output changes if and only if its evidence, by hand, is above the threshold."""
    base = logits(build(), mixed())
    model = trained(spawned(locus={2: [0, 3, 7]}, window=window))
    assert torch.equal(moved(logits(model, mixed()), base), any_taken(model, mixed()))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_evidence(side):
    """A padded text is gated as it is alone."""
    model, ids = spawned(locus=TOP), mixed()
    mask = torch.ones_like(ids)
    mask[:, slice(0, 9) if side == "left" else slice(15, 24)] = 0
    padded = any_taken(trained(model), ids.masked_fill(mask == 0, PAD), attention_mask=mask)
    alone = any_taken(model, ids[mask.bool()].view(8, 15))
    assert torch.equal(padded[mask.bool()].view(8, 15), alone)
    change = moved(*(logits(m, ids.masked_fill(mask == 0, PAD), attention_mask=mask) for m in (model, build())))
    assert torch.equal(change[mask.bool()].view(8, 15), alone)


def test_disabled_is_the_base():
    model = trained(spawned())
    after = logits(model, mixed())
    with model.disable_adapter():
        assert torch.equal(logits(model, mixed()), logits(build(), mixed()))
    assert torch.equal(logits(model, mixed()), after)
    assert moved(after, logits(build(), mixed())).any()


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(merge):
    model = trained(spawned())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has newborns \(layer 1: \[1, 4\]\).*export_flat"):
        getattr(model, merge)()
    assert_same(before, snapshot(model))
    assert not any(layer.merged for layer in model.base_model.tuner_layers())


@pytest.mark.slow
def test_unloading():
    """The base's class, keys and bits come back, without a hook."""
    base = build()
    keys, hooks = list(base.state_dict()), {id(m): len(m._forward_pre_hooks) for m in base.modules()}
    plain = trained(get_peft_model(base, spawning())).unload()
    assert list(plain.state_dict()) == keys
    assert not any(m._forward_hooks or len(m._forward_pre_hooks) > hooks.get(id(m), 0) for m in plain.modules())
    assert torch.equal(logits(plain, mixed()), logits(build(), mixed()))
    regrown = trained(get_peft_model(plain, spawning()))
    assert torch.equal(logits(regrown, mixed()), logits(trained(spawned()), mixed()))


@pytest.mark.slow
def test_deleting_and_growing_again():
    model = trained(spawned())
    expected = logits(model, mixed())
    model.add_adapter("other", spawning(locus={1: [6]}))
    model.delete_adapter("other")
    model.add_adapter("other", spawning(locus={0: [2], 1: [0]}))
    assert torch.equal(logits(model, mixed()), expected)
    model.set_adapter("other")
    assert any_taken(trained(model), mixed(), "other").any()


@pytest.mark.slow
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_gate_apart(twin):
    """A copy made after generation reads its own texts, and trains without moving the original."""
    model = trained(spawned())
    model.generate(input_ids=mixed()[:2], max_new_tokens=2, do_sample=False)
    expected = logits(model, mixed())
    other = twin(model)
    logits(model, mixed(length=10))
    assert torch.equal(logits(other, mixed()), expected)
    trained(other, seed=5)
    assert torch.equal(logits(model, mixed()), expected)
    assert not torch.equal(logits(other, mixed()), expected)


# ---- gradients


def gradients(model: nn.Module, loss) -> dict[str, Tensor]:
    model.train()
    loss(model).backward()
    found = {name: p.grad for name, p in trainable(model).items()}
    assert all(bool(gradient.any()) for gradient in found.values())
    return found


def language_loss(model: nn.Module) -> Tensor:
    return model(input_ids=mixed(), labels=mixed()).loss


def preference(model: nn.Module) -> Tensor:
    """Two forwards before one backward, padded on the left by other widths."""
    scores = []
    for seed, pads in ((50, (0, 3, 9, 0, 5, 0, 8, 1)), (60, (11, 0, 2, 7, 0, 4, 0, 13))):
        ids, mask = mixed(seed=seed), (torch.arange(24) >= torch.tensor(pads)[:, None]).long()
        given = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
        real = mask[:, :-1].bool()
        scores.append(-cross_entropy(model(**given).logits[:, :-1][real], ids[:, 1:][real]))
    return -logsigmoid(scores[0] - 0.5 * scores[1])


@pytest.mark.slow
@pytest.mark.parametrize("loss", [language_loss, preference])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sweep_equals_backprop(name, loss):
    found = {}
    for settle in ("sweep", "backprop"):
        model = spawned(name, torch.float64, settle=settle)
        any_taken(model, mixed())
        found[settle] = gradients(model, loss)
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_rows_are_shared_out():
    """A newborn's gradient and what its donor would still get add up to the donor's of the plain base (fp64)."""
    plain = build(dtype=torch.float64).train().requires_grad_(True)
    language_loss(plain).backward()
    model = spawned(dtype=torch.float64, settle="backprop")
    model.requires_grad_(True)
    found = gradients(model, language_loss)
    for site in find_experts(model).sites:
        for stack, whole in site.base.named_parameters() if site.layer in LOCUS else ():
            newborn = found[
                f"base_model.model.{site.name}.pcgrow_{stack}.default.weight".replace(
                    "base_model.model.base_model.model", "base_model.model"
                )
            ]
            want = (
                plain.get_submodule(site.name.removeprefix("base_model.model."))
                .get_parameter(stack)
                .grad[LOCUS[site.layer]]
            )
            assert whole.grad[LOCUS[site.layer]].any()
            assert_close(f"{site.layer} {stack}", newborn + whole.grad[LOCUS[site.layer]], want, "fp64 gradient")


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settle", ["sweep", "backprop"])
@pytest.mark.parametrize("loss", [language_loss, preference])
def test_gradient_checkpointing(loss, settle, reentrant):
    """Recomputed layers gate as they did in the forward."""
    want = gradients(spawned(dtype=torch.float64, settle="backprop"), loss)
    model = spawned(dtype=torch.float64, settle=settle)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_all_close(gradients(model, loss), want, "fp64 gradient")


# ---- saving


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def saved(request, tmp_path):
    """Folders of a base and of a trained adapter with protected directions, and the model."""
    build(request.param).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, spawning(request.param, protect=0.8)))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_agree(saved, loader):
    """Every loader gives the trained model's logits, gates and directions, bit for bit."""
    folder, model = saved
    expected = logits(model, mixed())
    loaded = LOADERS[loader](folder / "base", folder / "adapter")
    assert torch.equal(logits(loaded, mixed()), expected)
    assert moved(expected, logits(AutoModelForCausalLM.from_pretrained(folder / "base"), mixed())).any()
    mine, theirs = ({k.removeprefix("base_model.model."): t for k, t in banks(m).items()} for m in (model, loaded))
    assert any("pcgrow_gate_direction" in name for name in mine)
    assert any("pcgrow_protect_down_proj" in name for name in mine)
    assert_same(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_gates_stay_in_fp32(loader, tmp_path):
    """On a bf16 base, at birth and loaded again: the same gates, and the same logits."""
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    before = logits(base, mixed())
    model = get_peft_model(base, spawning())
    assert torch.equal(logits(model, mixed()), before)
    expected = logits(trained(model), mixed())
    assert moved(expected, before).any()
    model.save_pretrained(tmp_path / "adapter")
    loaded = LOADERS[loader](tmp_path / "base", tmp_path / "adapter")
    for each in (model, loaded):
        gates = [tensor for name, tensor in banks(each).items() if "proj" not in name and "pcgrow_gate" in name]
        assert [tensor.dtype for tensor in gates] == [torch.float32] * 6
    assert torch.equal(logits(loaded, mixed()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("buffer", ["gate_direction", "gate_law", "gate_threshold", "protect_down_proj"])
def test_altered_gates_are_refused(saved, buffer):
    folder, _ = saved
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(f"layers.2.mlp.experts.pcgrow_{buffer}"))
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"layer 2 of .*: pcgrow_{buffer} does not have the checksum saved"):
        LOADERS["PeftModel"](folder / "base", folder / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("protect", [0.0, 0.8])
def test_trained_on_after_loading(protect, tmp_path):
    """is_trainable=True: further steps are those of the model that was never saved."""
    model = trained(spawned(protect=protect))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    assert torch.equal(logits(trained(loaded, seed=9), mixed()), logits(trained(model, seed=9), mixed()))


@pytest.mark.slow
def test_config_round_trip(saved):
    """The config read back equals the one saved, newborns and ranks included, and names no map."""
    folder, model = saved
    loaded = PeftConfig.from_pretrained(folder / "adapter")
    loaded.inference_mode, loaded.auto_mapping = False, None
    kept = copy.copy(model.peft_config["default"])
    kept.auto_mapping, kept.base_model_name_or_path = None, loaded.base_model_name_or_path
    assert loaded == kept
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["error_map"] is None
    assert (loaded.spawned, loaded.gate_window) == ({str(layer): chosen for layer, chosen in LOCUS.items()}, 8)


def test_grown_from_a_saved_map(tmp_path):
    contrast().save(tmp_path / "map")
    assert_same(snapshot(spawned(error_map=str(tmp_path / "map"))), snapshot(spawned()))
    assert_same(snapshot(spawned(error_map=ErrorMap.load(tmp_path / "map"))), snapshot(spawned()))


@pytest.mark.slow
@pytest.mark.parametrize("protect", [0.0, 0.8])
def test_resuming_a_trainer(protect, tmp_path):
    """Six steps on end, and three, a checkpoint and three more: the same bits."""
    whole, resumed = spawned(protect=protect), spawned(protect=protect)
    fit(whole, tmp_path, learning_rate=3e-2, weight_decay=0.1, save_strategy="steps", save_steps=3)
    fit(resumed, tmp_path / "again", resume=str(tmp_path / "checkpoint-3"), learning_rate=3e-2, weight_decay=0.1)
    assert_same(banks(whole), banks(resumed))
    assert not torch.equal(logits(whole, mixed()), logits(build(), mixed()))


# ---- several


def two(*names: str, growth: str = "spawn") -> PeftModel:
    """Adapters "strict" and "loose", trained apart, under the same donors of the top layer; `names` are active."""
    model = get_peft_model(build(), spawning(locus=TOP, gate_fpr=0.02, grow=growth), adapter_name="strict")
    trained(model)
    model.add_adapter("loose", spawning(locus=TOP, gate_fpr=0.3))
    model.set_adapter("loose")
    trained(model, seed=7)
    model.base_model.set_adapter(list(names))
    return model


@pytest.mark.slow
def test_the_first_listed_takes_a_row():
    """Where both gates pass, the adapter listed first computes; where one passes, that one; elsewhere the base."""
    strict, loose, base = logits(two("strict"), mixed()), logits(two("loose"), mixed()), logits(build(), mixed())
    model = two("strict", "loose")
    first, second = (any_taken(model, mixed(), name) for name in ("strict", "loose"))
    assert (second & ~first).any()
    assert not (first & ~second).any()
    want = torch.where(first[..., None], strict, torch.where(second[..., None], loose, base))
    torch.testing.assert_close(logits(model, mixed()), want, rtol=1e-5, atol=1e-5)
    assert moved(strict, loose)[first].all()
    torch.testing.assert_close(logits(two("loose", "strict"), mixed()), loose, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_newborn_of_a_deepened_expert():
    """It starts as a clone of the donor in use, and takes its rows from it."""
    model = get_peft_model(build(), PCGrowConfig(locus=TOP), adapter_name="deep")
    trained(model)
    deep = logits(model, mixed())
    model.add_adapter("born", spawning(locus=TOP))
    model.base_model.set_adapter(["deep", "born"])
    torch.testing.assert_close(logits(model, mixed()), deep, rtol=1e-6, atol=1e-6)
    model.base_model.set_adapter("born")
    trained(model, seed=9)
    model.base_model.set_adapter(["deep", "born"])
    passes = any_taken(model, mixed(), "born")
    change = (logits(model, mixed()) - deep).abs().amax(dim=-1)
    assert float(change[~passes].max()) < 1e-5 < 1e-2 < float(change[passes].min())


def test_two_active_train_together():
    """Each newborn gets autograd's gradient of the rows that it takes (fp64)."""
    found = {}
    for settle in ("sweep", "backprop"):
        model = spawned(dtype=torch.float64, settle=settle, gate_fpr=0.02)
        model.add_adapter("loose", spawning(settle=settle, gate_fpr=0.3))
        model.base_model.set_adapter(["default", "loose"])
        found[settle] = gradients(model, language_loss)
    assert len(found["sweep"]) == 8
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")
