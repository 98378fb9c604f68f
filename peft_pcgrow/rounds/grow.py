"""Grow: rounds of measure, decide, grow, train and look again, in one call."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME as CONFIG
from safetensors.torch import load_file, save
from torch import nn

from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.adapter.model import PCGrowModel
from peft_pcgrow.files import write_whole
from peft_pcgrow.maps.batches import check_causal
from peft_pcgrow.maps.resume import weights_in_use
from peft_pcgrow.maps.sample import sample_text
from peft_pcgrow.rounds.arguments import check_arguments, plain_form
from peft_pcgrow.rounds.as_it_was import adapters_of, as_it_was, at_rest
from peft_pcgrow.rounds.journal import ADAPTER, RETAIN, Journal, alone, check_folder, open_journal
from peft_pcgrow.rounds.one_round import Settings, losses_of, run_round
from peft_pcgrow.rounds.result import GrowthResult
from peft_pcgrow.rounds.texts import read_texts

# nats per token that the retain text's loss may rise by, unless said otherwise
FORGETTING = 0.02
# texts that the model writes itself for retain="self"
WRITTEN = 128
# arguments that rounds are given as they are
SETTINGS = (
    "budget", "batch_size", "epochs", "max_steps", "lr", "gate_fpr", "map_windows", "curriculum", "progress",
)  # fmt: skip


def grow(
    model: nn.Module,
    train_on: Any,
    *,
    output_dir: str | Path,
    heldout: Any = None,
    retain: Any = None,
    tokenizer: Callable[..., Any] | None = None,
    max_forgetting: float | None = None,
    budget: float = 0.2,
    rounds: int = 3,
    length: int = 256,
    batch_size: int = 8,
    epochs: float = 4.0,
    max_steps: int | None = None,
    lr: float | None = None,
    gate_fpr: float = 0.03,
    map_windows: int = 192,
    curriculum: bool = False,
    config: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    seed: int = 0,
    progress: bool = True,
) -> GrowthResult:
    """Grow a model into a domain, unattended: what to grow, how, and for how long follows from maps and held-out text.

    Each round measures the error map of the model as it is, decides (see `decide_round`), grows newborns or deepens
    experts, trains them in a transformers `Trainer` until the held-out loss no longer falls, and looks at all losses.
    Newborns' gates are then set as open as `max_forgetting` allows; where no rate will do, the round is taken back. It
    ends when the domain is covered or memorised, when a round brings too little or forgets too much, or after `rounds`.
    What was decided is in `output_dir` (`rounds/N/decision.json`): copied, edited, into a new folder, it is followed
    there. The same call on the same folder goes on with a run that was interrupted anywhere, to the same result (on the
    same class of machine and as many threads). After an exception the model is as it was given, but that experts which
    `base_quantization` has packed stay packed; random numbers are as before either way.

    Args:
        model: a transformers causal LM with experts, or a dense one, whose MLPs grow; without adapters, or with those
            of earlier runs (see `load_grown`), which stay active and as they are.
        train_on: the domain's text, as for `measure_errors`: strings with `tokenizer`, token ids, a data set.
        output_dir: folder of the run; new, or a run's to go on with.
        heldout: text of the domain that is not trained on; None: one window in ten is kept apart.
        retain: text whose loss must not rise: gates are fitted on half of it, forgetting is measured on the other half.
            "self": the model writes it. None: nothing is spared; located experts are deepened.
        tokenizer: makes token ids of strings.
        max_forgetting: nats per token that the loss of retain text may rise by; 0.02 if None and there is such text.
        budget: share of the expert parameters that each round grows, in (0, 1].
        rounds: at most.
        length: tokens of a window.
        batch_size: windows of a step.
        epochs: of each round, at most; the rate falls to zero over them.
        max_steps: of each round, at most; None: as many as `epochs` has.
        lr: of Muon; None: `find_lr` finds one for each round.
        gate_fpr: of the training (see `PCGrowConfig`); afterwards gates are at most as open. Trained as strict as they
            are used later, newborns gain more at equal forgetting (see RESULTS.md).
        map_windows: windows that maps, and gates, are measured on; 4 at least.
        curriculum: train in the order of surprisal, least surprising first, instead of shuffled.
        config: further fields of `PCGrowConfig`, such as `lora`.
        trainer: further `TrainingArguments`, such as `report_to`.
        callbacks: further `TrainerCallback`s.
        seed: of the order of the text, and of what the model writes.
        progress: show progress bars on standard error.

    Returns:
        The grown model, of which nothing trains, and what each round did.

    Raises:
        TypeError: no causal LM, one with other adapters, or an option that the loop decides itself or does not know.
        ValueError: too little text, held-out or retain text that is the domain's, a number out of its range, or a
            folder with a run of other arguments.
        FileExistsError: a folder that holds something else. RuntimeError: another process is running there.

    Example:
        >>> options = {"heldout": batches[1], "retain": retain, "rounds": 1, "max_steps": 4, "lr": 0.1}
        >>> result = grow(model, batches[0], output_dir=folder / "run", length=24, progress=False, **options)
        >>> result.rounds[0].growth, result.rounds[0].nodes
        ('spawn', 5)
    """
    given = {
        "budget": budget, "rounds": rounds, "length": length, "batch_size": batch_size, "epochs": epochs,
        "max_steps": max_steps, "lr": lr, "gate_fpr": gate_fpr, "max_forgetting": max_forgetting,
        "map_windows": map_windows, "curriculum": curriculum, "config": config, "trainer": trainer, "seed": seed,
        "progress": progress,
    }  # fmt: skip
    check_arguments(given)
    # JSON knows no numbers of numpy's
    read = {name: plain_form(value) for name, value in given.items()}
    check_causal(model)
    check_grown(model)
    earlier = adapters_of(model)
    if max_forgetting is not None and retain is None:
        raise ValueError(f"max_forgetting={max_forgetting} is about retain text: give retain=, or 'self'")
    itself = isinstance(retain, str)
    if itself and retain != "self":
        raise ValueError(f"retain={retain!r} is a string: give text whose loss must not rise, or 'self'")
    limit = FORGETTING if max_forgetting is None and retain is not None else read["max_forgetting"]
    folder, config, trainer = Path(output_dir), dict(config or {}), dict(trainer or {})
    check_folder(folder)
    corpora = (tokenizer, length, batch_size)
    texts = None if itself else read_texts(train_on, heldout, retain, *corpora)
    with alone(folder), as_it_was(model):
        if texts is None:
            texts = read_texts(train_on, heldout, _written(model, folder, length, seed, progress), *corpora)
        shaping = {name: value for name, value in read.items() if name != "progress"} | {
            "max_forgetting": limit, "texts": texts.digest(), "weights": weights_in_use(model),
            # one form of what can be said in several
            "config": {name: getattr(PCGrowConfig(**config), name) for name in config}, "trainer": trainer,
        }  # fmt: skip
        journal = open_journal(folder, plain_form(shaping))
        settings = Settings(
            **{name: read[name] for name in SETTINGS}, most_forgetting=limit, config=config,
            trainer={**trainer, "seed": read["seed"]}, callbacks=tuple(callbacks),
            rounds_before=max([1 if name == "default" else int(name[6:]) for name in earlier], default=0),
        )  # fmt: skip
        if not journal.before:
            journal.before = losses_of(model, texts, batch_size)
            journal.save()
        training = model.training
        kept = [done.adapter for done in journal.kept]
        grown = load_grown(model, folder / ADAPTER, kept) if kept else model
        while not journal.ended and len(journal.rounds) < rounds:
            grown = run_round(grown, texts, settings, journal)
        if not journal.ended:
            journal.ended = f"{rounds} rounds are done"
            journal.save()
        return _result(at_rest(grown, training), journal)


def check_grown(model: nn.Module) -> None:
    """TypeError if a model has adapters that are no run's."""
    names = adapters_of(model)
    ours = isinstance(getattr(model, "base_model", None), PCGrowModel)
    if names and not (ours and all(re.fullmatch(r"default|round-\d+", name) for name in names)):
        raise TypeError(
            f"the model has adapters {', '.join(map(repr, names))} that no run of grow made: give the base, or "
            'load_grown(base, "RUN/adapter") to go on from a run'
        )


