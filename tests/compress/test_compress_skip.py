"""Layers that are taken out: what is left computes, generates, saves, and comes back as it was."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2MoeConfig,
    Cohere2MoeForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import foreign
from peft_pcgrow import compress, find_experts
from peft_pcgrow.compress.skip import drop_layers, layers_in_use, layers_to_skip
from tiny import ARCHITECTURES, COMMON, assert_same, build, logits, snapshot, tokens

# deepseek's first layer is dense, and its config counts those
DROPPED = [("qwen3_moe", [0]), ("olmoe", [1]), ("mixtral", [0, 2]), ("qwen2_moe", [1]), ("deepseek_v3", [1, 3])]
DROPPED += [("gpt_oss", [1]), ("gpt_oss", [0, 3])]


def without(name: str, dropped: list[int]) -> nn.Module:
    """The same by other means: hooks that hand on what entered the layer."""
    model = build(name)
    for layer in dropped:
        found = find_experts(model).layers[layer]
        found.register_forward_hook(
            lambda m, args, kwargs, out: args[0] if args else kwargs["hidden_states"], with_kwargs=True
        )
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dropped"), DROPPED)
def test_what_is_left(name, dropped, tmp_path):
    model = build(name)
    # notes its class and dtype in the config
    model.save_pretrained(tmp_path / "whole")
    before, config, order = snapshot(model), model.config.to_dict(), find_experts(model).layers
    whole = logits(model)
    undo = layers_in_use(model)
    drop_layers(model, dropped)
    assert torch.equal(logits(model), logits(without(name, dropped)))
    assert not torch.equal(logits(model), whole)
    assert model.config.num_hidden_layers == len(order) - len(dropped)
    model.save_pretrained(tmp_path / "less")
    again, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "less", output_loading_info=True)
    assert not any(facts.values()), facts
    again.set_experts_implementation("eager")
    assert torch.equal(logits(again), logits(model))
    undo()
    assert find_experts(model).layers == order
    assert_same(before, snapshot(model))
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dropped"), [("qwen3_moe", [0]), ("gpt_oss", [0]), ("deepseek_v3", [2])])
def test_generates_with_a_cache(name, dropped):
    """Layers are numbered anew, which caches go by."""
    model = build(name)
    undo = layers_in_use(model)
    drop_layers(model, dropped)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompt = tokens(2, 6)
    cached, slow = (model.generate(prompt, use_cache=cache, **settings) for cache in (True, False))
    assert cached.shape == (2, 18)
    assert torch.equal(cached, slow)
    undo()
    whole = build(name)
    assert torch.equal(model.generate(prompt, **settings), whole.generate(prompt, **settings))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trying_leaves_no_trace(name):
    model = build(name)
    before, config, order = snapshot(model), model.config.to_dict(), find_experts(model).layers
    # deepseek's first layer is dense by its number
    assert layers_to_skip(model) == list(range(name == "deepseek_v3", len(order)))
    assert_same(before, snapshot(model))
    assert model.config.to_dict() == config
    assert find_experts(model).layers == order


def test_what_configs_cannot_say():
    """Layer 1 is dense by its number: without layer 0, another one would be."""
    model = build("qwen3_moe", mlp_only_layers=[1])
    before, config, order = snapshot(model), model.config.to_dict(), find_experts(model).layers
    assert layers_to_skip(model) == [2]
    with pytest.raises(ValueError, match=r"layers of Qwen3MoeForCausalLM cannot be skipped: .*differ by their place"):
        drop_layers(model, [0])
    with pytest.raises(ValueError, match="skipping all 3 layers leaves no model"):
        drop_layers(model, [0, 1, 2])
    assert_same(before, snapshot(model))
    assert model.config.to_dict() == config
    assert find_experts(model).layers == order
    assert [layer.self_attn.layer_idx for layer in order] == [0, 1, 2]


def smollm3(**changes) -> nn.Module:
    """Every fourth layer has no rotary embedding, by a list."""
    return SmolLM3ForCausalLM(SmolLM3Config(**{**COMMON, "num_hidden_layers": 5, "intermediate_size": 32, **changes}))


def cohere2_moe(**changes) -> nn.Module:
    """The kind of each layer's MLP is in a list that is checked when the config is saved."""
    settings = {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 5}
    return Cohere2MoeForCausalLM(Cohere2MoeConfig(**{**COMMON, **settings, **changes}))


