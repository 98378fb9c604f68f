"""Adapters follow the way in which transformers runs the experts, whichever it is and whenever it changes."""

import copy
import importlib.util
import types

import pytest
import torch
from peft import get_peft_model
from test_spawn import any_taken
from test_spawn import trained as spawn_trained
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import hub_kernels
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward
from transformers.utils.import_utils import is_kernels_available

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, compress, find_experts
from peft_pcgrow.architectures.experts import expert_stacks
from tiny import (
    LOCUS,
    build,
    domain,
    grown,
    language_loss,
    logits,
    mixed,
    oracle,
    retain,
    spawned,
    tokens,
    train,
    trainable,
)

WAYS = ("eager", "grouped_mm", "batched_mm")
SWITCHES = [(one, other) for one in WAYS for other in WAYS if one != other]
MODELS = ("qwen3_moe", "deepseek_v3", "gpt_oss")
switched = pytest.mark.parametrize(("first", "second"), SWITCHES)
models = pytest.mark.parametrize("name", MODELS)


def switch(model: nn.Module, way: str) -> None:
    """On the base model, as `generate` does too."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_experts_implementation(way)
    assert {site.base.config._experts_implementation for site in find_experts(model).sites} == {way}


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def assert_kept(got: Tensor, want: Tensor, way: str) -> None:
    """Bits, but for batched products on a GPU: that one product of all rows keeps them there too is untried."""
    if way == "batched_mm" and got.is_cuda:
        assert_close(way, got, want, "fp32")
    else:
        assert torch.equal(got, want)


# ---- switched before wrapping, after it, between steps, between training and generation


@pytest.mark.slow
@models
@switched
def test_birth(name, first, second):
    """The base's bits under the implementation in use: chosen before wrapping, and changed back and forth after it."""
    base = build(name, implementation=first)
    want = {}
    for way in (first, second):
        switch(base, way)
        want[way] = logits(base)
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    assert_kept(logits(model), want[second], second)
    for way in (first, second):
        switch(model, way)
        assert_kept(logits(model), want[way], way)
    assert_close("ways", want[first], want[second], "fp32")


@pytest.mark.slow
@models
def test_batched_rows_are_multiplied_together(name):
    """As many rows at once as the base multiplies: another number of them would round differently on a GPU."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                shapes.append(tuple(arg.shape for arg in args))
            return func(*args, **(kwargs or {}))

    base, found = build(name, implementation="batched_mm"), []
    adapted = spawned(name, implementation="batched_mm", locus={1: [1, 4], 2: [0]})
    adapted.add_adapter("deepened", PCGrowConfig(locus={2: [3, 7]}))
    adapted.base_model.set_adapter(["default", "deepened"])
    for model in (base, adapted):
        shapes = []
        with Products():
            logits(model, mixed())
        found.append(shapes)
    assert set(found[0]) == set(found[1])
    # a product of every bank beside each of the base's
    assert len(found[1]) == len(found[0]) + 2 * 3
    assert len(found[0]) > 4


@pytest.mark.slow
@models
@switched
def test_gradients(name, first, second):
    """Autograd's through the base, before and after a switch; one between forward and backward is refused."""
    dtype = torch.float32 if "grouped_mm" in (first, second) else torch.float64
    kind = "fp32" if dtype == torch.float32 else "fp64 gradient"
    base, ids = build(name, dtype, first), tokens()
    reference = build(name, dtype, second)
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS), autocast_adapter_dtype=False)
    want = oracle(reference, language_loss(ids), LOCUS)
    assert all(bool(gradient.any()) for gradient in want.values())
    for way in (first, second):
        switch(model, way)
        assert_all_close(gradients(model, ids), want, kind)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    switch(model, first)
    with pytest.raises(RuntimeError, match="got another attention or experts implementation"):
        loss.backward()


@pytest.mark.slow
@models
def test_between_steps(name):
    """Three steps, each under another implementation, move the bank as plain autograd moves the base's slices."""
    ids, rate = [tokens(seed=seed) for seed in range(3)], 0.5
    base, model = build(name), grown(name=name)
    start = {n: p.detach().clone() for n, p in trainable(model).items()}
    for batch, way in zip(ids, WAYS, strict=True):
        want = oracle(base, language_loss(batch), LOCUS)
        with torch.no_grad():
            for site in find_experts(base).sites:
                for stack, weights in expert_stacks(site.base).items() if site.layer in LOCUS else ():
                    key = f"base_model.model.{site.name}.pcgrow_{stack}.default.weight"
                    weights[LOCUS[site.layer]] -= rate * want[key]
        switch(model, way)
        found = gradients(model, batch)
        with torch.no_grad():
            for key, parameter in trainable(model).items():
                parameter -= rate * found[key]
    for site in find_experts(base).sites:
        for stack, weights in expert_stacks(site.base).items() if site.layer in LOCUS else ():
            key = f"base_model.model.{site.name}.pcgrow_{stack}.default.weight"
            assert not torch.equal(trainable(model)[key], start[key])
            assert_close(key, trainable(model)[key], weights[LOCUS[site.layer]].detach(), "fp32")


