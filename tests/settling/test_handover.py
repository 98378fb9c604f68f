"""What layers hand each other beside the residual stream settles like autograd's, in fp64."""

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model

import architectures
from close import assert_all_close
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.settling.descent import Way
from peft_pcgrow.settling.side_tensors import swap, tensors, written
from peft_pcgrow.settling.tape import Tape
from tiny import build, tokens, trainable


def gradients(base, loss, **config) -> dict[str, torch.Tensor]:
    locus = {site.layer: [1, 4, 6] for site in find_experts(base).sites}
    model = get_peft_model(copy.deepcopy(base), PCGrowConfig(locus=locus, **config)).train()
    loss(model).backward()
    return {name: p.grad for name, p in trainable(model).items()}


def language_loss(model):
    return model(input_ids=tokens(), labels=tokens()).loss


def states_loss(model):
    """Also of hidden states of lower layers."""
    out = model(input_ids=tokens(), labels=tokens(), output_hidden_states=True)
    return out.loss + sum((1 + place) * states.square().mean() for place, states in enumerate(out.hidden_states))


def assert_settles(base, loss=language_loss, **config) -> None:
    want = gradients(base, loss, settle="backprop", **config)
    assert all(bool(gradient.any()) for gradient in want.values())
    assert_all_close(gradients(base, loss, **config), want, "fp64 gradient")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
@pytest.mark.parametrize("kind", ["what it takes", "what it returns", "errors"])
def test_hooks_that_change_a_layer(kind, when):
    """They are code between two layers, run once and differentiated as they are."""

    def register(model):
        for layer in find_experts(model).layers:
            if kind == "what it takes":
                layer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
            elif kind == "what it returns":
                layer.register_forward_hook(lambda module, args, output: output * output.tanh())
            else:
                layer.register_full_backward_hook(
                    lambda module, below, above: tuple(e if e is None else 3 * e for e in below)
                )

    found = {}
    for settle in ("backprop", "sweep"):
        base = build("qwen3_moe", torch.float64)
        if when == "before wrapping":
            register(base)
        locus = {site.layer: [1, 4, 6] for site in find_experts(base).sites}
        model = get_peft_model(base, PCGrowConfig(locus=locus, settle=settle)).train()
        if when == "after wrapping":
            register(model)
        language_loss(model).backward()
        found[settle] = {name: p.grad for name, p in trainable(model).items()}
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_a_stream_cut_between_layers_is_refused():
    base = build("qwen3_moe")
    find_experts(base).layers[1].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    with pytest.raises(TypeError, match=r"Qwen3MoeDecoderLayer 1 does not take the output.*settle='backprop'"):
        gradients(base, language_loss)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_loss_of_hidden_states(name):
    assert_settles(build(name, torch.float64), states_loss)


def test_a_loss_of_hidden_states_and_embeddings():
    assert_settles(build("qwen3_moe", torch.float64), states_loss, modules_to_save=["embed_tokens"])


def test_a_loss_of_hidden_states_needs_the_sweep():
    with pytest.raises(RuntimeError, match="settle='direct' carries the error of the top layer's output only"):
        gradients(build("qwen3_moe"), states_loss, settle="direct")


def test_a_loss_of_lower_hidden_states_alone_is_refused():
    def lower(model):
        return model(input_ids=tokens(), output_hidden_states=True).hidden_states[2].sum()

    with pytest.raises(RuntimeError, match=r"reads hidden states of lower layers.* and not the top layer's output"):
        gradients(build("qwen3_moe"), lower)


@pytest.mark.parametrize("name", ["zaya", "gemma4_text"])
def test_other_ways_follow_the_stream_only(name):
    text = r"takes more from the layers before it than the residual stream.*'sweep'"
    with pytest.raises(ValueError, match=text):
        gradients(architectures.build(name), language_loss, settle="direct", settle_depth=2)
    with pytest.raises(ValueError, match=text):
        measure_errors(architectures.build(name), [tokens()], settle="relax", progress=False)


def test_embeddings_below_layers_that_gather():
    """Embeddings that train below layers which hand each other more get autograd's gradients too."""
    assert_settles(architectures.build("zaya", torch.float64), modules_to_save=["embed_tokens"])


def test_what_trains_beside_the_stream_is_refused():
    """Gemma 4's embeddings for each layer reach the layers past the residual stream."""
    with pytest.raises(TypeError, match=r"takes a tensor that something below or between the layers trains through"):
        gradients(architectures.build("gemma4_text"), language_loss, modules_to_save=["embed_tokens_per_layer"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "zaya", "gemma4_text", "inkling2_text"])
def test_a_forward_leaves_nothing_behind(name):
    """Its tape is gone with its loss, whether or not that was differentiated, without the garbage collector's help."""
    tapes: list[weakref.ref] = []
    base = architectures.build(name)
    model = get_peft_model(base, PCGrowConfig(locus={find_experts(base).sites[-1].layer: [1]})).train()
    stack = model.base_model._stack
    begin = stack._begin_tape

    def noted(x: torch.Tensor, way: Way) -> Tape:
        tape = begin(x, way)
        tapes.append(weakref.ref(tape))
        return tape

    stack._begin_tape = noted
    gc.collect()
    gc.disable()
    try:
        for differentiate in (True, False):
            loss = language_loss(model)
            assert tapes[-1]() is not None
            if differentiate:
                loss.backward()
            del loss
            assert tapes[-1]() is None
    finally:
        gc.enable()


