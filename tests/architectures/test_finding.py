"""Finding experts leaves a model as it is; blocks that do not follow the contract are adopted once, by a step of its
own."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model
from torch import nn

from foreign import FOREIGN, foreign
from mlp_models import CASES, made
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.architectures.adopted_experts import AdoptedBlock
from peft_pcgrow.architectures.experts import read_experts
from peft_pcgrow.architectures.find import Tree, adopt
from peft_pcgrow.packed.quantize import quantize_experts
from tiny import assert_same, build, dense, logits, snapshot, tokens

MODELS: dict[str, Any] = {
    "qwen3_moe": lambda: (build("qwen3_moe"), None),
    **{name: (lambda name=name: made(name)) for name in CASES},
    **{name: (lambda name=name: (foreign(name), None)) for name in FOREIGN},
}
every_model = pytest.mark.parametrize("name", MODELS)


def structure(model: nn.Module) -> list[Any]:
    """Every module's name, class, identity, children, and whatever else it holds."""
    return [
        (name, type(m), id(m), list(m._modules.items()), {key: id(value) for key, value in m.__dict__.items()})
        for name, m in model.named_modules()
    ]


def shown(tree: Tree) -> list[Any]:
    return [(site.layer, site.name, site.experts, site.newborns, site.router) for site in tree.sites]


@every_model
def test_finding_changes_nothing(name):
    """Names, classes, attributes, tensors and outputs, also of a model that trains; and it draws no random numbers."""
    model, nodes = MODELS[name]()
    before, weights, held = logits(model), snapshot(model), structure(model)
    drawn = torch.get_rng_state()
    trees = [find_experts(model, nodes), find_experts(model.train(), nodes)]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    # `eval` sets an attribute anew
    assert structure(model.eval()) == held
    assert_same(snapshot(model), weights)
    assert torch.equal(logits(model), before)
    assert shown(trees[0]) == shown(trees[1])
    assert (name == "qwen3_moe") == all(site.adoption is None for site in trees[0].sites)


@every_model
def test_adopted_once(name):
    """What a site shows stays: its name, which is a module's then, its experts, and the weights that they have."""
    model, nodes = MODELS[name]()
    before, weights = logits(model), snapshot(model)
    trees = [find_experts(model, nodes) for _ in range(2)]
    read = [read_experts(site.base, [0]) for site in trees[0].sites]
    first, second = adopt(trees[0]), adopt(trees[1])
    for tree in (first, second, adopt(first), find_experts(model, nodes)):
        assert shown(tree) == shown(trees[0])
        assert [site.base for site in tree.sites] == [site.base for site in first.sites]
        assert all(site.adoption is None for site in tree.sites)
        assert all(model.get_submodule(site.name) is site.module is site.base for site in tree.sites)
    for site, wanted in zip(first.sites, read, strict=True):
        assert_same(read_experts(site.base, [0]), wanted)
    # one class mixed in, not one on top of another
    assert all(sum(issubclass(c, AdoptedBlock) for c in type(m).__bases__) <= 1 for m in model.modules())
    called = []
    for site in first.sites:
        site.base.register_forward_hook(lambda *_, layer=site.layer: called.append(layer))
    assert torch.equal(logits(model), before)
    assert called == [site.layer for site in first.sites]
    assert_same(snapshot(model), weights)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe, shared", "dbrx", "jetmoe"])
def test_a_site_reads_what_the_block_holds(name):
    """Also weights that were written since: what stands for the experts keeps no copy."""
    model, nodes = MODELS[name]()
    site = find_experts(model, nodes).sites[-1]
    before = read_experts(site.base, [0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert_same(read_experts(site.base, [0]), {name: 2 * held for name, held in before.items()})


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_who_adopts():
    """What needs adopted blocks adopts them; what refuses has not."""
    model = dense()
    before = kinds(model)
    with pytest.raises(ValueError, match="layer 7"):
        get_peft_model(model, PCGrowConfig(locus={7: [0]}))
    with pytest.raises(ValueError, match="unknown way to settle"):
        measure_errors(model, [tokens()], settle="never", progress=False)
    with pytest.raises(ValueError, match="choose from"):
        quantize_experts(model, "1bit")
    assert kinds(model) == before
    for operation in (
        lambda model: get_peft_model(model, PCGrowConfig(locus={0: [0]})),
        lambda model: measure_errors(model, [tokens()], progress=False),
        lambda model: quantize_experts(model, "2bit"),
    ):
        changed = dense()
        operation(changed)
        assert sum(isinstance(module, AdoptedBlock) for module in changed.modules()) == 3


@pytest.mark.parametrize("differs", [False, True])
def test_a_hooked_block_is_tried_too(differs):
    """Accelerate puts a forward of its own on a block, which calls the module that it was made for."""
    model = dense()
    mlp: Any = model.model.layers[1].mlp
    kind = type(mlp)
    if differs:
        mlp.__class__ = type("Scaled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    add_hook_to_module(mlp, ModelHook())
    before, held = logits(model), structure(model)
    if differs:
        with pytest.raises(ValueError, match=r"mlp of layer 1 \(Scaled\) computes something else than its linear"):
            find_experts(model)
        assert structure(model) == held
        return
    tree = find_experts(model)
    assert structure(model) == held
    called = []
    adopt(tree).sites[1].base.register_forward_hook(lambda *_: called.append(1))
    assert torch.equal(logits(model), before)
    assert called