@pytest.mark.slow
@models
@switched
def test_between_training_and_generation(name, first, second):
    """Trained under one and used under another: the bits, and the words, of a plain model that holds the bank."""
    model = grown(name=name, implementation=first)
    model.get_base_model().generation_config.eos_token_id = None
    train(model, lr=3e-2)
    switch(model, second)
    plain = build(name, implementation=second)
    for layer in model.base_model.tuner_layers():
        site = next(site for site in find_experts(plain).sites if site.layer == layer.layer_index)
        with torch.no_grad():
            for stack, weights in expert_stacks(site.base).items():
                weights[LOCUS[site.layer]] = layer.bank("default")[stack]
    assert_kept(logits(model), logits(plain), second)
    assert not torch.equal(logits(model), logits(build(name, implementation=second)))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    words = model.generate(input_ids=tokens(2, 8), **settings)
    assert torch.equal(words, plain.generate(input_ids=tokens(2, 8), **settings))


@pytest.mark.slow
@models
@switched
def test_newborns(name, first, second):
    """Born with the base's bits under either; after training under one, other text has the base's bits under both."""
    base, model = build(name, implementation=first), spawned(name, implementation=first)
    want = {}
    for way in (first, second):
        switch(base, way)
        switch(model, way)
        want[way] = logits(base, mixed())
        assert_kept(logits(model, mixed()), want[way], way)
    switch(model, first)
    spawn_trained(model)
    for way in (first, second):
        switch(model, way)
        switch(base, way)
        untouched = ~any_taken(model, mixed()).any(dim=1)
        assert untouched.any()
        for text in mixed()[untouched]:
            assert_kept(logits(model, text[None]), logits(base, text[None]), way)
        assert not torch.equal(logits(model, mixed()), want[way])


# ---- implementations that are not transformers' own


def doubled(module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Twice what the experts put out, one row at a time: nothing else computes this."""
    total = torch.zeros_like(hidden)
    for token, choice in (index < module.num_experts).nonzero().tolist():
        expert = index[token, choice]
        gate, up = linear(hidden[token], module.gate_up_proj[expert]).chunk(2)
        row = linear(silu(gate) * up, module.down_proj[expert])
        total[token] = total[token] + 2 * weight[token, choice] * row
    return total


@pytest.fixture
def registered(monkeypatch):
    """Names under which implementations of the user's are to be found."""

    def register(name: str, function) -> str:
        monkeypatch.setitem(ExpertsInterface._global_mapping, name, function)
        return name

    return register


@pytest.mark.slow
@pytest.mark.parametrize("name", ["twice", "grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_a_registered_implementation_is_followed(registered, name, training):
    """What the user registered computes the base's rows and the banks', also under a name that transformers uses."""
    ids = tokens(2, 8)
    plain = logits(build(), ids)
    registered(name, doubled)
    base = build(implementation=name)
    want = logits(base, ids)
    assert not torch.allclose(want, plain, atol=0.1)
    gradient = oracle(copy.deepcopy(base), language_loss(ids), LOCUS)
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS)).train(training)
    with torch.no_grad():
        assert_close("logits", model(input_ids=ids, use_cache=False).logits, want, "fp32")
    assert_all_close(gradients(model, ids), gradient, "fp32")


def test_tokens_keep_its_bits(registered):
    """Of an implementation that is not taken apart, tokens that meet no located node keep the bits."""
    registered("twice", doubled)
    base, seen = build(implementation="twice"), {}
    reference = copy.deepcopy(base)
    model = get_peft_model(base, PCGrowConfig(locus={0: [2]}))
    for weight in trainable(model).values():
        weight.data.mul_(2)
    for key, module in (("base", reference), ("grown", model)):
        site = find_experts(module).sites[0]
        site.module.register_forward_hook(lambda _, args, output, key=key: seen.update({key: (args[1], output)}))
        logits(module)
    meets = (seen["base"][0] == 2).any(dim=1)
    assert 0 < int(meets.sum()) < len(meets)
    assert torch.equal(seen["base"][1][~meets], seen["grown"][1][~meets])
    assert (seen["base"][1][meets] != seen["grown"][1][meets]).any(dim=1).all()


@pytest.mark.slow
def test_newborns_follow_it(registered):
    """Trained newborns under transformers' own code by another name, against the code that is taken apart."""
    registered("mine", lambda *args: batched_mm_experts_forward(*args))
    model = spawn_trained(spawned(implementation="batched_mm"))
    want = logits(model, mixed())
    gradient = gradients(model, domain())
    switch(model, "mine")
    assert_close("logits", logits(model, mixed()), want, "fp32")
    assert_all_close(gradients(model, domain()), gradient, "fp32")
    assert not any_taken(model, retain()[:1]).all()


def test_packed_experts_have_their_own_way(registered):
    """Packed experts compute alike whatever is set for the others."""
    registered("twice", doubled)
    model = build("qwen3_moe", torch.bfloat16)
    compress.quantize_experts(model, "nf4")
    want = logits(get_peft_model(model, PCGrowConfig(locus=LOCUS)))
    switch(model, "twice")
    assert torch.equal(logits(model), want)


def test_an_unknown_name_is_refused():
    model = grown()
    with pytest.raises(ValueError, match="threefold"):
        model.get_base_model().set_experts_implementation("threefold")
    for site in find_experts(model).sites:
        site.base.config._experts_implementation_internal = "threefold"
    with pytest.raises(KeyError, match="threefold"):
        logits(model)


def loadable(name: str) -> bool:
    """Whether transformers' fused kernel can run here."""
    if not (torch.cuda.is_available() and is_kernels_available()):
        return False
    found = importlib.import_module(f"transformers.integrations.{name}")
    try:
        getattr(found, f"load_{name}_kernel")()
    except ImportError:
        return False
    return True


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["deepgemm", "sonicmoe"])
def test_fused_kernels(way):
    """Against the code that is taken apart, within bf16."""
    if not loadable(way):
        pytest.skip(f"needs CUDA and a {way} kernel that fits it")
    widths = {"hidden_size": 256, "moe_intermediate_size": 128}
    found = {}
    for used in ("grouped_mm", way):
        base = build("qwen3_moe", torch.bfloat16, used, **widths).cuda()
        model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
        found[used] = logits(model), gradients(model, tokens().cuda())
    assert_close("logits", found[way][0], found["grouped_mm"][0], "bf16")
    assert_all_close(found[way][1], found["grouped_mm"][1], "bf16")