def test_nests():
    one, two, count = torch.ones(1), torch.ones(2), torch.ones(3, dtype=torch.long)
    nest = {"a": (one, [two, None]), "b": count}
    assert [len(tensor) for tensor in tensors(nest)] == [1, 2]
    doubled = swap(nest, lambda tensor: 2 * tensor)
    assert doubled["a"][1][0].tolist() == [2, 2]
    assert doubled["b"] is count
    assert nest["a"][0] is one
    after = {"shared": {"old": one, "new": two}}
    assert [key for _, key in written({"shared": {"old": one}}, after)] == ["new"]


# ---- which experts


def omni():
    """A whole composite: its vision part has experts of its own."""
    from transformers import Dots3NoteForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Dots3NoteForConditionalGeneration(architectures.small_config("dots3_note")).eval()


def test_experts_of_the_text_part():
    """Where other parts have experts too, those of the decoder are meant."""
    model = omni()
    tree = find_experts(model)
    decoder = model.get_decoder()
    assert list(tree.layers) == list(decoder.layers)
    assert all(any(site.base is module for module in decoder.modules()) for site in tree.sites)
    emap = measure_errors(model, [tokens()], progress=False)
    assert emap.layers == tuple(site.layer for site in tree.sites)


def test_two_stacks_and_no_decoder_are_refused():
    """Named, so that one of them can be grown."""
    both = torch.nn.ModuleDict({"thinker": build(), "talker": build()})
    with pytest.raises(ValueError, match=r"talker\.model\.layers.*thinker\.model\.layers.*grow one of these parts"):
        find_experts(both)


# ---- hooks of tensors between layers


def with_states(model):
    return model(input_ids=tokens(), labels=tokens(), output_hidden_states=True)


HOOKED = {
    "outputs": None,
    "what a layer takes": lambda model, hook: (
        find_experts(model)
        .layers[2]
        .register_forward_pre_hook(lambda module, args: args[0].register_hook(hook) and None)
    ),
    "what a layer returns": lambda model, hook: (
        find_experts(model)
        .layers[1]
        .register_forward_hook(lambda module, args, output: output.register_hook(hook) and None)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", HOOKED)
def test_hooks_of_hidden_states(where):
    """They see what they see under backprop, once, and what they make of it goes on down."""
    found = {}
    for settle in ("backprop", "sweep"):
        locus = {layer: [1, 4, 6] for layer in range(3)}
        model = get_peft_model(build("qwen3_moe", torch.float64), PCGrowConfig(locus=locus, settle=settle)).train()
        seen = []

        def normed(error, seen=seen):
            seen.append(error)
            return error / error.norm()

        if HOOKED[where] is not None:
            HOOKED[where](model, normed)
        out = with_states(model)
        for states in out.hidden_states[1:3] if where == "outputs" else ():
            states.register_hook(normed)
        out.loss.backward()
        found[settle] = {str(place): error for place, error in enumerate(seen)}
        assert len(seen) == (2 if where == "outputs" else 1)
        found[settle] |= {name: p.grad for name, p in trainable(model).items()}
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@pytest.mark.parametrize("loss", ["of the output", "of both"])
def test_retained_gradients_of_hidden_states(loss):
    found = {}
    for settle in ("backprop", "sweep"):
        locus = {layer: [1, 4, 6] for layer in range(3)}
        model = get_peft_model(build("qwen3_moe", torch.float64), PCGrowConfig(locus=locus, settle=settle)).train()
        out = with_states(model)
        for states in out.hidden_states[1:]:
            states.retain_grad()
        (out.loss + (out.hidden_states[2].square().mean() if loss == "of both" else 0)).backward()
        found[settle] = {str(place): states.grad for place, states in enumerate(out.hidden_states) if place}
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_a_hook_that_would_see_an_error_in_parts_is_refused():
    def hooked(model):
        out = with_states(model)
        out.hidden_states[2].register_hook(lambda error: error / error.norm())
        return out.loss + out.hidden_states[2].square().mean()

    with pytest.raises(RuntimeError, match=r"has a hook .*and the loss reads it too.*settle='backprop'"):
        gradients(build("qwen3_moe"), hooked)


def test_hooks_of_hidden_states_need_the_sweep():
    def hooked(model):
        out = with_states(model)
        out.hidden_states[2].retain_grad()
        return out.loss

    with pytest.raises(RuntimeError, match=r"or these have hooks or retain their gradients: use settle='sweep'"):
        gradients(build("qwen3_moe"), hooked, settle="direct")


@pytest.mark.parametrize("layer", [0, 1])
def test_what_trains_between_layers_is_refused(layer):
    """Its gradient would be lost."""
    base, steering = build("qwen3_moe"), torch.ones(32, requires_grad=True)
    find_experts(base).layers[layer].register_forward_hook(lambda module, args, output: output * steering)
    with pytest.raises(
        TypeError, match=rf"Layer {layer + 1} takes a tensor that something below or between the layers"
    ):
        gradients(base, language_loss)
