"""One round: measure, decide, grow, train, look; then keep what it grew, or take it back."""

import hashlib
import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.architectures.operations import Shapes
from peft_pcgrow.files import write_whole
from peft_pcgrow.gates.gate import RATES
from peft_pcgrow.maps import map_file
from peft_pcgrow.maps.batches import losses, read_batches
from peft_pcgrow.maps.corpus import Text
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.maps.measure import measure_errors
from peft_pcgrow.rounds.arguments import check_positive
from peft_pcgrow.rounds.as_it_was import adapters_of, take_back
from peft_pcgrow.rounds.decision import PROTECT, RoundDecision, decide_round, note_decision
from peft_pcgrow.rounds.energy import LOOKING, MEASURING, RATE, TRAINING, Meter, measured, trained
from peft_pcgrow.rounds.journal import ADAPTER, HELDOUT, Journal, Round, key_of, risen
from peft_pcgrow.rounds.texts import RETAIN, Texts, called, drawn, drawn_alike, in_batches, to_fit_anew
from peft_pcgrow.rounds.train import best_of, steps_of, train
from peft_pcgrow.say import say
from peft_pcgrow.settings import number
from peft_pcgrow.training.curriculum import order_by_surprisal
from peft_pcgrow.training.learning_rate import find_lr
from peft_pcgrow.training.refit_gates import RefitGatesCallback, usual_step

# a round that lowers the held-out loss by less than this share of it has found nothing more to learn
LEAST_GAIN = 0.005
# looks at the held-out text, in one pass over the corpus
LOOKS = 4
# batches that the learning rate is searched on
SEARCHED = 4
# what is said where nothing can grow, by `locate.decide` and by `find_lr`
NO_MORE = (
    "located nodes can grow at gate_fpr",
    "no step along the first update lowers the loss",
    "of the batches reaches what trains",
)


@dataclass(frozen=True)
class Settings:
    """Arguments of `grow`, read. most_forgetting: None without retain text. shapes: of the base. rounds_before: number
    of the last one of the run that is gone on from; 0: there is none."""

    budget: float
    batch_size: int
    epochs: float
    max_steps: int | None
    lr: float | None
    gate_fpr: float
    most_forgetting: float | None
    map_windows: int
    curriculum: bool
    config: dict[str, Any]
    trainer: dict[str, Any]
    callbacks: tuple[Any, ...]
    progress: bool
    shapes: Shapes
    rounds_before: int


def losses_of(
    model: nn.Module, texts: Texts, batch_size: int, names: tuple[str, ...] = (HELDOUT, RETAIN)
) -> dict[str, float]:
    """Losses of the held-out text and of the retain text that no gate was fitted on, or of the one that is named, nats
    per token. Where retain texts have names, of each (see `key_of`), and of `RETAIN` the mean of these."""
    spared = texts.watch if RETAIN in names else {}
    held = {HELDOUT: texts.heldout} if HELDOUT in names else {}
    read = [list(read_batches(model, in_batches(text, batch_size))) for text in (*held.values(), *spared.values())]
    found = losses(model, read)
    after = dict(zip(held, found, strict=False))
    if spared:
        each = found[len(held) :]
        after[RETAIN] = statistics.fmean(each)
        after |= dict(zip(map(key_of, spared), each, strict=True)) if [*spared] != [RETAIN] else {}
    return after


def _rise(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, str]:
    """By how much the loss of the retain text rose, of several texts that of the one it rose most of, and its name."""
    return max(((rise, name) for name, rise in risen(before, after).items()), default=(0.0, RETAIN))


