"""What tells one base from another: in every dtype, whoever wraps it, and whatever it shares with others."""

import copy

import pytest
import torch
from peft import get_peft_model

from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.architectures.experts import expert_stacks
from peft_pcgrow.architectures.fingerprint import SAMPLES, describe_base
from peft_pcgrow.architectures.same_base import difference
from tiny import ARCHITECTURES, LOCUS, build, dense, tokens, train


def described(model, nodes=None):
    return describe_base(model, find_experts(model, nodes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loading_dtypes(name):
    """One checkpoint is one base in any dtype; what was rounded to one half precision says nothing of the other."""
    whole = described(build(name))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not difference(whole, described(build(name, dtype)))
        assert difference(whole, described(build(name, dtype, seed=1))).endswith("(stacks)")
    assert not difference(described(build(name, torch.bfloat16)), described(build(name, torch.float16, seed=1)))


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("layer", [0, 2])
def test_bases_that_share_their_routers(stack, layer):
    """One stack of one layer is other than in the other model; nothing else is."""
    model, other = build(), build()
    with torch.no_grad():
        expert_stacks(find_experts(other).sites[layer].base)[stack].mul_(1.01)
    assert difference(described(model), described(other)) == "other experts' weights (stacks)"
    emap = measure_errors(model, [tokens()], progress=False)
    with pytest.raises(ValueError, match=r"measured on another model \(other experts' weights"):
        get_peft_model(other, PCGrowConfig(error_map=emap, budget=0.2))


@pytest.mark.parametrize(("name", "nodes"), [("qwen2_moe", "shared"), ("deepseek_v3", "dense")])
def test_nodes_without_a_router(name, nodes):
    """MLPs that are adopted in place, whose stacks lie in several tensors."""
    model, other = build(name), build(name)
    assert not difference(described(model, nodes), described(other, nodes))
    with torch.no_grad():
        experts = find_experts(other, nodes).sites[0].base
        view = expert_stacks(experts)["gate_up_proj"]
        view.write(torch.tensor([0]), 1.01 * view[torch.tensor([0])])
    assert "stacks" in difference(described(model, nodes), described(other, nodes))
    assert described(dense())["stacks"]


def test_every_expert_is_looked_at():
    model = build()
    for expert in range(8):
        other = copy.deepcopy(model)
        with torch.no_grad():
            expert_stacks(find_experts(other).sites[1].base)["down_proj"][expert] += 0.5
        assert "stacks" in difference(described(model), described(other))
    assert SAMPLES >= 128


def test_adapters_make_no_other_base():
    """Training an adapter leaves the base what it is; merging one does not."""
    model = get_peft_model(build(), PCGrowConfig(locus=LOCUS))
    train(model)
    assert described(model) == described(build())
    model.merge_adapter()
    assert "stacks" in difference(described(model), described(build()))
    model.unmerge_adapter()
    assert described(model) == described(build())


def test_weights_that_are_not_at_hand():
    """On the meta device nothing is known, so nothing is refused."""
    there = described(build().to("meta"))
    assert there["routers"] is None
    assert there["stacks"] is None
    assert not difference(there, described(build()))
    assert difference(there, described(build(num_experts=4)))
