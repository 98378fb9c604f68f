"""Ctrl-C at any moment leaves the model, and the process, as they were."""

import random
import sys

import pytest
import torch

from peft_pcgrow import measure_errors
from tiny import domain, mixed, retain, spawned, trainable

MOMENTS = 12


def interrupted(act, moment: int | None) -> int:
    """Run `act` and press Ctrl-C at its n-th call of a Python function; how many there were.

    Not within torch's own switches of gradients, nor where something is put back before its code has begun: such gaps
    are Python's.
    """
    calls = 0

    def trace(frame, event, _):
        nonlocal calls
        if "grad_mode" in frame.f_code.co_filename or frame.f_code.co_name in ("__exit__", "__del__", "remove"):
            return
        calls += 1
        if moment is not None and calls >= moment:
            sys.settrace(None)
            raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return calls


def standing(model) -> list:
    """All that hooks and modes are."""
    held = []
    for module in model.modules():
        hooks = [*module._forward_hooks, *module._forward_pre_hooks]
        flags = module.training, getattr(module, "gradient_checkpointing", None), module.__dict__.get("forward")
        held.append((*flags, hooks, [p.requires_grad for p in module._parameters.values() if p is not None]))
    return held


def step(model) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.cat([domain(2, seed=5), retain(2, seed=5)])
    model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in trainable(model).values()]


ACTS = {
    "forward and backward": (lambda: spawned(gate_fpr=0.3).train(), step),
    "with checkpoints": (lambda: checkpointed(spawned(gate_fpr=0.3).train()), step),
    "generate": (
        lambda: spawned(gate_fpr=0.3).train(),
        lambda model: model.generate(input_ids=mixed()[:2], max_new_tokens=2, do_sample=False, eos_token_id=None),
    ),
    "measure": (
        lambda: spawned(gate_fpr=0.3).train(),
        lambda model: measure_errors(model, [domain(4, 8)], retain="self", max_tokens=32, window=2, progress=False),
    ),
}


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
def test_nothing_is_left_behind(name):
    make, act = ACTS[name]
    model = make()
    wanted, before = step(model), standing(model)
    wanted = [gradient.clone() for gradient in wanted]
    act(model)
    calls, stopped = interrupted(lambda: act(model), None), 0
    draw = random.Random(0)
    for moment in sorted(draw.sample(range(1, calls), MOMENTS)):
        try:
            interrupted(lambda: act(model), moment)
        except KeyboardInterrupt:
            stopped += 1
        assert torch.is_grad_enabled(), moment
        assert standing(model) == before, moment
        assert all(torch.equal(got, want) for got, want in zip(step(model), wanted, strict=True)), moment
    # some come where Python ignores them, in callbacks of weak references
    assert stopped > 0.8 * MOMENTS
