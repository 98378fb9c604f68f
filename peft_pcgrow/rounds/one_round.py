"""One round: measure, decide, grow, train, look; then keep what it grew, or take it back."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.architectures.operations import Shapes
from peft_pcgrow.files import write_whole
from peft_pcgrow.maps import map_file
from peft_pcgrow.maps.batches import losses, read_batches
from peft_pcgrow.maps.corpus import Text
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.maps.measure import measure_errors
from peft_pcgrow.rounds.decision import PROTECT, RoundDecision, decide_round, note_decision, positive, protected
from peft_pcgrow.rounds.energy import LOOKING, MEASURING, RATE, TRAINING, Meter, measured, trained
from peft_pcgrow.rounds.journal import ADAPTER, Journal, Round
from peft_pcgrow.rounds.texts import Texts, in_batches, spread
from peft_pcgrow.rounds.train import best_of, steps_of, train
from peft_pcgrow.say import say
from peft_pcgrow.settings import number
from peft_pcgrow.training.curriculum import order_by_surprisal
from peft_pcgrow.training.learning_rate import find_lr

# gates are set stricter in these steps, on retain text that they were not fitted on
RATES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
# a round that lowers the held-out loss by less than this share of it has found nothing more to learn
LEAST_GAIN = 0.005
# looks at the held-out text, in one pass over the corpus
LOOKS = 4
# batches that the learning rate is searched on
SEARCHED = 4
FORGOT = "forgot too much"
# what is said where nothing can grow, by `locate.decide` and by `find_lr`
NO_MORE = (
    "located nodes can grow at gate_fpr",
    "no step along the first update lowers the loss",
    "of the batches reaches what trains",
)


@dataclass(frozen=True)
class Settings:
    """Arguments of `grow`, read. most_forgetting: None without retain text. shapes: of the base."""

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


def losses_of(model: nn.Module, texts: Texts, batch_size: int, *names: str) -> dict[str, float]:
    """Loss of the held-out text and of the retain text that no gate was fitted on, or of the one that is named, nats
    per token."""
    named = {"heldout": texts.heldout, "retain": texts.watch}
    wanted = {name: held for name, held in named.items() if held and (not names or name in names)}
    read = {name: list(read_batches(model, in_batches(held, batch_size))) for name, held in wanted.items()}
    return dict(zip(read, losses(model, list(read.values())), strict=True))


def run_round(model: nn.Module, texts: Texts, settings: Settings, journal: Journal) -> nn.Module:
    """Go through the next round, note it in the journal, and return the model as it is then.

    After an exception the adapter of the round may still be there, as it was in the middle of it.
    """
    turn = len(journal.rounds) + 1
    folder = journal.at(turn)
    meter = Meter(settings.shapes, journal.spent.setdefault(str(turn), {}), journal.keep)
    decision, emap = _decided(model, texts, settings, journal, folder, meter)
    say(f"pcgrow: round {turn}: {decision}")
    if decision.growth == "stop":
        return _ended(journal, decision.why, model)
    name = "default" if not journal.kept else f"round-{turn}"
    before = journal.kept[-1].heldout if journal.kept else journal.before["heldout"]
    config = _config(emap, decision, settings)
    earlier = list(model.active_adapters) if isinstance(model, PeftModel) else []
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
        looks = _trained(grown, texts, decision, lr, settings, folder)
    with meter.phase(LOOKING, grown):
        rate, after = _as_strict_as_needed(grown, name, config, texts, settings, journal.before)
    forgot = (
        settings.most_forgetting is not None and after["retain"] - journal.before["retain"] > settings.most_forgetting
    )
    gain = before - after["heldout"]
    useless = gain < LEAST_GAIN * before
    if kept := not forgot and not useless:
        grown.save_pretrained(str(journal.folder / ADAPTER), selected_adapters=[name])
        outcome = f"held-out loss fell by {gain:.3f}"
    elif forgot:
        outcome = (
            f"{FORGOT}: the retain text's loss rose by {after['retain'] - journal.before['retain']:.3f}, more than "
            f"{settings.most_forgetting:g}, at the strictest gate"
        )
    else:
        outcome = f"held-out loss fell by {gain:.3f}, less than {LEAST_GAIN:.1%} of it"
    done = Round(
        turn, name, decision.growth, decision.why, sum(map(len, (config.locus or {}).values())), kept, outcome,
        lr, looks[best_of(looks)][0], [list(look) for look in looks], rate, decision.protect, after["heldout"],
        after.get("retain"), grown.get_nb_trainable_parameters()[0],
        dict(meter.spent["seconds"]),
    )  # fmt: skip
    result = grown if kept else _taken_back(grown, name, earlier)
    journal.rounds.append(done)
    journal.ended = "" if kept or (forgot and decision.growth != "deepen" and decision.protect < PROTECT) else outcome
    journal.save()
    shutil.rmtree(folder / "training", ignore_errors=True)
    say(f"pcgrow: round {turn}: {'kept' if kept else 'taken back'}: {outcome}")
    return result


def _ended(journal: Journal, why: str, model: nn.Module) -> nn.Module:
    journal.ended = why
    journal.save()
    return model


def _decided(
    model: nn.Module, texts: Texts, settings: Settings, journal: Journal, folder: Path, meter: Meter
) -> tuple[RoundDecision, ErrorMap]:
    """What the round does, and the map that it rests on; both are read where they are there already."""
    last = journal.rounds[-1] if journal.rounds else None
    # after a round that was taken back the model is the one that was measured
    again = last is not None and not last.kept
    place = journal.at(last.number) if again and last is not None else folder
    with meter.phase(MEASURING, model, measured(settings.shapes)):
        emap = _measured(model, texts, settings, place)
    path = folder / "decision.json"
    if path.exists():
        return RoundDecision.load(path), emap
    if again and last is not None:
        decision = protected(RoundDecision.load(place / "decision.json"))
    else:
        grown = [RoundDecision.load(journal.at(done.number) / "decision.json") for done in journal.kept]
        deepened: dict[str, set[int]] = {}
        for held in grown:
            for layer, experts in held.locus.items() if held.growth == "deepen" else ():
                deepened.setdefault(layer, set()).update(experts)
        decision = decide_round(
            emap,
            settings.budget,
            {layer: sorted(experts) for layer, experts in deepened.items()},
            settings.gate_fpr,
            number(settings.config.get("protect", 0.0)),
            bool(journal.kept),
        )
        total, every = steps_of(len(texts.train), settings.batch_size, settings.epochs, LOOKS, settings.max_steps)
        decision = replace(decision, lr=settings.lr, max_steps=total, every=every)
    decision.save(path)
    # as whoever goes on reads it
    return RoundDecision.load(path), emap


def _measured(model: nn.Module, texts: Texts, settings: Settings, folder: Path) -> ErrorMap:
    if map_file.exists(folder / "map"):
        return ErrorMap.load(folder / "map")
    count, size = settings.map_windows, settings.batch_size
    emap = measure_errors(
        model,
        in_batches(spread(texts.train, count), size),
        heldout=in_batches(spread(texts.heldout, count), size),
        retain=in_batches(spread(texts.fit, count), size) if texts.fit else None,
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
    given = {"task_type": "CAUSAL_LM", **settings.config, "error_map": emap}
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
    activate(model, [name, *earlier])
    return model


def activate(model: PeftModel, names: list[str]) -> None:
    """Make adapters active, of which only the first trains."""
    model.base_model.set_adapter(names)  # type: ignore[operator]
    if names[1:]:
        model.set_requires_grad(names[1:], False)


def _found_rate(model: PeftModel, texts: Texts, settings: Settings, folder: Path) -> float:
    path = folder / "rate.json"
    if not path.exists():
        some = spread(texts.train, SEARCHED * settings.batch_size)
        # a step on some batches, a look at others
        size = min(settings.batch_size, len(some) // 2)
        write_whole(path, json.dumps(find_lr(model, in_batches(some, size))).encode())
    try:
        return positive(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} holds no learning rate ({error}): delete it to have one found anew") from None


def _trained(
    model: PeftModel, texts: Texts, decision: RoundDecision, lr: float, settings: Settings, folder: Path
) -> list[tuple[int, float]]:
    ordered: list[Text] = texts.train
    options = dict(settings.trainer)
    if settings.curriculum:
        ordered = order_by_surprisal(ordered, model, batch_size=settings.batch_size, progress=settings.progress)
        options["train_sampling_strategy"] = "sequential"
    note_decision(decision, folder)
    return train(
        model, decision, lr, (ordered, texts.heldout), folder / "training", settings.batch_size, options,
        settings.callbacks, settings.progress,
    )  # fmt: skip


def _as_strict_as_needed(
    model: PeftModel, name: str, config: PCGrowConfig, texts: Texts, settings: Settings, before: Mapping[str, float]
) -> tuple[float | None, dict[str, float]]:
    """The most open gates that spare the retain text, and all losses at these; without newborns there are none."""
    after = losses_of(model, texts, settings.batch_size)
    if not config.spawned or settings.most_forgetting is None:
        return None, after
    rate = open_to = config.gate_fpr
    for stricter in (each for each in RATES if each < open_to):
        if after["retain"] - before["retain"] <= settings.most_forgetting:
            break
        rate = stricter
        model.set_gate_fpr(rate, name)  # type: ignore[operator]
        after |= losses_of(model, texts, settings.batch_size, "retain")
    if rate != open_to:
        after |= losses_of(model, texts, settings.batch_size, "heldout")
    return rate, after


def _taken_back(model: nn.Module, name: str, earlier: list[str]) -> nn.Module:
    """The model without an adapter, if it has that; earlier ones are active again."""
    if not isinstance(model, PeftModel):
        return model
    if not earlier:
        return model.unload()  # type: ignore[operator,return-value]
    if name in model.peft_config:
        model.delete_adapter(name)
    activate(model, earlier)
    return model