def load_grown(model: nn.Module, folder: str | Path, names: Sequence[str] | None = None) -> nn.Module:
    """A base with the adapters that a run of `grow` left, all active, none of which trains.

    One adapter is also loaded by `PeftModel.from_pretrained(model, folder)`; those of later rounds grow from earlier
    ones, and need these beside them.

    Args:
        model: the base, without adapters, or with those of the run that this one went on from.
        folder: `adapter` of a run.
        names: those of some rounds, the first that was grown first; None: all.

    Raises:
        FileNotFoundError: no adapter in the folder, or not that one. TypeError: a model with other adapters.
        ValueError: names=[], or an adapter that the model has already.

    Example:
        >>> import copy
        >>> base = copy.deepcopy(model)
        >>> options = {"heldout": batches[1], "rounds": 1, "max_steps": 4, "lr": 0.1}
        >>> result = grow(model, batches[0], output_dir=folder / "run", length=24, progress=False, **options)
        >>> list(load_grown(base, folder / "run" / "adapter").peft_config)
        ['default']
    """
    check_grown(model)
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    root = Path(folder)
    if names is None:
        later = sorted(
            (place.parent for place in root.glob(f"round-*/{CONFIG}")), key=lambda place: int(place.name[6:])
        )
        names = [*(["default"] if (root / CONFIG).exists() else []), *(place.name for place in later)]
        if not names:
            raise FileNotFoundError(f"{root} has no {CONFIG}: give the folder adapter of a run of grow")
    places = {name: root if name == "default" else root / name for name in names}
    if not places:
        raise ValueError("names=[] names no adapter: give some, or None for all")
    for name, place in places.items():
        if not (place / CONFIG).is_file():
            raise FileNotFoundError(f"{place} has no {CONFIG}, so there is no adapter {name!r}: give those of the run")
    if again := [name for name in places if name in adapters_of(model)]:
        raise ValueError(f"the model has an adapter {again[0]!r} already: give the base that these were grown on")
    for name, place in places.items():
        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(model, str(place), adapter_name=name)  # type: ignore[arg-type]
        else:
            model.load_adapter(str(place), adapter_name=name)  # type: ignore[operator]
        # one after the other: each is asked for the rows of those before it
        active = [name, *active]
    if len(active) > 1:
        model.base_model.set_adapter(active)  # type: ignore[operator,union-attr]
    return model.requires_grad_(False)


def _result(model: nn.Module, journal: Journal) -> GrowthResult:
    after = journal.kept[-1] if journal.kept else None
    losses = dict(journal.before)
    if after is not None:
        losses = {"heldout": after.heldout} | ({} if after.retain is None else {"retain": after.retain})
    adapter = journal.folder / ADAPTER if journal.kept else None
    size = sum(file.stat().st_size for file in adapter.rglob("*.safetensors")) if adapter is not None else 0
    seconds: dict[str, float] = {}
    for done in journal.rounds:
        for phase, taken in done.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + taken
    return GrowthResult(model, tuple(journal.rounds), journal.ended, journal.before, losses, adapter, size, seconds)


def _written(model: nn.Module, folder: Path, length: int, seed: int, progress: bool) -> torch.Tensor:
    """Retain text by the model itself, written once for a run, `[N, length]`."""
    path = folder / RETAIN
    if not path.exists():
        texts = torch.cat(sample_text(model, WRITTEN, length, seed=seed, progress=progress))
        write_whole(path, save({"input_ids": texts}))
    return load_file(path)["input_ids"]
