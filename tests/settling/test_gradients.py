"""Settled gradients equal autograd's through the whole model, in fp64, on every proven architecture."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid

from close import assert_all_close, assert_close
from peft_pcgrow import PCGrowConfig, find_experts
from tiny import ARCHITECTURES, PAD, build, language_loss, oracle, tokens


def grown(model, settle="sweep", locus=None, **config):
    locus = locus or {site.layer: [1, 4, 6] for site in find_experts(model).sites}
    return get_peft_model(model, PCGrowConfig(locus=locus, settle=settle, **config)).train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sweep_equals_autograd(name):
    base, ids = build(name, torch.float64), tokens()
    locus = {site.layer: (1, 4, 6) for site in find_experts(base).sites}
    want = oracle(copy.deepcopy(base), language_loss(ids), locus)
    model = grown(base)
    loss = language_loss(ids)(model)
    loss.backward()
    assert all(gradient.abs().sum() > 0 for gradient in want.values())
    assert_all_close(gradients(model), want, "fp64 gradient")


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_sweep_stops_above_untouched_layers(name):
    base, ids = build(name, torch.float64), tokens()
    top = find_experts(base).sites[-1].layer
    want = oracle(copy.deepcopy(base), language_loss(ids), {top: (0,)})
    model = grown(base, locus={top: [0]})
    stored = []
    stack = model.base_model._stack
    settle = stack.settle
    stack.settle = lambda way, runs, *rest: (stored.append(len(runs)), settle(way, runs, *rest))[1]
    language_loss(ids)(model).backward()
    assert_all_close(gradients(model), want, "fp64 gradient")
    assert stored == [len(stack.layers) - top]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_forwards_before_one_backward(name):
    """A DPO-like loss: the state of the first forward must survive the second."""
    base, better, worse = build(name, torch.float64), tokens(seed=1), tokens(seed=2)

    def preference(model):
        scores = [
            -cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            for ids in (better, worse)
        ]
        return -logsigmoid(scores[0] - 0.5 * scores[1])

    locus = {site.layer: (1, 4, 6) for site in find_experts(base).sites}
    want = oracle(copy.deepcopy(base), preference, locus)
    model = grown(base)
    preference(model).backward()
    assert_all_close(gradients(model), want, "fp64 gradient")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    base, ids = build("qwen3_moe", torch.float64), tokens()
    mask = torch.ones_like(ids)
    span = slice(0, 5) if side == "left" else slice(11, 16)
    ids[1:, span], mask[1:, span] = PAD, 0
    labels = ids.masked_fill(mask == 0, -100)

    def loss(model):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    locus = {site.layer: (1, 4, 6) for site in find_experts(base).sites}
    want = oracle(copy.deepcopy(base), loss, locus)
    model = grown(base)
    loss(model).backward()
    assert_all_close(gradients(model), want, "fp64 gradient")


def test_use_cache_does_not_append_twice():
    """`use_cache` is on by default in a forward: a recomputation that saw the cache would be wrong without an error."""
    base, ids = build("qwen3_moe", torch.float64), tokens()
    locus = {site.layer: (1, 4, 6) for site in find_experts(base).sites}
    want = oracle(copy.deepcopy(base), lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss, locus)
    model = grown(base)
    model(input_ids=ids, labels=ids, use_cache=True).loss.backward()
    assert_all_close(gradients(model), want, "fp64 gradient")


def test_dropout_is_drawn_once():
    """The recomputed layer must see the masks of the forward."""
    ids, found = tokens(), {}
    for settle in ("sweep", "backprop"):
        model = grown(build("qwen3_moe", torch.float64, attention_dropout=0.3), settle)
        torch.manual_seed(5)
        language_loss(ids)(model).backward()
        found[settle] = gradients(model)
        # the random stream goes on as if nothing had been recomputed
        found[settle]["next draw"] = torch.rand(4)
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    base, ids = build("olmoe", torch.float64), tokens()
    locus = {site.layer: (1, 4, 6) for site in find_experts(base).sites}
    want = oracle(copy.deepcopy(base), language_loss(ids), locus)
    model = grown(base)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    language_loss(ids)(model).backward()
    assert_all_close(gradients(model), want, "fp64 gradient")
    assert all(layer.gradient_checkpointing for layer in model.base_model._stack.layers)


def test_accumulates_over_backwards():
    base, first, second = build("mixtral", torch.float64), tokens(seed=1), tokens(seed=2)
    locus = {site.layer: (1, 4, 6) for site in find_experts(base).sites}
    want = oracle(copy.deepcopy(base), lambda m: language_loss(first)(m) + 3 * language_loss(second)(m), locus)
    model = grown(base)
    language_loss(first)(model).backward()
    (3 * language_loss(second)(model)).backward()
    assert_all_close(gradients(model), want, "fp64 gradient")


def test_retained_graph_settles_again():
    base, ids = build("qwen3_moe", torch.float64), tokens()
    model = grown(base)
    loss = language_loss(ids)(model)
    loss.backward(retain_graph=True)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    loss.backward()
    assert_all_close(gradients(model), {name: 2 * gradient for name, gradient in once.items()}, "fp64")


def test_embeddings_below_the_layers():
    """With trainable embeddings the sweep goes on to the bottom and hands the error to autograd again."""
    ids, found = tokens(), {}
    for settle in ("sweep", "backprop"):
        model = grown(build("qwen3_moe", torch.float64), settle, modules_to_save=["embed_tokens", "lm_head"])
        language_loss(ids)(model).backward()
        found[settle] = gradients(model)
    assert any("embed_tokens" in name for name in found["sweep"])
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


def test_trainable_modules_inside_layers():
    ids, found = tokens(), {}
    for settle in ("sweep", "backprop"):
        model = grown(build("qwen3_moe", torch.float64), settle, modules_to_save=["input_layernorm", "q_proj"])
        language_loss(ids)(model).backward()
        found[settle] = gradients(model)
    assert any("q_proj" in name for name in found["sweep"])
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_fast_implementations_in_fp32(implementation):
    base, ids = build("gpt_oss", torch.float32, implementation), tokens()
    reference = build("gpt_oss", torch.float64, "eager")
    locus = {site.layer: (1, 4, 6) for site in find_experts(base).sites}
    want = oracle(reference, language_loss(ids), locus)
    model = grown(base)
    language_loss(ids)(model).backward()
    assert_all_close(gradients(model), want, "fp32")


def test_under_autocast():
    ids, found = tokens(), {}
    for settle in ("sweep", "backprop"):
        model = grown(build("qwen3_moe"), settle)
        with torch.autocast("cpu", torch.bfloat16):
            loss = language_loss(ids)(model)
        loss.backward()
        found[settle] = gradients(model)
    assert_all_close(found["sweep"], found["backprop"], "fp32")


def test_gradient_of_inputs_embeds():
    """Errors reach inputs that the user differentiates (prompt search, attribution)."""
    base = build("qwen3_moe", torch.float64)
    model = grown(base)
    soft = torch.randn(4, 8, 32, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(
        copy.deepcopy(base).requires_grad_(False)(inputs_embeds=2 * soft).logits.square().sum(), soft
    )
    (got,) = torch.autograd.grad(model(inputs_embeds=2 * soft).logits.square().sum(), soft)
    assert_close("inputs_embeds", got, want, "fp64 gradient")


def held_bytes(depth: int, settle: str) -> int:
    """Bytes that autograd holds at the end of a forward, beyond parameters."""
    model = grown(build("qwen3_moe", num_hidden_layers=depth), settle)
    own = {p.data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = language_loss(tokens())(model)
    assert loss.requires_grad
    return sum(held.values())


@pytest.mark.slow
def test_only_layer_inputs_are_held():
    """Each further layer holds its input `[B, S, H]` in fp32 and nothing else."""
    growth = (held_bytes(12, "sweep") - held_bytes(4, "sweep")) / 8
    assert growth == 4 * 16 * 32 * 4
    assert (held_bytes(12, "backprop") - held_bytes(4, "backprop")) / 8 > 10 * growth


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settle", ["sweep", "backprop"])
def test_experts_that_no_row_meets_get_zeros(settle, training):
    """Every bank gets a gradient, of zeros where it took no row, as an untouched slice of a stack does."""
    base, ids, met = build("qwen3_moe", torch.float64), tokens(1, 2), {}
    handles = []
    for site in find_experts(base).sites:

        def note(_, args, layer=site.layer):
            met.setdefault(layer, args[1].unique().tolist())

        handles.append(site.base.register_forward_pre_hook(note))
    base(input_ids=ids)
    for handle in handles:
        handle.remove()
    idle = {layer: [min(set(range(8)) - set(chosen))] for layer, chosen in met.items()}
    model = grown(base, settle, idle | {0: met[0][:1]}).train(training)
    language_loss(ids)(model).backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert bool(gradient.any()) == (".layers.0." in name), name
