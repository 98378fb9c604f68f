"""The loss without its logits: that of all logits at once, in fp64, with its error; nothing is as large as they are."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from close import assert_all_close, assert_close
from mlp_models import made
from peft_pcgrow import PCGrowConfig, measure_errors
from peft_pcgrow.settling import output_head
from peft_pcgrow.settling.output_head import OutputHead
from tiny import LOCUS, VOCABULARY, build, grown, logits, tokens, trainable


class Largest(TorchDispatchMode):
    """The most numbers in memory that a tensor has that is made in it."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


HEADS = {"plain": nn.Linear(8, 40, bias=False), "bias": nn.Linear(8, 40), "nested": nn.Sequential(nn.Linear(8, 40))}


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("name", HEADS)
def test_against_all_logits_at_once(name, rows, monkeypatch):
    monkeypatch.setattr(output_head, "ROWS", rows)
    head = HEADS[name].double().requires_grad_(False)
    hidden, target = torch.randn(3, 9, 8, dtype=torch.float64), torch.randint(40, (3, 9))
    target[0], target[2, 4:] = -7, -7
    want = hidden.clone().requires_grad_()
    wanted = cross_entropy(head(want).flatten(0, 1), target.flatten(), ignore_index=-7, reduction="sum")
    (3 * wanted).backward()
    got = hidden.clone().requires_grad_()
    with Largest() as seen:
        loss = OutputHead(head).loss(got, target, -7)
        (3 * loss).backward()
    assert_close("loss", loss.detach(), wanted.detach(), "fp64")
    assert_close("error", got.grad, want.grad, "fp64")
    assert seen.most == max(hidden.numel(), 40 * max(8, min(rows, 13)))


def test_nothing_to_predict():
    head, hidden = nn.Linear(8, 40), torch.randn(1, 5, 8, requires_grad=True)
    loss = OutputHead(head).loss(hidden, torch.full((1, 5), -100))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("settle", ["sweep", "direct"])
def test_maps_are_the_same(settle, monkeypatch):
    """With logits and without; and then nothing is as large as the logits."""
    monkeypatch.setattr(output_head, "ROWS", 8)
    ids = tokens(8, 32)
    model = build(dtype=torch.float64, vocab_size=1024)
    with Largest() as seen:
        got = measure_errors(model, [ids], settle=settle, gradients=False, progress=False)
    monkeypatch.setattr(OutputHead, "of", lambda model: None)
    want = measure_errors(model, [ids], settle=settle, gradients=False, progress=False)
    assert_close("mass", got.mass, want.mass, "fp64 gradient")
    assert got.loss == pytest.approx(want.loss, rel=1e-12)
    assert seen.most < 2 * 32 * 1024  # batches are cut to the four folds


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "neox"])
def test_maps_where_it_takes_the_logits(name, monkeypatch):
    """Gemma 2 caps them softly; the others do not."""
    model, nodes = made(name, torch.float64)
    head, of = [], OutputHead.of
    monkeypatch.setattr(OutputHead, "of", lambda model: head.append(of(model)) or head[-1])
    got = measure_errors(model, [tokens()], nodes=nodes, gradients=False, progress=False)
    monkeypatch.setattr(OutputHead, "of", lambda model: None)
    want = measure_errors(model, [tokens()], nodes=nodes, gradients=False, progress=False)
    assert_close("mass", got.mass, want.mass, "fp64 gradient")
    assert [h.plain for h in head] == [name != "gemma2"]
    assert not model.get_output_embeddings()._forward_pre_hooks


def found(model, **inputs):
    """Loss, gradients and whether there are logits, of a training step; the loss scaled as a Trainer's is."""
    labels = tokens().clone()
    labels[1, :9] = -100
    out = model.train()(input_ids=tokens(), labels=labels, **inputs)
    out.loss.backward()
    gradients = {name: p.grad for name, p in trainable(model).items()}
    return {"loss": out.loss.detach(), **gradients}, out.logits is not None


