"""What must not change keeps its bits."""

import copy

import pytest
import torch
from peft import get_peft_model
from test_spawn import CASES as SPAWN_CASES
from test_spawn import any_taken, moved
from test_spawn import trained as spawn_trained
from torch import Tensor, nn
from transformers import Olmo2Config, Olmo2ForCausalLM

from close import assert_close
from foreign import longcat_flash
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts, measure_errors
from tiny import (
    ARCHITECTURES,
    COMMON,
    EXPERTS,
    LOCUS,
    build,
    domain,
    logits,
    mixed,
    retain,
    snapshot,
    spawned,
    tokens,
    trainable,
)

CASES = [
    *[(name, torch.float32, implementation) for name in ARCHITECTURES for implementation in ("eager", "grouped_mm")],
    *[("qwen3_moe", dtype, "batched_mm") for dtype in (torch.float32, torch.bfloat16)],
    *[
        (name, torch.bfloat16, implementation)
        for name in ("deepseek_v3", "gpt_oss")
        for implementation in ("eager", "grouped_mm")
    ],
]


def trained(model, locus, ids, **config):
    model = get_peft_model(model, PCGrowConfig(locus=locus, **config)).train()
    optimizer = create_pcgrow_optimizer(model, lr=0.1)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "implementation"), CASES)
def test_tokens_that_meet_no_located_node_keep_their_bits(name, dtype, implementation):
    """At the first grown layer, the experts' output of each token is the base's unless one of its experts is grown."""
    base, ids = build(name, dtype, implementation), tokens(8, 24)
    site = find_experts(base).sites[0]
    reference = copy.deepcopy(base)
    seen = {}

    def look(key):
        def hook(module, args, output):
            seen[key] = args[1], output.detach()

        return hook

    find_experts(reference).sites[0].base.register_forward_hook(look("base"))
    model = trained(base, {site.layer: [2]}, ids)
    find_experts(model).sites[0].module.register_forward_hook(look("grown"))
    with torch.no_grad():
        reference(input_ids=ids)
        model(input_ids=ids)
    index, before = seen["base"]
    after = seen["grown"][1]
    meets = (index == 2).any(dim=1)
    assert meets.any()
    assert not meets.all()
    assert torch.equal(before[~meets], after[~meets])
    assert (before[meets] != after[meets]).any(dim=1).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_untouched_tokens_keep_their_bits(name):
    """With a node of the top layer grown, every token that is not routed there has the base's logits."""
    base, ids = build(name, implementation="grouped_mm"), tokens(8, 24)
    site = find_experts(base).sites[-1]
    assert site.layer == len(base.model.layers) - 1
    routed = []
    handle = site.base.register_forward_pre_hook(lambda module, args: routed.append(args[1]))
    with torch.no_grad():
        before = base(input_ids=ids).logits.flatten(0, 1)
    handle.remove()
    model = trained(base, {site.layer: [5]}, ids)
    with torch.no_grad():
        after = model(input_ids=ids).logits.flatten(0, 1)
    meets = (routed[0] == 5).any(dim=1)
    assert meets.any()
    assert not meets.all()
    assert torch.equal(before[~meets], after[~meets])
    assert (before[meets] != after[meets]).any(dim=1).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_untrained_adapter_changes_nothing(name, implementation):
    base, ids = build(name, implementation=implementation), tokens()
    with torch.no_grad():
        before = base(input_ids=ids).logits
        locus = {site.layer: [0, 3, 7] for site in find_experts(base).sites}
        after = get_peft_model(base, PCGrowConfig(locus=locus)).eval()(input_ids=ids).logits
    assert torch.equal(before, after)