def run_round(model: nn.Module, texts: Texts, settings: Settings, journal: Journal) -> nn.Module:
    """Go through the next round, note it in the journal, and return the model as it is then.

    After an exception the adapter of the round may still be there, as it was in the middle of it.
    """
    turn = len(journal.rounds) + 1
    folder = journal.at(turn)
    meter = Meter(settings.shapes, journal.spent.setdefault(str(turn), {}), journal.keep)
    decision, emap = _decided(model, texts, settings, folder, meter)
    say(f"pcgrow: round {turn}: {decision}")
    if decision.growth == "stop":
        return _ended(journal, decision.why, model)
    earlier = list(model.active_adapters) if isinstance(model, PeftModel) else []
    name = f"round-{settings.rounds_before + turn}" if earlier else "default"
    before = journal.kept[-1].heldout if journal.kept else journal.before[HELDOUT]
    config = _config(emap, decision, settings)
    # rounds of two runs that differ in nothing but their training are not each other's
    config._told_by = hashlib.sha256(json.dumps([journal.asked, asdict(decision)]).encode()).hexdigest()
    grown = model
    # what LoRA beside the experts starts from
    torch.manual_seed(settings.trainer["seed"] + turn)
    try:
        grown = _with_adapter(model, config, name, earlier)
        with meter.phase(RATE, grown, trained(settings.shapes, grown, emap, config.settle, False)):
            lr = _found_rate(grown, texts, settings, folder) if decision.lr is None else decision.lr
    except ValueError as error:
        # at first it is the user's to know
        if not journal.rounds or not any(said in str(error) for said in NO_MORE):
            raise
        return _ended(journal, f"nothing more can grow: {error}", _taken_back(grown, name, earlier))
    with meter.phase(TRAINING, grown, trained(settings.shapes, grown, emap, config.settle, True)):
        looks = _trained(grown, name, texts, decision, lr, settings, folder, meter)
    with meter.phase(LOOKING, grown):
        rate, after = _as_strict_as_needed(grown, name, config, texts, settings, journal.before)
    rose, most = _rise(journal.before, after)
    forgot = settings.most_forgetting is not None and rose > settings.most_forgetting
    gain = before - after[HELDOUT]
    outcome = f"held-out loss fell by {gain:.3f}"
    if forgot:
        outcome = (
            f"forgot too much: the loss of {called(most)} rose by {rose:.3f}, more than {settings.most_forgetting:g}, "
            "at the strictest gate: give more of it, or config= a higher protect"
        )
    elif gain < LEAST_GAIN * before:
        outcome += f", less than {LEAST_GAIN:.1%} of it"
    if kept := not forgot and gain >= LEAST_GAIN * before:
        grown.save_pretrained(str(journal.folder / ADAPTER), selected_adapters=[name])
    done = Round(
        turn, name, decision.growth, decision.why, sum(map(len, (config.locus or {}).values())), kept, outcome,
        lr, looks[best_of(looks)][0], [list(look) for look in looks], rate, decision.protect, after[HELDOUT],
        after.get(RETAIN), grown.get_nb_trainable_parameters()[0],
        dict(meter.spent["seconds"]), {name: loss for name, loss in after.items() if name not in (HELDOUT, RETAIN)},
    )  # fmt: skip
    result = grown if kept else _taken_back(grown, name, earlier)
    journal.rounds.append(done)
    journal.ended = "" if kept else outcome
    journal.save()
    shutil.rmtree(folder / "training", ignore_errors=True)
    say(f"pcgrow: round {turn}: {'kept' if kept else 'taken back'}: {outcome}")
    return result


def _ended(journal: Journal, why: str, model: nn.Module) -> nn.Module:
    journal.ended = why
    journal.save()
    return model


def _decided(
    model: nn.Module, texts: Texts, settings: Settings, folder: Path, meter: Meter
) -> tuple[RoundDecision, ErrorMap]:
    """What the round does, and the map that it rests on; both are read where they are there already."""
    with meter.phase(MEASURING, model, measured(settings.shapes)):
        emap = _measured(model, texts, settings, folder)
    path = folder / "decision.json"
    if not path.exists():
        decision = decide_round(
            _where_it_may_grow(emap, settings),
            settings.budget,
            _deepened(model),
            settings.gate_fpr,
            number(settings.config.get("protect", PROTECT if texts.fit else 0.0)),
            isinstance(model, PeftModel),
        )
        total, every = steps_of(len(texts.train), settings.batch_size, settings.epochs, LOOKS, settings.max_steps)
        refit = [usual_step(total)] if texts.fit and decision.growth in ("spawn", "auto") else []
        replace(decision, lr=settings.lr, max_steps=total, every=every, refit=refit).save(path)
    # as whoever goes on reads it
    return RoundDecision.load(path), emap