INPUTS = {
    "mean": {},
    "items": {"num_items_in_batch": torch.tensor(90)},
    "shifted": {"shift_labels": tokens(seed=3)},
    "router": {"output_router_logits": True},
    "mask": {"attention_mask": torch.ones(4, 16, dtype=torch.long)},
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("settle", ["sweep", "direct", "backprop"])
def test_training_forwards(name, settle):
    """Loss and gradients of transformers' own loss, which rounds to fp32."""
    if (name, settle) == ("router", "direct"):
        pytest.skip("direct carries no error of router logits")
    (want, kept), (got, none) = (
        found(grown(settle=settle, keep_logits=keep), **INPUTS[name]) for keep in (True, False)
    )
    assert_all_close(got, want, "fp32")
    assert kept
    assert not none


def test_logits_are_there_beside_training():
    model = grown(keep_logits=False)
    plain = grown()
    assert torch.equal(logits(model), logits(plain))
    for inputs in ({"labels": tokens()}, {}):
        assert torch.equal(model.eval()(tokens(), **inputs).logits, plain.eval()(tokens(), **inputs).logits)
    assert model.train()(tokens()).logits.shape == (4, 16, VOCABULARY)
    assert copy.deepcopy(model)(tokens(), labels=tokens()).logits is None
    with model.disable_adapter(), torch.no_grad():
        assert model(tokens(), labels=tokens()).logits is not None
    base = model.unload()
    assert "_loss_function" not in vars(base)
    assert not base.lm_head._forward_pre_hooks


def test_another_head():
    """Put in the place of the one that there was: the loss is that of its logits."""
    losses = []
    for keep in (True, False):
        model = grown(keep_logits=keep).train()
        torch.manual_seed(0)
        model.get_base_model().lm_head = nn.Linear(32, VOCABULARY).requires_grad_(False)
        out = model(tokens(), labels=tokens())
        assert out.logits is not None
        losses.append(float(out.loss.detach()))
    assert losses[0] == losses[1] > 1


def own_loss(logits, labels, vocab_size, **_):
    return logits.square().mean()


def with_own_loss():
    base = build()
    base.loss_function = own_loss
    return base


KEPT = {
    "a head that trains": (build, {"modules_to_save": ["lm_head"]}, "its output head trains"),
    "LoRA on the head": (build, {"lora": LoraConfig(r=2, target_modules=["lm_head"])}, "its output head trains"),
    "a loss of its own": (with_own_loss, {}, "it has no output head, or a loss of its own"),
    "soft caps": (
        lambda: made("gemma2")[0],
        {"nodes": "dense", "locus": {1: [0]}},
        "they are not what its output head returns",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_where_logits_are_kept(name, caplog):
    """It is said once, and all is as without the option."""
    make, settings, why = KEPT[name]
    results = []
    with caplog.at_level("INFO", logger="peft_pcgrow"):
        for keep in (True, False):
            torch.manual_seed(0)
            model = get_peft_model(make(), PCGrowConfig(**{"locus": LOCUS, "keep_logits": keep, **settings}))
            found(model)
            model.zero_grad()
            results.append(found(model))
    assert results[1][1]
    assert_all_close(results[1][0], results[0][0], "fp32")
    said = [line.getMessage() for line in caplog.records if "keeps the logits" in line.getMessage()]
    assert said == [f"pcgrow: keeps the logits of {type(model.get_base_model()).__name__} (see keep_logits): {why}"]


def test_nothing_of_the_size_of_logits(monkeypatch):
    """In a whole step, with a head much wider than all else."""
    monkeypatch.setattr(output_head, "ROWS", 8)
    sizes = []
    for keep in (True, False):
        base = build(vocab_size=1024)
        model = get_peft_model(base, PCGrowConfig(locus=LOCUS, keep_logits=keep)).train()
        model(tokens(), labels=tokens()).loss.backward()
        with Largest() as seen:
            model(tokens(), labels=tokens()).loss.backward()
        sizes.append(seen.most)
    assert sizes[0] >= 64 * 1024
    assert sizes[1] <= 32 * 1024  # the head's own weights, transposed
