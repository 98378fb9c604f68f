"""Error maps during training: where they arrive, and that nothing else changes."""

import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_trainer import LOCUS, fit, grow, logged, rows, sft
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from peft_pcgrow import ErrorMap, ErrorMapCallback, PCGrowConfig, measure_errors
from peft_pcgrow.maps.error_map import SUMS
from tiny import assert_same, build, snapshot, tokens

TEXTS = [tokens(2, 12, seed=30), tokens(2, 12, seed=31)]


def watch(batches=TEXTS, every=2, **options) -> ErrorMapCallback:
    """Never skips: tiny models train faster than clocks tell."""
    return ErrorMapCallback(batches, every, **{"max_share": 1.0, **options})


def assert_equal(one: ErrorMap, two: ErrorMap) -> None:
    for name in SUMS:
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert (one.loss, one.labels, one.tokens) == (two.loss, two.labels, two.tokens)


def expect(model: nn.Module) -> ErrorMap:
    return measure_errors(model, TEXTS, gradients=False, progress=False)


def measured(log: list[dict]) -> list[dict]:
    return [entry for entry in log if "pcgrow/loss" in entry]


class Recorder(TrainerCallback):
    """What a reporter is handed, and at which step; closed for good when training ends."""

    def __init__(self):
        self.log, self.closed = [], False

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert not self.closed
        self.log.append({**logs, "step": state.global_step})

    def on_train_end(self, args, state, control, **kwargs):
        self.closed = True


# ---- nothing else changes

CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CASES = {
    "grown": (grow, {}),
    "grown, backprop, checkpointing": (lambda **changes: grow("backprop", **changes), CHECKPOINTING),
    "plain": (build, {}),
    "plain, checkpointing, bf16": (build, {**CHECKPOINTING, "bf16": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_keeps_its_bits(case, tmp_path):
    """With dropout, accumulation and a shuffling DataLoader: the losses and weights of training without it."""
    make, settings = CASES[case]
    without = fit(make(attention_dropout=0.3), tmp_path, **settings)
    loader = DataLoader(torch.cat(TEXTS), batch_size=2, shuffle=True)
    model = make(attention_dropout=0.3)
    callback = watch(loader, gradients=True)
    observed = fit(model, tmp_path, callbacks=[callback], **settings)
    assert_same(snapshot(without.model), snapshot(observed.model))
    for what in ("loss", "grad_norm", "learning_rate"):
        assert torch.equal(logged(without, what), logged(observed, what))
    assert [step for step, _ in callback.maps] == [0, 2, 4, 6]
    assert all(emap.gradient for _, emap in callback.maps)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grown", "plain"])
def test_maps_of_the_untouched_and_the_trained_model(case, tmp_path):
    make, _ = CASES[case]
    callback = watch(every=4)
    untouched = expect(make())
    trainer = fit(make(), tmp_path, callbacks=[callback])
    assert [step for step, _ in callback.maps] == [0, 4, 6]
    assert_equal(callback.maps[0][1], untouched)
    trained = expect(trainer.model)
    assert callback.map is callback.maps[-1][1]
    assert_equal(callback.map, trained)
    assert not torch.equal(trained.mass, untouched.mass)


def test_state_is_put_back():
    """Between two backward passes: modes, flags, gradients and all random states are as they were."""
    model = grow(attention_dropout=0.3).train()
    first = model.get_base_model().model.layers[0]
    first.eval()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    assert set(flags[1]) == {True, False}

    def drawn():
        torch.rand(1), np.random.rand(), random.random()
        return iter(TEXTS)

    callback, caches = watch(drawn), model.config.use_cache
    args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
    handler = CallbackHandler([DefaultFlowCallback(), callback], model, None, None, None)
    state, control = TrainerState(max_steps=4, is_world_process_zero=False), TrainerControl()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    handler.on_train_begin(args, state, control)
    handler.on_step_begin(args, state, control)
    assert [step for step, _ in callback.maps] == [0]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert flags == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert_same(before, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert model.config.use_cache == caches


@pytest.mark.slow
def test_sft(tmp_path):
    """TRL's SFTTrainer, under gradient checkpointing."""
    trl = pytest.importorskip("trl")
    found, callback, recorder = [], watch(), Recorder()
    for callbacks in (None, [callback, recorder]):
        config = PCGrowConfig(locus=LOCUS, settle="backprop")
        trainer = sft(trl, tmp_path, config, callbacks, **CHECKPOINTING)
        trainer.train()
        found.append(trainer)
    assert_same(snapshot(found[0].model), snapshot(found[1].model))
    # TRL averages metrics of its own between two logs: those too
    for what in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert len(logged(found[0], what)) == 4
        assert torch.equal(logged(found[0], what), logged(found[1], what)), what
    assert [entry["step"] for entry in measured(recorder.log)] == [0, 2, 4]
    assert_equal(callback.map, expect(found[1].model))


# ---- where the numbers arrive


@pytest.mark.slow
def test_reporters_and_history(tmp_path):
    """A reporter before the callback and one after it get what the log history has, at the step of the map."""
    before, after, callback = Recorder(), Recorder(), watch(every=4)
    trainer = fit(grow(), tmp_path, callbacks=[before, callback, after], logging_steps=3)
    history = measured(trainer.state.log_history)
    assert [entry["step"] for entry in history] == [0, 4, 6]
    assert history == measured(before.log) == measured(after.log)
    for entry, (step, emap) in zip(history, callback.maps, strict=True):
        assert entry["epoch"] == step / 6
        assert entry["pcgrow/loss"] == emap.loss / emap.labels
        for row, layer in enumerate(emap.layers):
            share = emap.mass[row].sum() / emap.mass.sum()
            assert entry[f"pcgrow/layer_{layer}_share"] == pytest.approx(float(share), rel=1e-12)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6]
    assert before.closed


@pytest.mark.slow
def test_added_later(tmp_path, capsys):
    """trainer.add_callback puts it behind all reporters; the last map still comes before they close."""
    reporter, callback = Recorder(), watch()
    trainer = fit(grow(), tmp_path, callbacks=[reporter], max_steps=1)
    reporter.log, reporter.closed = [], False
    capsys.readouterr()
    trainer.add_callback(callback)
    assert any(isinstance(other, PrinterCallback) for other in trainer.callback_handler.callbacks)
    trainer.train()
    assert [entry["step"] for entry in measured(reporter.log)] == [0, 1]
    assert capsys.readouterr().out.count("pcgrow/layer_0_share") == 2


class Writer:
    """Stands for TensorBoard's SummaryWriter."""

    def __init__(self):
        self.scalars, self.closed = [], False

    def add_scalar(self, name, value, step):
        assert not self.closed
        self.scalars.append((name, value, step))

    def add_text(self, *args):
        pass

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.mark.slow
def test_transformers_own_reporter(tmp_path):
    """TensorBoardCallback, in the place that the Trainer gives it, writes each map's numbers at its step."""
    reporter, writer, callback = TensorBoardCallback.__new__(TensorBoardCallback), Writer(), watch()
    reporter.tb_writer, reporter.logging_dir, reporter._SummaryWriter = writer, str(tmp_path), None
    fit(grow(), tmp_path, callbacks=[reporter, callback])
    assert writer.closed
    for row, layer in enumerate(callback.map.layers):
        shares = [(step, float(emap.mass[row].sum() / emap.mass.sum())) for step, emap in callback.maps]
        name = f"train/pcgrow/layer_{layer}_share"
        written = [(step, value) for label, value, step in writer.scalars if label == name]
        assert written == [(step, pytest.approx(share, rel=1e-12)) for step, share in shares]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = watch()
    fit(grow(), tmp_path, callbacks=[callback], report_to="tensorboard")
    (events,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    scalars = EventAccumulator(str(events)).Reload().Scalars("train/pcgrow/loss")
    assert [event.step for event in scalars] == [step for step, _ in callback.maps]


@pytest.mark.slow
def test_said_twice(tmp_path, caplog):
    """What one map costs when there is one, and what all have cost at the end."""
    with caplog.at_level(logging.INFO, logger="peft_pcgrow"):
        fit(build(), tmp_path, callbacks=[watch()])
    first, last = [record.message for record in caplog.records if "error map" in record.message]
    assert first.startswith("pcgrow: an error map of 48 tokens takes ")
    assert last.startswith("pcgrow: 4 error maps took ")


# ---- when


class Clock(TrainerCallback):
    """Ten seconds for each training step and two for each map."""

    now = 0.0

    def on_step_begin(self, *args, **kwargs):
        self.now += 10

    def batches(self):
        self.now += 2
        yield from TEXTS


@pytest.mark.slow
def test_stretched_interval(tmp_path, monkeypatch, caplog):
    """By hand: share 0/10, 2/22, 4/34 (skip), 4/44, 6/56 (skip), 6/66."""
    clock = Clock()
    monkeypatch.setattr("peft_pcgrow.training.callback.time", SimpleNamespace(perf_counter=lambda: clock.now))
    callback = watch(clock.batches, every=1, max_share=0.1, at_start=False)
    with caplog.at_level(logging.INFO, logger="peft_pcgrow"):
        trainer = fit(build(), tmp_path, callbacks=[clock, callback])
    assert [step for step, _ in callback.maps] == [1, 2, 4, 6]
    assert (callback.skipped, callback.seconds) == (2, 8.0)
    assert logged(trainer, "pcgrow/time_share").tolist() == pytest.approx([2 / 12, 4 / 24, 6 / 46, 8 / 68])
    assert len([record for record in caplog.records if "is skipped" in record.message]) == 1


@pytest.mark.slow
def test_share_of_all_steps(tmp_path):
    """0.3 of 6 steps is 1.8, so every 2, as for logging_steps; only the first map and the newest are kept."""
    callback = watch(every=0.3, keep=2)
    trainer = fit(build(), tmp_path, callbacks=[callback])
    assert [entry["step"] for entry in measured(trainer.state.log_history)] == [0, 2, 4, 6]
    assert [step for step, _ in callback.maps] == [0, 4, 6]


@pytest.mark.slow
def test_neither_start_nor_end(tmp_path):
    callback = watch(every=4, at_start=False, at_end=False)
    fit(build(), tmp_path, callbacks=[callback])
    assert [step for step, _ in callback.maps] == [4]


@pytest.mark.slow
def test_best_model_at_the_end(tmp_path):
    """The last map is of the model that load_best_model_at_end put back."""
    callback = watch(every=1)
    trainer = fit(
        grow(),
        tmp_path,
        callbacks=[callback],
        learning_rate=5e-2,
        eval_dataset=rows(8, seed=6),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    best = int(logged(trainer, "eval_loss").argmin()) + 1
    assert best < 6, "the last step is the best: nothing is put back"
    maps = dict(callback.maps)
    assert len(callback.maps) == len(maps) == 7
    assert_equal(maps[6], maps[best])
    assert_equal(maps[6], expect(trainer.model))


@pytest.mark.slow
def test_resume(tmp_path, caplog):
    """Maps up to the checkpoint are found again, later ones of the interrupted run are not."""
    maps = tmp_path / "maps"
    straight = watch(save_to=maps)
    fit(grow(), tmp_path, callbacks=[straight], save_strategy="steps", save_steps=3)
    assert sorted(path.name for path in maps.iterdir()) == ["step-0", "step-2", "step-4", "step-6"]

    class Found(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.steps = getattr(self, "steps", [step for step, _ in callback.maps])

    found, callback = Found(), watch(save_to=maps)
    trainer = fit(grow(), tmp_path, callbacks=[callback, found], resume=str(tmp_path / "checkpoint-3"))
    assert found.steps == [0, 2]
    assert [entry["step"] for entry in measured(trainer.state.log_history)] == [0, 2, 4, 6]
    for (step, one), (again, two) in zip(straight.maps, callback.maps, strict=True):
        assert step == again
        assert_equal(one, two)

    (maps / "step-2" / "error_map.safetensors").write_text("{")
    found, callback = Found(), watch(save_to=maps)
    with caplog.at_level(logging.INFO, logger="peft_pcgrow"):
        fit(grow(), tmp_path, callbacks=[callback, found], resume=str(tmp_path / "checkpoint-3"))
    assert found.steps == [0]
    assert "resumes without the error map of step 2" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "mapping", "by index"])
def test_corpora_and_heldout_text(kind, tmp_path):
    """Whatever `measure_errors` takes, held-out text too, whose loss is logged."""
    ids, held = torch.cat(TEXTS), tokens(4, 9, seed=33)
    given = {"tensor": ids, "mapping": {"input_ids": ids}, "by index": TensorDataset(ids)}[kind]
    model = build()
    want = measure_errors(model, ids, heldout=held, gradients=False, progress=False)
    recorder = Recorder()
    callback = watch(given, heldout=held, at_end=False, every=100)
    fit(model, tmp_path, callbacks=[callback, recorder])
    assert_equal(callback.maps[0][1], want)
    assert_equal(callback.maps[0][1].heldout, want.heldout)
    assert measured(recorder.log)[0]["pcgrow/heldout_loss"] == want.heldout.loss / want.heldout.labels


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be a whole number of steps"),
        ({"every": -3}, ValueError, "got -3"),
        ({"every": 1.5}, ValueError, r"got 1\.5"),
        ({"every": True}, TypeError, "every must be a number"),
        ({"every": "10"}, TypeError, "every must be a number"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter(TEXTS)}, TypeError, "can be read only once"),
        ({"batches": (text for text in TEXTS)}, TypeError, "can be read only once"),
        ({"batches": 3}, TypeError, "must be a list, a DataLoader or a function"),
        ({"retain": iter(TEXTS)}, TypeError, "retain can be read only once"),
        ({"heldout": iter(TEXTS)}, TypeError, "heldout can be read only once"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be a whole number"),
        ({"keep": 0}, ValueError, "keep must be"),
        ({"max_share": 0}, ValueError, "max_share must be"),
        ({"max_share": 2}, ValueError, "max_share must be"),
        ({"max_token": 9}, TypeError, "no argument max_token; it has max_tokens"),
        ({"save_to": __file__}, FileExistsError, "is a file"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        watch(**arguments)


@pytest.mark.slow
def test_iterators_behind_a_function(tmp_path):
    """One that is used up is refused at its second use, one that gives nothing at its first."""
    once = iter(TEXTS * 9)
    callback = watch(lambda: once)
    with pytest.raises(ValueError, match="returned the same iterator twice"):
        fit(build(), tmp_path, callbacks=[callback])
    assert [step for step, _ in callback.maps] == [0]
    with pytest.raises(ValueError, match=r"no label token \(0 tokens read\)"):
        fit(build(), tmp_path, callbacks=[watch(lambda: [])])
