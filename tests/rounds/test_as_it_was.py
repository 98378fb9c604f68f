"""The caller's base, and random numbers, are as they were: after runs, and after whatever interrupts them."""

import ast
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from short_runs import UNPROTECTED, Interrupt, banks, run, text
from transformers import TrainerCallback

from peft_pcgrow import load_grown
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.locate import decide
from peft_pcgrow.rounds import one_round
from peft_pcgrow.training import learning_rate
from tiny import DOMAIN_WORDS, assert_same, build, snapshot


class InRound(TrainerCallback):
    """Ctrl-C in the first step of a round."""

    def __init__(self, number: int):
        self.left = number

    def on_train_begin(self, args, state, control, **kwargs):
        self.left -= 1

    def on_step_end(self, args, state, control, **kwargs):
        if not self.left:
            raise KeyboardInterrupt


def facts(model) -> dict:
    """All that a run must leave alone."""
    hooks = [
        (name, key, len(held))
        for name, module in model.named_modules()
        for key, held in vars(module).items()
        if key.endswith("_hooks") and isinstance(held, dict)
    ]
    return {
        "hooks": hooks,
        "trains": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "kinds": [type(module) for module in model.modules()],
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "cache": model.config.use_cache,
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "adapters": hasattr(model, "peft_config"),
    }


def base():
    model = build()
    model.lm_head.requires_grad_(False)
    model.config.use_cache = True
    model.train().model.layers[0].eval()
    return model


def draws() -> tuple:
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


def seed() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


@pytest.mark.slow
def test_interrupted_second_round_leaves_the_base(tmp_path):
    model = base()
    before, known = snapshot(model), facts(model)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model, rounds=2, max_steps=2, callbacks=[InRound(2)])
    assert (tmp_path / "rounds/2/training").exists()
    assert_same(before, snapshot(model))
    assert facts(model) == known
    result = run(tmp_path, model, rounds=2, max_steps=2)
    assert [done.kept for done in result.rounds] == [True, True]
    assert not any(p.requires_grad for p in result.model.parameters())


def test_interrupt_before_the_adapter_is_noted(tmp_path, monkeypatch):
    grow_in = one_round.get_peft_model

    def interrupted(*args, **kwargs):
        grow_in(*args, **kwargs)
        raise KeyboardInterrupt

    model = base()
    before, known = snapshot(model), facts(model)
    monkeypatch.setattr(one_round, "get_peft_model", interrupted)
    seed()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model)
    after = draws()
    assert_same(before, snapshot(model))
    assert facts(model) == known
    assert not any(isinstance(module, PCGrowExperts) for module in model.modules())
    seed()
    assert draws() == after


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_settings_of_the_training_are_gone_afterwards(tmp_path, kept):
    model = base()
    known = facts(model)
    seed()
    changes = {"max_steps": 4} if kept else {"max_steps": 1, "lr": 1e-5}
    result = run(tmp_path, model, trainer={"gradient_checkpointing": True}, **changes)
    after = draws()
    seed()
    assert draws() == after
    assert [done.kept for done in result.rounds] == [kept]
    # the only step has a rate that is not zero
    assert result.rounds[0].heldout != result.before["heldout"]
    assert facts(model)["cache"]
    if kept:
        trained = [result.model, load_grown(build(), tmp_path / "adapter")]
        assert not any(p.requires_grad for grown in trained for p in grown.parameters())
        assert result.model.training
        known["trains"] = [False] * len(known["trains"])
    assert facts(result.model.unload() if kept else result.model) == known


@pytest.mark.slow
def test_the_last_stretch_is_looked_at_and_gone_on_from(tmp_path):
    """With LoRA beside, whose start is random, and from the checkpoint of the last step."""
    options = {"max_steps": 3, "config": {**UNPROTECTED, "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}}
    whole = run(tmp_path / "whole", **options)
    assert [step for step, _ in whole.rounds[0].looks] == [2, 3]
    torch.manual_seed(9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", callbacks=[Interrupt(3, saving=True)], **options)
    torch.manual_seed(10)
    result = run(tmp_path / "broken", **options)
    assert result.rounds[0].looks == whole.rounds[0].looks
    assert_same(banks(whole.model), banks(result.model))
    assert result.after == whole.after


@pytest.mark.slow
def test_a_corpus_of_one_batch_has_a_rate(tmp_path):
    assert run(tmp_path, train_on=text(DOMAIN_WORDS, 8, 1), max_steps=1).rounds[0].lr > 0


@pytest.mark.slow
def test_only_what_means_that_nothing_can_grow_ends_a_run(tmp_path, monkeypatch):
    model, find = build(), one_round.find_lr

    def later(message):
        calls = []

        def found(*args):
            calls.append(message)
            if len(calls) == 2:
                raise ValueError(message)
            return find(*args)

        return found

    monkeypatch.setattr(one_round, "find_lr", later("expected a mapping"))
    with pytest.raises(ValueError, match="expected a mapping"):
        run(tmp_path / "one", model, rounds=2, max_steps=2)
    monkeypatch.setattr(one_round, "find_lr", later("no step along the first update lowers the loss of the other"))
    result = run(tmp_path / "two", model, rounds=2, max_steps=2)
    assert result.ended.startswith("nothing more can grow: no step")
    assert list(result.model.peft_config) == ["default"]


def test_what_ends_a_run_is_said_by_those_who_decide_it():
    with pytest.raises(ValueError, match=one_round.NO_MORE[1]):
        learning_rate.best_step(lambda step: step)
    for said, module in zip(one_round.NO_MORE, (decide, learning_rate, learning_rate), strict=True):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        assert any(said in str(getattr(node, "value", "")) for node in ast.walk(tree))
