"""State is made where its model is, whatever torch.set_default_device says: here "meta", so that what is not has no
numbers and fails."""

from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_pcgrow import ErrorMap, PCGrowConfig, compress, create_pcgrow_optimizer, measure_errors
from tiny import LOCUS, build, contrast, domain, grown, logits, retain, spawned, spawning, tokens

pytestmark = pytest.mark.cpu("its models are where the default device is not")
GROWTHS = {
    "deepen": lambda: PCGrowConfig(locus=LOCUS),
    "by map": lambda: PCGrowConfig(error_map=contrast(), budget=0.1, select="frequency"),
    "at random": lambda: PCGrowConfig(select="random", budget=0.2, settle="direct"),
    "spawn": lambda: spawning(protect=0.5),
    "matrix": lambda: PCGrowConfig(parts={1: {1: ["down_proj"]}, 2: {0: ["gate_up_proj"]}}, resolution="matrix"),
    "packed base": lambda: PCGrowConfig(locus=LOCUS, base_quantization="nf4", settle="direct"),
}


@contextmanager
def on_meta():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def stepped(model, ids):
    """The model after two steps."""
    optimizer = create_pcgrow_optimizer(model, lr=0.02)
    for _ in range(2):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"sketch_dim": 8, "settle": "relax"}, {"settle": "direct"}])
def test_maps(settings, tmp_path):
    texts, other = [domain(16)], [retain(16)]
    want = measure_errors(build(), texts, retain=other, window=8, progress=False, **settings)
    model = build()
    with on_meta():
        found = measure_errors(model, texts, retain=other, window=8, progress=False, **settings)
        found.save(tmp_path)
        loaded = ErrorMap.load(tmp_path)
        for emap in (found, loaded):
            assert torch.equal(emap.mass, want.mass)
            assert torch.equal(emap.separation.threshold, want.separation.threshold)


@pytest.mark.slow
@pytest.mark.parametrize("how", GROWTHS)
def test_adapters(how, tmp_path):
    """Resolved, trained, used, saved and loaded: the same as where nothing was set."""
    ids, base, fresh = tokens(), build(), build()
    want, config = stepped(get_peft_model(build(), GROWTHS[how]()), ids), GROWTHS[how]()
    with on_meta():
        model = stepped(get_peft_model(base, config), ids)
    with on_meta():
        assert torch.equal(logits(model, ids), logits(want, ids))
        model.generate(input_ids=ids[:, :8], max_new_tokens=3, do_sample=False)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(fresh, tmp_path)
        assert torch.equal(logits(loaded, ids), logits(want, ids))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["int8", "nf4", "3bit", "2bit"])
def test_packing(to):
    want, model, ids = build(), build(), tokens()
    compress.quantize_experts(want, to)
    with on_meta():
        compress.quantize_experts(model, to)
        assert torch.equal(logits(model, ids), logits(want, ids))


def test_shrinking():
    model, ids = grown(init_weights=False), tokens()
    with on_meta():
        compress.shrink_adapter(model, bits=4)
        logits(model, ids)


@pytest.mark.slow
def test_plans():
    model, other, texts = build(), build(), [retain()]
    want = compress.plan(other, target=0.5, retain=texts, progress=False)
    with on_meta():
        plan = compress.plan(model, target=0.5, retain=texts, progress=False)
    assert str(plan) == str(want)
    assert plan.forms() == want.forms()


def test_newborns_generate():
    """A gate's state between calls, on the device of the tokens."""
    model, ids = spawned(), domain()[:2]
    want = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with on_meta():
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), want)
