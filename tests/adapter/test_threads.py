"""Several threads use one model, as a server does: each gets the answers that it would get alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig

from peft_pcgrow import measure_errors
from tiny import domain, grown, mixed, retain, spawned, tokens, trainable

THREADS = 4


def perturb(model):
    """Banks that answer otherwise than their donors."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.3 * p.std() * torch.randn(p.shape, generator=generator)
    return model.eval()


MODELS = {
    "deepened": lambda: perturb(grown()),
    "newborns": lambda: perturb(spawned(gate_fpr=0.3)),
    "LoRA behind gates": lambda: perturb(
        spawned(gate_fpr=0.3, lora=LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    ),
    "matrix": lambda: perturb(grown(resolution="matrix", parts=None)),
}


def together(act, given) -> list:
    """`act` on each of `given`, begun by all threads at once."""
    barrier = threading.Barrier(THREADS)

    def run(mine):
        barrier.wait(timeout=60)
        return [act(each) for each in mine]

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(run, given[place::THREADS]) for place in range(THREADS)]
        found = [future.result(timeout=300) for future in futures]
    return [found[place % THREADS][place // THREADS] for place in range(len(given))]


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["equal", "different"])
@pytest.mark.parametrize("kind", MODELS)
def test_generate(kind, shapes):
    model = MODELS[kind]()
    texts = [mixed(seed=seed)[seed % 8 :][:1, : 12 + (seed % 3 if shapes == "different" else 0)] for seed in range(24)]

    def answer(ids):
        return model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None).tolist()

    alone = [answer(ids) for ids in texts]
    assert len({str(each[0][-5:]) for each in alone}) > 4
    assert together(answer, texts) == alone


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settle", ["sweep", "backprop"])
def test_gradients(settle, checkpointing):
    """What a training forward keeps is its own, also when transformers' checkpoints run layers again."""
    model = spawned(gate_fpr=0.3, settle=settle).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [torch.cat([domain(2, seed=seed), retain(2, seed=seed)]) for seed in range(8)]

    def differentiate(ids):
        return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(trainable(model).values()))

    alone = [differentiate(ids) for ids in batches]
    for got, want in zip(together(differentiate, batches), alone, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))


@pytest.mark.slow
def test_serving_while_another_model_is_measured():
    """A stack that measures one model's layers is not in the way of other threads."""
    model, other = perturb(spawned(gate_fpr=0.3)), grown()
    ids = mixed()[:2]
    want = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    emap = measure_errors(other, [tokens()], progress=False)

    def act(measuring):
        if measuring:
            return measure_errors(other, [tokens()], progress=False).mass
        return model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)

    found = together(act, [place % THREADS == 0 for place in range(8)])
    for place, got in enumerate(found):
        assert torch.equal(got, emap.mass if place % THREADS == 0 else want)
