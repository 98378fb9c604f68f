"""Grow: rounds of measure, decide, grow, train and look again, in one call."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import nn

from peft_pcgrow.adapter.config import PCGrowConfig
from peft_pcgrow.adapter.model_card import save_card
from peft_pcgrow.architectures.find import find_experts
from peft_pcgrow.architectures.operations import Shapes
from peft_pcgrow.files import write_whole
from peft_pcgrow.maps.batches import check_causal
from peft_pcgrow.maps.resume import weights_in_use
from peft_pcgrow.maps.sample import sample_text
from peft_pcgrow.rounds.arguments import check_arguments, plain_form
from peft_pcgrow.rounds.as_it_was import adapters_of, as_it_was, at_rest
from peft_pcgrow.rounds.energy import LOOKING, WRITING, Meter, Spent
from peft_pcgrow.rounds.journal import ADAPTER, WRITTEN, Journal, alone, check_folder, open_journal
from peft_pcgrow.rounds.load import check_grown, load_grown
from peft_pcgrow.rounds.one_round import Settings, losses_of, measure_last, run_round
from peft_pcgrow.rounds.result import GrowthResult
from peft_pcgrow.rounds.run_card import measured_by
from peft_pcgrow.rounds.texts import RETAIN, by_name, drawn, read_texts

# nats per token that the retain text's loss may rise by, unless said otherwise
FORGETTING = 0.02
# texts that the model writes itself for retain="self"
TEXTS_WRITTEN = 128
# arguments that rounds are given as they are
SETTINGS = (
    "budget", "batch_size", "epochs", "max_steps", "lr", "gate_fpr", "map_windows", "curriculum", "progress",
)  # fmt: skip
# arguments that change nothing of what is grown
BESIDE = ("progress", "map_after")
# held-out windows that a page of the run shows continued
SHOWN = 3


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
    map_after: bool = False,
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
            "self": the model writes it. Several texts by their names: gates see as many windows of each, and forgetting
            is measured of each by itself. None: nothing is spared; located experts are deepened.
        tokenizer: makes token ids of strings.
        max_forgetting: nats per token that the loss of retain text, of each that has a name, may rise by; 0.02 if None
            and there is such text.
        budget: share of the expert parameters that each round grows, in (0, 1].
        rounds: at most.
        length: tokens of a window.
        batch_size: windows of a step.
        epochs: of each round, at most; the rate falls to zero over them.
        max_steps: of each round, at most; None: as many as `epochs` has.
        lr: of Muon; None: `find_lr` finds one for each round.
        gate_fpr: of the training (see `PCGrowConfig`); afterwards gates are at most as open. Trained as strict as they
            are used later, newborns gain more at equal forgetting (see RESULTS.md).
        map_windows: windows that maps, and gates, are measured on; 4 at least. Gates are fitted anew on the beginnings
            of three times as many besides.
        map_after: measure a map after the last round, too, for the pictures of the result; it changes nothing else.
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
        ('spawn', 3)
    """
    given = {
        "budget": budget, "rounds": rounds, "length": length, "batch_size": batch_size, "epochs": epochs,
        "max_steps": max_steps, "lr": lr, "gate_fpr": gate_fpr, "max_forgetting": max_forgetting,
        "map_windows": map_windows, "curriculum": curriculum, "config": config, "trainer": trainer, "seed": seed,
        "map_after": map_after, "progress": progress,
    }  # fmt: skip
    check_arguments(given)
    # JSON knows no numbers of numpy's
    read = {name: plain_form(value) for name, value in given.items()}
    check_causal(model)
    check_grown(model)
    earlier = adapters_of(model)
    if max_forgetting is not None and retain is None:
        raise ValueError(f"max_forgetting={max_forgetting} is about retain text: give retain=, or 'self'")
    spared = by_name(retain)
    itself = [name for name, text in spared.items() if isinstance(text, str)]
    if wrong := [name for name in itself if spared[name] != "self"]:
        where = "" if wrong[0] == RETAIN else f"[{wrong[0]!r}]"
        raise ValueError(
            f"retain{where}={spared[wrong[0]]!r} is a string: give text whose loss must not rise, or 'self'"
        )
    if len(itself) > 1:
        raise ValueError(
            f"retain says 'self' of {' and '.join(map(repr, itself))}, which would be one text: say it once"
        )
    limit = FORGETTING if max_forgetting is None and retain is not None else read["max_forgetting"]
    folder, config, trainer = Path(output_dir), dict(config or {}), dict(trainer or {})
    check_folder(folder)
    corpora = (tokenizer, length, batch_size)
    texts = None if itself else read_texts(train_on, heldout, spared or None, *corpora)
    with alone(folder), as_it_was(model):
        shapes, before = Shapes.of(model, find_experts(model)), Spent()
        if texts is None:
            with Meter(shapes, before).phase(WRITING, model):
                written = _written(model, folder, length, seed, progress)
            spared |= dict.fromkeys(itself, written)
            texts = read_texts(train_on, heldout, spared, *corpora)
        shaping = {name: value for name, value in read.items() if name not in BESIDE} | {
            "max_forgetting": limit, "texts": texts.digest(), "weights": weights_in_use(model),
            # one form of what can be said in several
            "config": {name: getattr(PCGrowConfig(**config), name) for name in config}, "trainer": trainer,
        }  # fmt: skip
        journal = open_journal(folder, plain_form(shaping))
        settings = Settings(
            **{name: read[name] for name in SETTINGS}, most_forgetting=limit, config=config,
            trainer={**trainer, "seed": read["seed"]}, callbacks=tuple(callbacks), shapes=shapes,
            rounds_before=max([1 if name == "default" else int(name[6:]) for name in earlier], default=0),
        )  # fmt: skip
        if not journal.before:
            with Meter(shapes, before).phase(LOOKING, model):
                journal.before = losses_of(model, texts, batch_size)
            journal.spent["0"] = before
            journal.save()
        training = model.training
        kept = [done.adapter for done in journal.kept]
        grown = load_grown(model, folder / ADAPTER, kept) if kept else model
        while not journal.ended and len(journal.rounds) < rounds:
            grown = run_round(grown, texts, settings, journal)
        if not journal.ended:
            journal.ended = f"{rounds} rounds are done"
            journal.save()
        _tell_card(grown, journal)
        if map_after:
            measure_last(grown, texts, settings, journal)
        shown = tuple(window["input_ids"].tolist() for window in drawn(texts.heldout, SHOWN))
        return GrowthResult.of(at_rest(grown, training), journal, tokenizer, shown)


def _tell_card(model: nn.Module, journal: Journal) -> None:
    """Put the run's numbers on the card beside the adapters, and on those that the caller saves elsewhere."""
    if journal.kept and isinstance(model, PeftModel):
        measured = measured_by(journal)
        for done in journal.kept:
            model.peft_config[done.adapter].run = measured  # type: ignore[union-attr]
        save_card(journal.folder / ADAPTER, measured)


def _written(model: nn.Module, folder: Path, length: int, seed: int, progress: bool) -> torch.Tensor:
    """Retain text by the model itself, written once for a run, `[N, length]`."""
    path = folder / WRITTEN
    if not path.exists():
        texts = torch.cat(sample_text(model, TEXTS_WRITTEN, length, seed=seed, progress=progress))
        write_whole(path, save({"input_ids": texts}))
    return load_file(path)["input_ids"]