def _where_it_may_grow(emap: ErrorMap, settings: Settings) -> ErrorMap:
    """The map of `config={"layers_to_transform": ...}`, or the whole; that no such layer is there the adapter says."""
    given = settings.config.get("layers_to_transform")
    wanted = [given] if isinstance(given, int) else given or ()
    return emap.restrict(chosen) if (chosen := tuple(layer for layer in emap.layers if layer in wanted)) else emap


def _deepened(model: nn.Module) -> dict[str, list[int]]:
    """Experts that adapters deepen already, layer -> experts."""
    found: dict[str, list[int]] = {}
    for layer in model.base_model.tuner_layers() if isinstance(model, PeftModel) else ():  # type: ignore[operator]
        for birth in layer.births.values():
            found.setdefault(str(layer.layer_index), []).extend(set(birth.grown) - set(birth.spawned))
    return found


def _for_maps(held: list[Text], settings: Settings) -> list[dict[str, torch.Tensor]]:
    """Batches of the windows of a text that maps, and gates, are measured on."""
    return in_batches(drawn(held, settings.map_windows), settings.batch_size)


def _to_fit(texts: Texts, settings: Settings) -> list[dict[str, torch.Tensor]]:
    """The same of the retain texts that gates are fitted on."""
    return in_batches(drawn_alike(texts.fit, settings.map_windows), settings.batch_size)


def _measured(model: nn.Module, texts: Texts, settings: Settings, folder: Path) -> ErrorMap:
    if map_file.exists(folder / "map"):
        return ErrorMap.load(folder / "map")
    emap = measure_errors(
        model,
        _for_maps(texts.train, settings),
        heldout=_for_maps(texts.heldout, settings),
        retain=_to_fit(texts, settings) if texts.fit else None,
        checkpoint=folder / "measuring",
        progress=settings.progress,
    )
    emap.save(folder / "map")
    shutil.rmtree(folder / "measuring", ignore_errors=True)
    return emap


def measure_last(model: nn.Module, texts: Texts, settings: Settings, journal: Journal) -> None:
    """Measure the map that another round would begin with, unless there is one of the model as it is now."""
    turn = len(journal.rounds) + 1
    if journal.rounds and journal.rounds[-1].kept and not map_file.exists(journal.at(turn) / "map"):
        meter = Meter(settings.shapes, journal.spent.setdefault(str(turn), {}), journal.keep)
        with meter.phase(MEASURING, model, measured(settings.shapes)):
            _measured(model, texts, settings, journal.at(turn))


def _config(emap: ErrorMap, decision: RoundDecision, settings: Settings) -> PCGrowConfig:
    given = {**settings.config, "error_map": emap}
    given |= {"locus": decision.locus, "grow": decision.growth}
    if decision.growth != "deepen":
        given |= {"gate_fpr": decision.gate_fpr, "protect": decision.protect}
    return PCGrowConfig(**given)


def _with_adapter(model: nn.Module, config: PCGrowConfig, name: str, earlier: list[str]) -> PeftModel:
    """The model with a new adapter that trains; earlier ones stay active, and frozen."""
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)  # type: ignore[arg-type,return-value]
    model.add_adapter(name, config)
    # first: a Trainer takes the first active adapter for the one that it trains
    model.base_model.set_adapter([name, *earlier])  # type: ignore[operator]
    if earlier:
        model.set_requires_grad(earlier, False)
    return model


