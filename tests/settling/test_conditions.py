"""The backward of a sweep runs layers again: it finds what the forward found, or refuses, and misses no gradient."""

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch.func import functional_call
from torch.nn.utils import parametrize

from close import assert_all_close
from peft_pcgrow import PCGrowConfig, find_experts
from tiny import LOCUS, build, grown, spawned, tokens, trainable


def loss_of(model, ids=None, **inputs):
    ids = tokens() if ids is None else ids
    return model(input_ids=ids, labels=ids, **inputs).loss


def decoder(model, index=1):
    return find_experts(model).layers[index]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in trainable(model).items()}


# ---- what must not change between forward and backward

CHANGES = {
    "an optimizer step": (lambda m: torch.optim.SGD(trainable(m).values(), 0.1).step(), "pcgrow_.*was written to"),
    "a weight of the base": (lambda m: decoder(m).self_attn.q_proj.weight.mul_(2), "q_proj.weight was written to"),
    "the dtype": (lambda m: m.double(), "was written to, moved or cast"),
    "weights swapped": (lambda m: setattr(decoder(m).mlp.gate.weight, "data", torch.ones(8, 32)), "mlp.gate.weight"),
    "evaluation": (lambda m: m.eval(), "was switched between training and evaluation"),
    "a hook": (lambda m: decoder(m).mlp.register_forward_hook(lambda *_: None), "mlp got or lost a hook"),
    "no adapter": (lambda m: m.base_model.disable_adapter_layers(), "has other adapters active"),
    "another adapter": (lambda m: m.set_adapter("other"), "has other adapters active"),
    "attention": (lambda m: m.base_model.model.set_attn_implementation("eager"), "another attention"),
    "a number": (lambda m: setattr(decoder(m).mlp.gate, "top_k", 1), r"mlp.gate.top_k was changed from 3 to 1"),
    "a switch": (lambda m: setattr(decoder(m).mlp.gate, "norm_topk_prob", False), "norm_topk_prob was changed"),
    "a module": (lambda m: setattr(decoder(m), "mlp", copy.deepcopy(decoder(m).mlp)), "modules were replaced"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused(change):
    model = grown().train()
    model.add_adapter("other", PCGrowConfig(locus=LOCUS))
    loss_of(model).backward()
    loss = loss_of(model)
    act, message = CHANGES[change]
    with torch.no_grad():
        act(model)
    before = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    with pytest.raises(RuntimeError, match=f"between forward and backward, .*{message}.*call backward"):
        loss.backward()
    assert all(torch.equal(trainable(model)[name].grad, gradient) for name, gradient in before.items())


def test_another_gate_rate_is_refused():
    model = spawned().train()
    loss = loss_of(model)
    model.set_gate_fpr(0.5)
    with pytest.raises(RuntimeError, match="another gate rate"):
        loss.backward()


def test_what_changes_nothing_is_allowed():
    """Other forwards between: in evaluation, without the adapter, with another one, with more recorded."""
    found = []
    for between in (False, True):
        model = grown(dtype=torch.float64).train()
        model.add_adapter("other", PCGrowConfig(locus=LOCUS))
        loss = loss_of(model)
        if between:
            model.eval()
            model.set_adapter("other")
            with torch.no_grad(), model.disable_adapter():
                loss_of(model, tokens(seed=3))
            model.set_adapter("default")
            model.train()
            model(input_ids=tokens(seed=4), output_router_logits=True, output_hidden_states=True)
            loss_of(model, tokens(seed=5))
        loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(one, two) for one, two in zip(found[0].values(), found[1].values(), strict=True))


def test_other_random_numbers_are_refused():
    """Dropout that is drawn otherwise when a layer runs again would belong to another model."""
    model = grown(dtype=torch.float64).train()
    draws = iter([3, 4, 4, 4])

    def draw(*_) -> None:
        torch.rand(next(draws))

    decoder(model).mlp.register_forward_hook(draw)
    with pytest.raises(RuntimeError, match="drew other random numbers"):
        loss_of(model).backward()


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("kind", ["written", "swapped"])
def test_inputs_that_are_written_to_are_refused(name, kind):
    """The layers are called with them again."""
    model = grown().train()
    inputs = {
        "attention_mask": torch.zeros(4, 1, 16, 16).masked_fill(~torch.ones(16, 16).tril().bool(), -1e30),
        "position_ids": torch.arange(16).expand(4, -1).clone(),
    }
    loss = loss_of(model, **inputs)
    if kind == "written":
        inputs[name].zero_()
    else:
        inputs[name].data = torch.zeros_like(inputs[name])
    with pytest.raises(RuntimeError, match=f"the input {name} was written to, moved or cast in Qwen3MoeDecoderLayer"):
        loss.backward()


def test_what_a_layer_counts_is_no_setting():
    model = grown().train()

    def count(module, *_):
        module.calls = getattr(module, "calls", 0) + 1

    decoder(model).mlp.register_forward_hook(count)
    loss = sum(loss_of(model, tokens(seed=seed)) for seed in range(3))
    loss.backward()
    assert decoder(model).mlp.calls == 6
    assert all(bool(p.grad.any()) for p in trainable(model).values())


# ---- weights that are not where they were


def test_functional_call():
    """Tensors that stand in for the weights during the forward get their gradients."""
    found = {}
    for way in ("backprop", "sweep"):
        model = grown(dtype=torch.float64, settle=way).train()
        generator = torch.Generator().manual_seed(1)
        given = {
            name: (p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).detach().requires_grad_()
            for name, p in trainable(model).items()
        }
        functional_call(model, given, (), {"input_ids": tokens(), "labels": tokens()}).loss.backward()
        found[way] = {name: p.grad for name, p in given.items()}
        assert all(p.grad is None for p in model.parameters())
        assert all(model.get_parameter(name) is not p for name, p in given.items())
    assert all(bool(gradient.any()) for gradient in found["sweep"].values())
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_weights():
    found = {}
    for settle in ("backprop", "sweep"):
        model = grown(dtype=torch.float64, settle=settle).train()
        projection = decoder(model).self_attn.q_proj
        parametrize.register_parametrization(projection, "weight", Doubled())
        projection.parametrizations.weight.original.requires_grad_(True)
        loss_of(model).backward()
        found[settle] = gradients(model)
    assert any("original" in name for name in found["sweep"])
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_weights_that_come_late_are_refused():
    """As FSDP2 does it: each layer's weights are put there in a hook of its own."""
    model = grown().train()
    layer = decoder(model)

    def gather(module, args):
        bank = module.mlp.experts.pcgrow_down_proj["default"]
        bank.weight = torch.nn.Parameter(bank.weight.detach().clone())

    layer.register_forward_pre_hook(gather)
    with pytest.raises(TypeError, match="Qwen3MoeDecoderLayer 1 runs with trainable weights that it did not have when"):
        loss_of(model)


def test_weights_that_nothing_uses_have_no_gradient():
    """As under autograd: an optimizer's weight decay must not move what the loss does not depend on."""
    for settle in ("backprop", "sweep"):
        model = grown(settle=settle).train()
        model.add_adapter("other", PCGrowConfig(locus=LOCUS, settle=settle))
        model.base_model.set_requires_grad("other", True)
        loss_of(model).backward()
        for name, gradient in gradients(model).items():
            assert (gradient is None) == (".other." in name), name


# ---- what arises inside layers


@pytest.mark.slow
@pytest.mark.parametrize("module", ["mlp.gate", "self_attn", "mlp", "input_layernorm"])
def test_a_loss_on_what_hooks_see(module):
    """A z-loss on router logits, features that are distilled: whatever a forward hook of the user's takes."""
    found = {}
    for settle in ("backprop", "sweep"):
        model, seen = grown(dtype=torch.float64, settle=settle).train(), []
        for layer in find_experts(model).layers:
            layer.get_submodule(module).register_forward_hook(lambda m, args, output, into=seen: into.append(output))
        loss = loss_of(model)
        inner = [output if torch.is_tensor(output) else output[0] for output in seen]
        loss = loss + sum((place + 1) * held.square().mean() for place, held in enumerate(inner))
        loss.backward()
        found[settle] = gradients(model)
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")
    control = grown(dtype=torch.float64).train()
    loss_of(control).backward()
    assert not all(torch.equal(found["sweep"][name], gradient) for name, gradient in gradients(control).items())


def test_a_hook_that_changes_a_module_inside():
    found = {}
    for settle in ("backprop", "sweep"):
        model = grown(dtype=torch.float64, settle=settle).train()
        decoder(model).self_attn.o_proj.register_forward_hook(lambda module, args, output: 0.5 * output)
        loss_of(model).backward()
        found[settle] = gradients(model)
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_a_loss_on_the_cache_is_refused():
    model = grown().train()
    out = model(input_ids=tokens(), labels=tokens(), use_cache=True)
    (out.loss + out.past_key_values.layers[1].keys.mean().detach()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"reads the KV cache.*settle='backprop'"):
        (out.loss + out.past_key_values.layers[1].keys.square().mean()).backward()


@pytest.mark.parametrize("late", [False, True])
def test_a_stranger_that_trains_is_refused(late):
    """A trainable tensor that a hook adds is no parameter of the layer, whenever the hook comes."""
    model, steering = grown().train(), torch.zeros(32, requires_grad=True)
    if late:
        loss_of(model).backward()
    decoder(model).self_attn.register_forward_hook(lambda m, args, output: (output[0] + 2 * steering, *output[1:]))
    with pytest.raises(TypeError, match=r"trains through a tensor of shape \(32,\).*settle='backprop'"):
        loss_of(model).backward()


def test_a_stranger_between_layers_trains():
    """On the way from one layer to the next it is autograd's."""
    found = {}
    for settle in ("backprop", "sweep"):
        model, steering = grown(dtype=torch.float64, settle=settle).train(), torch.ones(32, dtype=torch.float64)
        steering.requires_grad_()
        decoder(model, 2).register_forward_hook(lambda m, args, output, v=steering: output + v)
        loss_of(model).backward()
        found[settle] = {**gradients(model), "steering": steering.grad}
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


# ---- what is kept


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_a_kept_loss_keeps_no_hidden_states(keep):
    """Once differentiated, unless the graph is retained."""
    model = get_peft_model(build("qwen3_moe"), PCGrowConfig(locus=LOCUS, modules_to_save=["embed_tokens"])).train()
    held: list[weakref.ref] = []

    def note(module, args, output):
        held.extend(weakref.ref(tensor.untyped_storage()) for tensor in (args[0], output))

    handles = [layer.register_forward_hook(note) for layer in find_experts(model).layers]
    loss = loss_of(model)
    for handle in handles:
        handle.remove()
    loss.backward(retain_graph=keep)
    gc.collect()
    assert any(ref() is not None for ref in held) == keep
    if not keep:
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_an_interrupted_backward_is_begun_anew():
    """Errors that had arrived by then do not count in the next one of the same graph."""
    model = grown(dtype=torch.float64).train()
    out = model(input_ids=tokens(), labels=tokens(), output_hidden_states=True)
    loss = out.loss + sum(states.square().mean() for states in out.hidden_states)
    expected = torch.autograd.grad(loss, list(trainable(model).values()), retain_graph=True)

    def interrupt(*_):
        raise KeyboardInterrupt

    out.hidden_states[2].register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    out.hidden_states[2]._backward_hooks.clear()
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, want) for p, want in zip(trainable(model).values(), expected, strict=True))
