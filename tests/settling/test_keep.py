"""Activations of top layers kept from the forward: the same gradients, from fewer runs of layers."""

import logging
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model
from torch import nn

from close import assert_all_close
from peft_pcgrow import PCGrowConfig, find_experts
from peft_pcgrow.settling.descent import Way
from peft_pcgrow.settling.layer_run import LayerRun
from tiny import LOCUS, backward, build, grown, tokens, trainable

LAYERS = 5


def deep(keep: int, dtype: torch.dtype = torch.float64, dropout: float = 0.0, settle: str = "sweep") -> nn.Module:
    base = build(dtype=dtype, num_hidden_layers=LAYERS, attention_dropout=dropout)
    config = PCGrowConfig(locus={1: [1, 4], 3: [0, 3, 7]}, settle=settle, keep_activations=keep)
    return get_peft_model(base, config).train()


def again(monkeypatch) -> list[int]:
    """Layers that run again."""
    found, run_again = [], LayerRun.again
    monkeypatch.setattr(LayerRun, "again", lambda run, *given: (found.append(run.index), run_again(run, *given))[1])
    return found


def held_bytes(model: nn.Module, run) -> int:
    """Bytes that autograd saves while something runs, beyond parameters."""
    own, held = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = run()
    assert kept_alive is not None
    return sum(held.values())


@pytest.mark.parametrize(("keep", "runs"), [(0, [4, 3, 2, 1]), (2, [2, 1]), (LAYERS, []), (10**6, [])])
def test_kept_layers_do_not_run_again(keep, runs, monkeypatch):
    """Layers of the locus and above run again in the backward, but those that are kept; gradients are autograd's."""
    want = backward(deep(0, settle="backprop"))
    model, found = deep(keep), again(monkeypatch)
    calls = [0] * LAYERS
    for index, layer in enumerate(find_experts(model).layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    assert_all_close(backward(model), want, "fp64 gradient")
    assert found == runs
    assert calls == [1 + (index in runs) for index in range(LAYERS)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["banks", "embeddings"])
def test_equals_the_sweep(name, more):
    def settled(keep: int):
        return backward(grown(name=name, locus=LOCUS, keep_activations=keep, **more, dtype=torch.float64))

    want = settled(0)
    for keep in (1, 2, 9):
        assert_all_close(settled(keep), want, "fp64 gradient")


def test_more_kept_more_held():
    """Memory that autograd holds after the forward grows by what layers keep, and goes with the backward."""
    sizes = []
    for keep in range(4):
        model = deep(keep)
        model(input_ids=tokens(), labels=tokens())  # says what it keeps, once
        sizes.append(held_bytes(model, lambda model=model: model(input_ids=tokens(), labels=tokens()).loss))
    steps = [b - a for a, b in pairwise(sizes)]
    assert min(steps) > 8 * tokens().numel() * 32 * 8


def test_graphs_go_one_by_one(monkeypatch):
    """In the backward each kept graph is freed before the layer below is reached."""
    model, left = deep(LAYERS), []
    stack = model.base_model._stack
    settle = stack.settle

    def watched(tape, runs, *rest):
        for run, _ in runs:
            run.kept[1][0].register_hook(lambda _: left.append(sum(held.kept is not None for held, _ in runs)))
        return settle(tape, runs, *rest)

    monkeypatch.setattr(stack, "settle", watched)
    backward(model)
    assert left == [4, 3, 2, 1]


def test_dropout_is_drawn_once():
    found = {}
    for keep in (0, 2, LAYERS):
        model = deep(keep, dropout=0.3)
        torch.manual_seed(5)
        found[keep] = backward(model)
        found[keep]["next draw"] = torch.rand(4)
    for keep in (2, LAYERS):
        assert_all_close(found[keep], found[0], "fp64 gradient")


def test_under_autocast():
    found = {}
    for keep in (0, 2):
        model = deep(keep, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        found[keep] = {name: p.grad for name, p in trainable(model).items()}
    assert_all_close(found[2], found[0], "fp32")


def test_retained_graph_and_router_losses():
    """A graph that is retained settles again, and losses on what is recorded inside layers reach kept ones."""
    found = []
    for keep in (0, 2, LAYERS):
        model = deep(keep)
        loss = model(input_ids=tokens(), labels=tokens(), output_router_logits=True).loss
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({name: p.grad for name, p in trainable(model).items()})
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    for got in found[1:]:
        assert_all_close(got, found[0], "fp64 gradient")


def test_what_cannot_be_kept_runs_again(monkeypatch):
    """A layer with a forward hook of the user's inside, and all layers under checkpointing."""
    want = backward(deep(0))
    model, found = deep(3), again(monkeypatch)
    layers = find_experts(model).layers
    handle = layers[3].mlp.register_forward_hook(lambda *_: None)
    assert_all_close(backward(model), want, "fp64 gradient")
    assert found == [3, 1]
    handle.remove()
    found.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_all_close(backward(model), want, "fp64 gradient")
    assert set(found) == {1, 2, 3, 4}


def test_a_kept_cache_is_out_of_reach():
    """It is full, and a loss that reads it is refused, as without keeping."""
    caches = []
    for keep in (0, 2):
        output = deep(keep)(input_ids=tokens(), labels=tokens(), use_cache=True)
        caches.append([entry.keys.detach() for entry in output.past_key_values.layers])
        with pytest.raises(RuntimeError, match="this loss reads the KV cache"):
            (output.loss + output.past_key_values.layers[4].keys.sum()).backward()
    for one, other in zip(*caches, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_said_once(caplog):
    model = deep(2)
    with caplog.at_level(logging.INFO, "peft_pcgrow"):
        backward(model)
        backward(model)
    (said,) = [text for text in caplog.messages if "activations" in text]
    assert said.startswith("pcgrow: keeps activations of layers 3-4: 0.00")
    assert said.endswith(" GiB")


@pytest.mark.parametrize("keep", [-1, 1.5, True, "all", None])
def test_it_is_a_number_of_layers(keep):
    with pytest.raises(ValueError, match="keep_activations must be a whole number"):
        PCGrowConfig(locus=LOCUS, keep_activations=keep)
    with pytest.raises(ValueError, match="keep_activations must be a whole number of layers, 0 or more; got"):
        Way(keep=keep)


def test_it_is_of_the_sweep():
    for settle in ("direct", "backprop"):
        with pytest.raises(ValueError, match=r"keep_activations=.* is of settle='sweep'"):
            PCGrowConfig(locus=LOCUS, settle=settle, keep_activations=1)
    with pytest.raises(ValueError, match="keep_activations=1 is of settle='sweep', got settle='relax'"):
        Way("relax", keep=1)
