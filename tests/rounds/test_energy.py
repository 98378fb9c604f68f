"""What runs take: against what torch counts while they compute, and over interruptions."""

import json

import pytest
import torch
from short_runs import Interrupt, run

from flops import Flops
from peft_pcgrow.architectures.find import find_experts
from peft_pcgrow.architectures.operations import Shapes
from peft_pcgrow.rounds.energy import Meter, energy_of, joules_of
from peft_pcgrow.rounds.result import GrowthResult
from tiny import build, tokens

PHASES = ["looking", "measuring", "finding the rate", "training"]


@pytest.mark.slow
@pytest.mark.cpu("torch counts the operators of the CPU's paths")
def test_a_run_takes_what_torch_counts(tmp_path):
    model = build()
    model.set_attn_implementation("eager")
    with Flops() as flops:
        result = run(tmp_path, model, max_steps=4)
    # fitting gates, and drawing the first update, are left out
    assert 0.85 * flops.total < result.energy.total < 1.02 * flops.total
    assert sorted(result.energy.operations) == sorted(result.seconds) == sorted(PHASES)
    assert f"{result.energy.total:.3g} operations" in str(result)
    assert json.loads(json.dumps(result.row()))["energy"]["operations"] == result.energy.operations
    read = GrowthResult.read(tmp_path)
    assert (read.energy, read.row(), read.model) == (result.energy, result.row(), None)


@pytest.mark.slow
def test_what_was_interrupted_counts(tmp_path):
    """Of 4 steps with a look after each second one, the third is taken twice."""
    options = {"lr": 0.1, "max_steps": 4}
    whole = run(tmp_path / "whole", **options).energy
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", callbacks=[Interrupt(3)], **options)
    noted = GrowthResult.read(tmp_path / "broken").energy
    broken = run(tmp_path / "broken", **options).energy
    model = build()
    shapes = Shapes.of(model, find_experts(model))
    look, step = shapes.forward(16 * 24, 16 * 24 * 24), broken.operations["training"] - whole.operations["training"]
    assert whole.operations["training"] == pytest.approx(4 * step + 2 * look)
    assert noted.operations["training"] == pytest.approx(3 * step + look)
    assert broken.full - whole.full == pytest.approx(shapes.full(8 * 24, 8 * 24 * 24))
    for phase in ("measuring", "looking"):
        assert broken.operations[phase] == whole.operations[phase]


def test_runs_of_old_have_no_account():
    assert energy_of({"1": {"seconds": {"training": 2.0}}}) is None


def test_a_phase_that_fails_is_noted_and_leaves_no_hook():
    model, saved = build(), []
    shapes = Shapes.of(model, find_experts(model))
    meter = Meter(shapes, save=lambda: saved.append(1))

    def fails():
        with meter.phase("looking", model):
            with torch.no_grad():
                model(tokens(2, 8), use_cache=False)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert meter.spent["operations"] == {"looking": shapes.forward(16, 128)}
    assert meter.spent["seconds"]["looking"] > 0
    assert saved
    assert not model._forward_pre_hooks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_joules_of_a_gpu():
    pytest.importorskip("pynvml")
    device = torch.device("cuda", 0)
    if (before := joules_of({device})) is None:
        pytest.skip("this GPU does not tell")
    x = torch.randn(4096, 4096, device=device)
    for _ in range(200):
        x = (x @ x).tanh()
    torch.cuda.synchronize()
    assert joules_of({device}) > before