def _found_rate(model: PeftModel, texts: Texts, settings: Settings, folder: Path) -> float:
    path = folder / "rate.json"
    if not path.exists():
        some = drawn(texts.train, SEARCHED * settings.batch_size)
        # a step on some batches, a look at others
        size = min(settings.batch_size, len(some) // 2)
        write_whole(path, json.dumps(find_lr(model, in_batches(some, size))).encode())
    try:
        check_positive("it", found := json.loads(path.read_text()))
        return found
    except ValueError as error:
        raise ValueError(f"{path} holds no learning rate ({error}): delete it to have one found anew") from None


class _Refit(RefitGatesCallback):
    """Counts what it takes."""

    def __init__(self, meter: Meter, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.meter = meter

    def refit(self, model: Any) -> None:
        super().refit(model)
        for batch in chain(*self.texts):
            tokens, length = batch["input_ids"].numel(), batch["input_ids"].shape[1]
            # once for directions, once for thresholds
            self.meter.add("operations", MEASURING, 2 * self.meter.shapes.forward(tokens, tokens * length))


def _trained(
    model: PeftModel,
    name: str,
    texts: Texts,
    decision: RoundDecision,
    lr: float,
    settings: Settings,
    folder: Path,
    meter: Meter,
) -> list[tuple[int, float]]:
    ordered: list[Text] = texts.train
    options = dict(settings.trainer)
    if settings.curriculum:
        ordered = order_by_surprisal(ordered, model, batch_size=settings.batch_size, progress=settings.progress)
        options["train_sampling_strategy"] = "sequential"
    note_decision(decision, folder)
    callbacks = settings.callbacks
    if decision.refit and any(layer.spawned(name) for layer in model.base_model.tuner_layers()):  # type: ignore[operator]
        read = to_fit_anew(texts, settings.map_windows, model.peft_config[name].gate_window, settings.batch_size)  # type: ignore[union-attr]
        callbacks = (_Refit(meter, *read, steps=decision.refit, adapter_name=name), *callbacks)
    return train(
        model, decision, lr, (ordered, texts.heldout), folder / "training", settings.batch_size, options,
        callbacks, settings.progress,
    )  # fmt: skip


def _as_strict_as_needed(
    model: PeftModel, name: str, config: PCGrowConfig, texts: Texts, settings: Settings, before: Mapping[str, float]
) -> tuple[float | None, dict[str, float]]:
    """The most open gates that spare the retain text, and all losses at these; without newborns there are none."""
    after = losses_of(model, texts, settings.batch_size)
    if not config.spawned or settings.most_forgetting is None:
        return None, after
    rates = [rate for rate in RATES if rate < config.gate_fpr]
    if _rise(before, after)[0] <= settings.most_forgetting or not rates:
        return config.gate_fpr, after
    # the stricter, the less is forgotten: halve the rates that are left
    tried: dict[float, dict[str, float]] = {}
    first, spares = 0, len(rates)
    while first < spares:
        middle = (first + spares) // 2
        model.set_gate_fpr(rates[middle], name)  # type: ignore[operator]
        tried[rates[middle]] = losses_of(model, texts, settings.batch_size, (RETAIN,))
        good = _rise(before, tried[rates[middle]])[0] <= settings.most_forgetting
        first, spares = (first, middle) if good else (middle + 1, spares)
    rate = rates[min(spares, len(rates) - 1)]
    model.set_gate_fpr(rate, name)  # type: ignore[operator]
    return rate, losses_of(model, texts, settings.batch_size, (HELDOUT,)) | tried[rate]


def _taken_back(model: nn.Module, name: str, earlier: list[str]) -> nn.Module:
    """The model without an adapter, if it has that; earlier ones are active again."""
    if not isinstance(model, PeftModel):
        return model
    if not earlier:
        return model.unload()  # type: ignore[operator,return-value]
    take_back(model, [each for each in adapters_of(model) if each != name], earlier)
    return model
