"""Layers that are taken out: what is left computes, generates, saves, and comes back as it was."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peft_pcgrow import compress, find_experts
from peft_pcgrow.compress.skip import can_skip, drop_layers, layers_in_use
from tiny import ARCHITECTURES, assert_same, build, logits, snapshot, tokens

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
    assert can_skip(model)
    assert_same(before, snapshot(model))
    assert model.config.to_dict() == config
    assert find_experts(model).layers == order


def test_what_configs_cannot_say():
    """Layer 1 is dense by its number: without layer 0, another one would be."""
    model = build("qwen3_moe", mlp_only_layers=[1])
    before, config, order = snapshot(model), model.config.to_dict(), find_experts(model).layers
    assert not can_skip(model)
    with pytest.raises(ValueError, match=r"layers of Qwen3MoeForCausalLM cannot be skipped: .*differ by their place"):
        drop_layers(model, [0])
    with pytest.raises(ValueError, match="skipping all 3 layers leaves no model"):
        drop_layers(model, [0, 1, 2])
    assert_same(before, snapshot(model))
    assert model.config.to_dict() == config
    assert find_experts(model).layers == order
    assert [layer.self_attn.layer_idx for layer in order] == [0, 1, 2]


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