@pytest.mark.parametrize(
    ("make", "dropped"), [(smollm3, [1]), (smollm3, [0, 3]), (cohere2_moe, [2]), (foreign.dbrx, [1])]
)
def test_configs_of_many_kinds(make, dropped, tmp_path):
    """What is left is saved and read again as the same function."""
    model = build(make)
    # notes its class and dtype in the config
    model.save_pretrained(tmp_path / "whole")
    before, whole = model.config.to_dict(), logits(model)
    undo = layers_in_use(model)
    drop_layers(model, dropped)
    model.save_pretrained(tmp_path / "less")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "less")
    assert torch.equal(logits(again), logits(model))
    undo()
    assert model.config.to_dict() == before
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("make", [foreign.dbrx, foreign.longcat_flash])
def test_trying_leaves_other_counts(make):
    """dbrx counts its layers in a field of another name, LongCat attends twice in each and counts that."""
    model = build(make)
    config, whole = model.config.to_dict(), logits(model)
    layers_to_skip(model)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_compute_by_their_place(dtype):
    """DiffLlama's attention has a constant for each place, with which only the last layer can go; random numbers go on
    as they would have, and a cast by hand makes no difference."""
    model = build(lambda: DiffLlamaForCausalLM(DiffLlamaConfig(**COMMON, intermediate_size=64))).to(dtype)
    whole, state = logits(model), torch.get_rng_state()
    assert layers_to_skip(model) == [2]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="its layers compute by their place"):
        drop_layers(model, [0])
    assert torch.equal(logits(model), whole)


def test_places_by_another_name():
    """GPT-Neo's attention calls its place `layer_id`, and finds its cache by it."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128}
    words = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, **words, attention_types=[[["global"], 4]])).eval()
    drop_layers(model, [0, 1])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached, slow = (model.generate(tokens(2, 6), use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, slow)


def test_what_cannot_be_tried_is_said():
    """A model that is not what its config says: no reader of that can be compared with it."""
    model = build("mixtral")
    model.model.layers[0].self_attn.scaling *= 2
    with pytest.warns(UserWarning, match="or is not what its config says"):
        assert layers_to_skip(model) == [0, 1, 2]


def test_plans_skip_what_can_be_skipped():
    """Layer 3 is dense by its number, so that those below it stay."""
    model = build("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[3])
    found = compress.survey(model, methods=("skip",), retain=[tokens()], progress=False)
    assert torch.isfinite(found.skips).tolist() == [False, False, False, True, True]
    plan = found.plan(0.65)
    assert set(plan.skipped) == {4, 5}
    compress.apply(model, plan, max_loss_rise=99.0, progress=False)
    assert len(find_experts(model).layers) == 4
    with pytest.raises(ValueError, match=r"target=0.3 is out of reach of skip by 'fisher': .* 0.6000 "):
        found.plan(0.3)


def test_skips_come_within_reach():
    """With nothing else to do, as many layers go as must."""
    model = build()
    found = compress.survey(model, methods=("skip",), retain=[tokens()], progress=False)
    for target, left in ((0.7, 2), (0.34, 1)):
        plan = found.plan(target)
        assert len(plan.skipped) == 3 - left
        assert plan.bytes == plan.total * left // 3
        assert plan.predicted == pytest.approx(sum(float(found.skips[layer]) for layer in plan.skipped))
    with pytest.raises(ValueError, match=r"target=0.3 is out of reach of skip by 'fisher': .* 0.3334 "):
        found.plan(0.3)