def test_training_writes_no_base_parameter():
    base, ids = build("gpt_oss"), tokens()
    before = snapshot(base)
    model = trained(base, {1: [0, 3], 2: [5]}, ids)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in snapshot(model.get_base_model()).items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_unrouted_located_expert_keeps_its_bits():
    """A located expert that no row reached has no error, and momentum must not move it."""
    base, ids = build("mixtral"), tokens(1, 8)
    routed = set()
    site = find_experts(base).sites[0]
    handle = site.base.register_forward_pre_hook(lambda module, args: routed.update(args[1].unique().tolist()))
    with torch.no_grad():
        base(input_ids=ids)
    handle.remove()
    idle = next(expert for expert in range(8) if expert not in routed)
    busy = next(iter(routed))
    model = trained(base, {site.layer: [busy, idle]}, ids)
    layer = model.base_model.tuner_layers()[0]
    for name, bank in layer.bank("default").items():
        stack = dict(site.base.named_parameters())[name]
        place = layer.grown["default"].index(idle)
        assert torch.equal(bank[place], stack[idle])
        assert not torch.equal(bank[1 - place], stack[busy])


def test_measuring_changes_nothing():
    model = build("qwen2_moe").train()
    before = snapshot(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    measure_errors(model, [tokens()], progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(model).items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.layers.modules())


def first_output(model: nn.Module, ids: Tensor) -> Tensor:
    """What the experts of the first grown layer put out, `[B, S, H]`."""
    found = []
    site = next(site for site in find_experts(model).sites if site.layer == min(LOCUS))
    handle = site.module.register_forward_hook(lambda module, args, output: found.append(output.view(*ids.shape, -1)))
    logits(model, ids)
    handle.remove()
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), SPAWN_CASES)
def test_other_text_keeps_its_bits(name, implementation):
    """After training, a text of which no row is taken has the base's logits, a token before the first taken row the
    base's output at the first grown layer; donors and gates stay.

    Above, tokens that are routed otherwise change how many rows an expert gets, and with it how products round.
    """
    base, model = build(name, implementation=implementation), spawned(name, implementation=implementation)
    before, lowest = logits(base, mixed()), first_output(base, mixed())
    start = snapshot(model)
    after = logits(spawn_trained(model), mixed())
    untouched = ~any_taken(model, mixed()).cummax(dim=1).values
    assert untouched.all(dim=1).any()
    for text in mixed()[untouched.all(dim=1)]:
        assert torch.equal(logits(model, text[None]), logits(base, text[None]))
    assert torch.equal(first_output(model, mixed())[untouched], lowest[untouched])
    assert_close("untouched tokens", after[untouched], before[untouched], "fp32")
    assert moved(after, before)[~untouched].float().mean() > 0.5
    changed = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in start if ".pcgrow_" in name and name.endswith(".weight")}


def olmo2():
    """What its MLPs give goes through a norm that rounds to the dtype which it is given."""
    return Olmo2ForCausalLM(Olmo2Config(**COMMON, intermediate_size=64))


@pytest.mark.parametrize(
    ("name", "nodes"), [("qwen3_moe", None), ("qwen2_moe", "shared"), (olmo2, "dense"), (longcat_flash, None)]
)
def test_other_text_keeps_its_bits_under_autocast(name, nodes):
    """Of a block, and of an expert, also the dtype: what follows may round to it."""
    options = {"nodes": nodes} if nodes else {}
    texts = {"retain": [retain(32, seed=1)], "window": 8, "gradients": False, "progress": False}
    emap = measure_errors(build(name), [domain(32, seed=1)], **texts, **options)
    locus = {layer: [0] if nodes else range(EXPERTS) for layer in LOCUS}
    model = get_peft_model(build(name), PCGrowConfig(error_map=emap, locus=locus, grow="spawn", gate_fpr=0.02)).eval()
    for weight in trainable(model).values():
        weight.data += 0.1
    with torch.autocast("cpu"):
        want, found = logits(build(name), mixed()), logits(model, mixed())
    same = (found == want).flatten(1).all(1)
    untouched = ~passed(model, mixed()).any(1)
    assert untouched.any()
    assert same[untouched].all()
    assert not same.all()


def passed(model: nn.Module, ids: Tensor) -> Tensor:
    """Tokens that the gate of some layer lets pass under autocast, `[B, S]`."""
    found = []
    for layer in model.base_model.tuner_layers():
        layer.register_forward_pre_hook(lambda layer, args: found.append(layer.margin("default", args[0]) > 0))
    with torch.autocast("cpu"):
        logits(model, ids)
    return torch.stack(found).any(0).view(ids.shape)
