"""Losses on what is recorded inside layers settle like autograd's through the whole model, in fp64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import architectures
from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, find_experts, measure_errors
from tiny import ARCHITECTURES, PAD, build, oracle, spawned, tokens, trainable

COEFFICIENT = 0.5


def routed(name: str, **changes):
    """With a load-balancing loss of much weight."""
    return build(name, torch.float64, router_aux_loss_coef=COEFFICIENT, **changes)


def padded() -> dict[str, torch.Tensor]:
    ids = tokens()
    mask = torch.ones_like(ids)
    ids[1:, :5], mask[1:, :5] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def balanced(model):
    """As TRL has it: the model adds its own load-balancing loss."""
    output = model(**padded(), output_router_logits=True)
    assert output.aux_loss > 0
    return output.loss


def z_loss(model):
    """As users write it, of each layer by another weight."""
    output = model(input_ids=tokens(), labels=tokens(), output_router_logits=True)
    squares = [logits.logsumexp(dim=-1).square().mean() for logits in output.router_logits]
    return output.loss + sum(0.1 * (place + 1) * square for place, square in enumerate(squares))


def attended(model):
    output = model(input_ids=tokens(), labels=tokens(), output_attentions=True)
    return output.loss + sum(weights.square().sum() for weights in output.attentions)


def everywhere(base) -> dict[int, list[int]]:
    return {site.layer: [1, 4, 6] for site in find_experts(base).sites}


def gradients(base, loss, **config) -> dict[str, torch.Tensor]:
    model = get_peft_model(copy.deepcopy(base), PCGrowConfig(**{"locus": everywhere(base), **config})).train()
    loss(model).backward()
    return {name: p.grad for name, p in trainable(model).items()}


def assert_settles(base, loss, kind="fp64 gradient", **config) -> None:
    want = gradients(base, loss, settle="backprop", **config)
    assert all(bool(gradient.any()) for gradient in want.values())
    assert_all_close(gradients(base, loss, **config), want, kind)


# routers of these take part in no loss of the model's own
BALANCED = [name for name in ARCHITECTURES if name != "deepseek_v3"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("name", BALANCED)
def test_the_load_balancing_loss(name, how):
    """Also against the untouched model, whose loss it moves."""
    base = routed(name, output_router_logits=how == "config")
    loss = balanced if how == "argument" else lambda model: model(**padded()).loss
    want = oracle(copy.deepcopy(base), loss, everywhere(base))
    without = oracle(copy.deepcopy(base), lambda m: m(**padded(), output_router_logits=False).loss, everywhere(base))
    assert not all(torch.allclose(want[key], without[key], rtol=1e-4) for key in want)
    assert_all_close(gradients(base, loss), want, "fp64 gradient")


@pytest.mark.slow
@pytest.mark.parametrize("loss", [z_loss, attended])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_of_the_users_own(name, loss):
    base = build(name, torch.float64)
    base.set_attn_implementation("eager")  # the others give no attention weights
    assert_all_close(gradients(base, loss), oracle(copy.deepcopy(base), loss, everywhere(base)), "fp64 gradient")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zaya", "jetmoe", "gemma4_text"])
def test_routers_that_record_in_other_ways(name):
    """Beside a state that layers hand each other, twice in a layer, with a router of their own."""
    # transformers 5.23's JetMoe sums what comes back to its routers in fp32
    kind = "fp64 across batches" if name == "jetmoe" else "fp64 gradient"
    assert_settles(architectures.build(name, torch.float64), z_loss, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "modules", [["embed_tokens", "lm_head"], ["gate"], ["input_layernorm", "q_proj"], ["norm", "embed_tokens"]]
)
def test_what_trains_beside_the_banks(modules):
    """The loss reaches routers, what is below them in their layers, and what is below all layers."""
    assert_settles(routed("qwen3_moe"), balanced, modules_to_save=modules)


def test_lora_beside():
    base = routed("qwen3_moe")
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    base = inject_adapter_in_model(lora, base)

    def both(**config):
        model = get_peft_model(copy.deepcopy(base), PCGrowConfig(locus=everywhere(base), **config)).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or parameter.requires_grad)
        balanced(model).backward()
        return {name: p.grad for name, p in trainable(model).items()}

    want = both(settle="backprop")
    assert any("lora_A" in name and bool(gradient.any()) for name, gradient in want.items())
    assert_all_close(both(), want, "fp64 gradient")


def test_newborns():
    found = {}
    for settle in ("sweep", "backprop"):
        model = spawned(dtype=torch.float64, settle=settle).train()
        balanced(model).backward()
        found[settle] = {name: p.grad for name, p in trainable(model).items()}
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["output_hidden_states", "output_router_logits"])
def test_recorded_before_it_was_grown(first):
    """transformers' hooks are then older than ours; states of the lowest layer's input are trained through too."""
    base = routed("qwen3_moe")
    base(input_ids=tokens(), **{first: True})

    def every(model):
        output = model(input_ids=tokens(), labels=tokens(), output_router_logits=True, output_hidden_states=True)
        return output.loss + sum(state.square().mean() for state in output.hidden_states)

    assert_settles(base, every, modules_to_save=["embed_tokens"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    base = routed("olmoe")
    want = oracle(copy.deepcopy(base), balanced, everywhere(base))
    model = get_peft_model(base, PCGrowConfig(locus=everywhere(base))).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    balanced(model).backward()
    assert_all_close({name: p.grad for name, p in trainable(model).items()}, want, "fp64 gradient")


@pytest.mark.slow
def test_two_forwards_accumulation_and_a_kept_graph():
    base = routed("mixtral")

    def twice(model):
        return balanced(model) * z_loss(model)

    want = oracle(copy.deepcopy(base), lambda model: 2 * twice(model) + z_loss(model), everywhere(base))
    model = get_peft_model(base, PCGrowConfig(locus=everywhere(base))).train()
    loss = twice(model)
    loss.backward(retain_graph=True)
    loss.backward()
    z_loss(model).backward()
    assert_all_close({name: p.grad for name, p in trainable(model).items()}, want, "fp64 gradient")


def test_one_grown_layer_under_many():
    """Layers below it run once and what they record takes no part; what those above record does."""
    base = routed("qwen3_moe")
    locus = {1: (1, 4)}
    want = oracle(copy.deepcopy(base), balanced, locus)
    assert_all_close(gradients(base, balanced, locus={1: [1, 4]}), want, "fp64 gradient")


def test_the_approximate_way_refuses_it():
    with pytest.raises(RuntimeError, match=r"settle='direct' carries.*router_aux_loss_coef=0.0.*'sweep'"):
        gradients(routed("qwen3_moe"), balanced, settle="direct")


def test_router_logits_alone_are_refused():
    def alone(model):
        return model(**padded(), output_router_logits=True).aux_loss

    with pytest.raises(RuntimeError, match=r"router logits, and not the top layer's output: add it to"):
        gradients(routed("qwen3_moe"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "direct"])
def test_a_map_is_of_the_language_loss(settle):
    """Whatever the model adds to it in training."""
    maps = [
        measure_errors(
            routed("qwen3_moe", output_router_logits=adds),
            [tokens(seed=s) for s in range(4)],
            settle=settle,
            progress=False,
        )
        for adds in (False, True)
    ]
    assert maps[0].loss == maps[1].loss
    assert_close("mass", maps[1].mass, maps[0].mass, "fp64")


def test_a_step_inside_a_call_that_records():
    """A layer that is run again records nothing into a call that is under way."""
    model = get_peft_model(routed("qwen3_moe"), PCGrowConfig(locus=everywhere(routed("qwen3_moe")))).train()
    inner = balanced(model)
    other = build("olmoe")
    other.model.norm.register_forward_hook(lambda *_: inner.backward())
    assert len(other(input_ids=tokens(), output_router_logits=True).router_logits) == 3
