"""Grow: rounds of measure, decide, grow, train and look again, in one call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME as CONFIG
from safetensors.torch import load_file, save
from torch import nn

from peft_pcgrow.adapter.config import PCGrowConfig, check_rate
from peft_pcgrow.files import write_whole
from peft_pcgrow.locate.budget import check_budget
from peft_pcgrow.maps.batches import check_causal
from peft_pcgrow.maps.corpus import whole_number
from peft_pcgrow.maps.resume import weights_in_use
from peft_pcgrow.maps.sample import sample_text
from peft_pcgrow.rounds.journal import ADAPTER, RETAIN, Journal, check_folder, open_journal
from peft_pcgrow.rounds.one_round import Settings, losses_of, run_round
from peft_pcgrow.rounds.result import GrowthResult
from peft_pcgrow.rounds.texts import read_texts
from peft_pcgrow.rounds.train import OURS

# nats per token that the retain text's loss may rise by, unless said otherwise
FORGETTING = 0.02
# texts that the model writes itself for retain="self"
WRITTEN = 128
# fields of PCGrowConfig that the loop decides
DECIDED = ("error_map", "budget", "locus", "parts", "grow", "gate_fpr", "spawned", "resolution", "router", "select")


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
    gate_fpr: float = 0.1,
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
    Newborns' gates are then set as strict as `max_forgetting` needs; where no rate will do, the round is taken back and
    tried once more with its updates kept off the retain text's directions. It ends when the domain is covered or
    memorised, when a round brings too little, or after `rounds`. What was decided is in `output_dir`
    (`rounds/N/decision.json`): copied, edited, into a new folder, it is followed there. The same call on the same
    folder goes on with a run that was interrupted anywhere, to the same result.

    Args:
        model: a transformers causal LM with experts, or a dense one, whose MLPs grow; without adapters.
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
        gate_fpr: of the training (see `PCGrowConfig`); afterwards gates are at most as open.
        map_windows: windows that maps, and gates, are measured on.
        curriculum: train in the order of surprisal, least surprising first, instead of shuffled.
        config: further fields of `PCGrowConfig`, such as `lora`.
        trainer: further `TrainingArguments`, such as `report_to`.
        callbacks: further `TrainerCallback`s.
        seed: of the order of the text, and of what the model writes.
        progress: show progress bars on standard error.

    Returns:
        The grown model and what each round did.

    Raises:
        TypeError: no causal LM, one with adapters, or an option that the loop decides itself.
        ValueError: too little text, held-out or retain text that is the domain's, a number out of its range, or a
            folder with a run of other arguments.
        FileExistsError: a folder that holds something else.

    Example:
        >>> options = {"heldout": batches[1], "retain": retain, "rounds": 1, "max_steps": 4, "lr": 0.1}
        >>> result = grow(model, batches[0], output_dir=folder / "run", length=24, progress=False, **options)
        >>> result.rounds[0].growth, result.rounds[0].nodes
        ('spawn', 5)
    """
    check_causal(model)
    if hasattr(model, "peft_config"):
        raise TypeError("the model has adapters already: give the base; a run goes on when its folder is given again")
    check_budget(budget)
    check_rate(gate_fpr)
    numbers = {"rounds": rounds, "length": length, "batch_size": batch_size, "map_windows": map_windows}
    for name, value in numbers.items():
        whole_number(name, value, "rounds" if name == "rounds" else "tokens" if name == "length" else "windows")
    if max_forgetting is not None and retain is None:
        raise ValueError(f"max_forgetting={max_forgetting} is about retain text: give retain=, or 'self'")
    config, trainer = dict(config or {}), dict(trainer or {})
    _check_options("config", config, {each.name for each in fields(PCGrowConfig)}, DECIDED)
    _check_options("trainer", trainer, None, OURS)
    limit = FORGETTING if max_forgetting is None and retain is not None else max_forgetting
    folder = Path(output_dir)
    check_folder(folder)
    if isinstance(retain, str):
        if retain != "self":
            raise ValueError(f"retain={retain!r} is a string: give text whose loss must not rise, or 'self'")
        retain = _written(model, folder, length, seed, progress)
    texts = read_texts(train_on, heldout, retain, tokenizer, length, batch_size)
    asked = numbers | {
        "texts": texts.digest(), "weights": weights_in_use(model), "budget": budget, "epochs": epochs,
        "max_steps": max_steps, "lr": lr, "gate_fpr": gate_fpr, "max_forgetting": limit, "curriculum": curriculum,
        "config": {name: str(value) for name, value in config.items()},
        "trainer": {name: str(value) for name, value in trainer.items()}, "seed": seed,
    }  # fmt: skip
    journal = open_journal(folder, asked)
    settings = Settings(
        budget, batch_size, epochs, max_steps, lr, gate_fpr, limit, map_windows, curriculum, config,
        {"seed": seed, **trainer}, tuple(callbacks), progress,
    )  # fmt: skip
    if not journal.before:
        journal.before = losses_of(model, texts, batch_size)
        journal.save()
    kept = [done.adapter for done in journal.kept]
    grown = load_grown(model, folder / ADAPTER, kept) if kept else model
    while not journal.ended and len(journal.rounds) < rounds:
        grown = run_round(grown, texts, settings, journal)
    if not journal.ended:
        journal.ended = f"{rounds} rounds are done"
        journal.save()
    return _result(grown, journal)


def load_grown(model: nn.Module, folder: str | Path, names: Sequence[str] | None = None) -> nn.Module:
    """A base with the adapters that a run of `grow` left, all active, none of which trains.

    One adapter is also loaded by `PeftModel.from_pretrained(model, folder)`; those of later rounds grow from earlier
    ones, and need these beside them.

    Args:
        model: the base, without adapters.
        folder: `adapter` of a run.
        names: those of some rounds, the first that was grown first; None: all.

    Raises:
        FileNotFoundError: no adapter in the folder.

    Example:
        >>> import copy
        >>> base = copy.deepcopy(model)
        >>> options = {"heldout": batches[1], "retain": retain, "rounds": 1, "max_steps": 4, "lr": 0.1}
        >>> result = grow(model, batches[0], output_dir=folder / "run", length=24, progress=False, **options)
        >>> list(load_grown(base, folder / "run" / "adapter").peft_config)
        ['default']
    """
    root = Path(folder)
    if names is None:
        later = sorted(
            (place.parent for place in root.glob(f"round-*/{CONFIG}")), key=lambda place: int(place.name[6:])
        )
        names = [*(["default"] if (root / CONFIG).exists() else []), *(place.name for place in later)]
        if not names:
            raise FileNotFoundError(f"{root} has no {CONFIG}: give the folder adapter of a run of grow")
    for number, name in enumerate(names):
        place = str(root if name == "default" else root / name)
        if number == 0:
            model = PeftModel.from_pretrained(model, place, adapter_name=name)  # type: ignore[arg-type]
        else:
            model.load_adapter(place, adapter_name=name)  # type: ignore[operator]
    if len(names) > 1:
        model.base_model.set_adapter(list(names)[::-1])  # type: ignore[operator,union-attr]
        model.set_requires_grad(list(names), False)  # type: ignore[operator]
    return model


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


def _check_options(what: str, given: Mapping[str, Any], known: set[str] | None, ours: Sequence[str]) -> None:
    if refused := [name for name in given if name in ours]:
        raise TypeError(f"{what} sets {', '.join(refused)}, which grow decides itself: leave it out")
    if unknown := [name for name in given if known is not None and name not in known]:
        raise TypeError(f"{what} has no field {', '.join(unknown)}; PCGrowConfig has {', '.join(sorted(known or ()))}")
