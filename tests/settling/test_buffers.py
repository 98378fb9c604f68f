"""Buffers of decoder layers that a forward, a hook or the user writes to: settling finds those of the forward."""

import pytest
import torch
from test_conditions import gradients, loss_of
from torch.func import functional_call

from close import assert_all_close
from peft_pcgrow import find_experts
from tiny import grown, tokens


class Normed(torch.nn.Module):
    """A layer's norm with a batch norm in front, which keeps statistics."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.batch = norm, torch.nn.BatchNorm1d(32, dtype=torch.float64)

    def forward(self, x):
        return self.norm(self.batch(x.mT).mT.contiguous())


def balance(gate, args, output):
    """What balances load without a loss: after each forward, the bias of experts that got many rows is lowered."""
    load = torch.bincount(output[0].reshape(-1, 8).topk(2).indices.flatten(), minlength=8).double()
    gate.e_score_correction_bias += (0.3 * torch.sign(load.mean() - load)).to(gate.e_score_correction_bias.dtype)


def normed(model):
    for layer in find_experts(model).layers:
        layer.post_attention_layernorm = Normed(layer.post_attention_layernorm)


def norm_spectrum(model):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for layer in find_experts(model).layers:
            torch.nn.utils.spectral_norm(layer.self_attn.o_proj)


def balanced(model):
    for layer in find_experts(model).layers[1:]:
        layer.mlp.gate.register_forward_hook(balance)


def others(model) -> dict[str, torch.Tensor]:
    return {name: held.roll(1, -1) for name, held in model.named_buffers() if "e_score" in name}


def replace_biases(model):
    for name, held in others(model).items():
        model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = held


def write_biases(model):
    for name, held in others(model).items():
        model.get_buffer(name).copy_(held)


STATEFUL = {"statistics": normed, "spectral norm": norm_spectrum, "balanced routers": balanced}
BETWEEN = {"written to": write_biases, "replaced": replace_biases, "functional_call": None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*STATEFUL, *BETWEEN])
def test_buffers_are_those_of_the_forward(kind):
    """Run again, a layer has the buffers it began with, and leaves them as the forward did."""
    found, left = {}, {}
    for way in ("backprop", "sweep"):
        model = grown(name="deepseek_v3", dtype=torch.float64, settle=way).train()
        STATEFUL.get(kind, lambda _: None)(model)
        inputs = {"input_ids": tokens(), "labels": tokens()}
        before = [held.clone() for held in model.buffers()]
        if kind == "functional_call":
            loss = functional_call(model, others(model), (), inputs).loss
        else:
            loss = model(**inputs).loss + (loss_of(model, tokens(seed=1)) if kind in STATEFUL else 0)
        if BETWEEN.get(kind) is not None:
            with torch.no_grad():
                BETWEEN[kind](model)
        loss.backward()
        found[way], left[way] = gradients(model), dict(model.named_buffers())
        held = zip(before, left[way].values(), strict=True)
        assert all(torch.equal(one, two) for one, two in held) == (kind == "functional_call")
    assert_all_close(found["sweep"], found["backprop"], "fp64 gradient")
    assert_all_close(left["sweep"], left["backprop"], "fp64")


@pytest.mark.parametrize("when", ["in the forward", "between"])
def test_large_buffers_that_are_written_to_are_refused(when, monkeypatch):
    """No copy is kept of them."""
    monkeypatch.setattr("peft_pcgrow.settling.conditions.SMALL", 4)
    model = grown(name="deepseek_v3").train()
    if when == "in the forward":
        balanced(model)
        with pytest.raises(RuntimeError, match=r"buffer mlp.gate.e_score_correction_bias, of which.*settle='backprop'"):
            loss_of(model)
        return
    loss = loss_of(model)
    write_biases(model)
    with pytest.raises(
        RuntimeError, match=r"mlp.gate.e_score_correction_bias was written to, moved or cast in Deepseek"
    ):
        loss.backward()