# ---- hub kernels


BYPASSED = r"layer \d ran without calling its grown experts: its MoE block was replaced"
REFUSED = r"the block around model.layers.0.mlp.experts \(GptOssMLP\) has its forward replaced"


class Kernel(nn.Module):
    """A MoE block's kernel: stateless, with the forward of the block that it takes the place of."""

    def forward(self, hidden_states):
        return hidden_states, torch.zeros(())


def replace_forward(model: nn.Module, kind: type[nn.Module] | None) -> None:
    """What `kernelize` does to the blocks that it finds a kernel for, and (None) to those that it finds none for."""
    for layer in model.model.layers:
        block = layer.mlp
        block.forward = types.MethodType((kind or type(block)).forward, block)


def test_kernels_that_replace_the_block():
    base = build("gpt_oss")
    want = logits(base)
    replace_forward(base, Kernel)
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(base, PCGrowConfig(locus=LOCUS))
    replace_forward(base, None)
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    assert torch.equal(logits(model), want)
    replace_forward(base, Kernel)
    for training in (True, False):
        with pytest.raises(RuntimeError, match=BYPASSED):
            model.train(training)(input_ids=tokens())
    replace_forward(base, None)
    assert torch.equal(logits(model), want)


@pytest.mark.skipif(
    not is_kernels_available(), reason="needs the package kernels, in a version that transformers takes"
)
def test_use_kernels(monkeypatch):
    """transformers' own `use_kernels`, which looks for kernels again at every change to training or evaluation."""
    import kernels

    class Repository:
        """Where kernels' own LocalLayerRepository would import a built one from a folder."""

        def load(self):
            return Kernel

    # the hub cannot be asked
    monkeypatch.setattr(hub_kernels, "register_kernel_mapping_transformers", lambda: None)
    base = build("gpt_oss")
    want = logits(base)
    base.set_use_kernels(True)  # and there is none
    assert "forward" in base.model.layers[0].mlp.__dict__
    model = get_peft_model(base, PCGrowConfig(locus=LOCUS))
    assert torch.equal(logits(model), want)
    with kernels.use_kernel_mapping({"MegaBlocksMoeMLP": {"cpu": Repository()}}):
        for training in (False, True):
            with pytest.raises(RuntimeError, match=BYPASSED):
                model.train(training)(input_ids=tokens())
        with pytest.raises(ValueError, match=REFUSED):
            get_peft_model(base, PCGrowConfig(locus=LOCUS))
    assert torch.equal(logits(model), want)
