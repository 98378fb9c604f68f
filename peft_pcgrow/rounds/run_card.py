"""What a run says of itself on the card of what it grew."""

from pathlib import Path

from peft_pcgrow.adapter.model_card import Measured, folder_of, sealed_as
from peft_pcgrow.maps import map_file
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.rounds.journal import ADAPTER, Journal, risen
from peft_pcgrow.rounds.texts import RETAIN


def measured_by(journal: Journal) -> Measured:
    """The numbers of a run that kept something, and which adapters they are of."""
    return Measured(_text(journal), {name: sealed_as(place) for name, place in places_of(journal).items()})


def places_of(journal: Journal) -> dict[str, Path]:
    """Folders of the adapters that a run has kept, by name, the first that was grown first."""
    root = journal.folder / ADAPTER
    return {done.adapter: folder_of(root, done.adapter) for done in journal.kept}


def draw_map(journal: Journal, path: Path) -> bool:
    """The first map of a run, as a picture; False: there is no such map, or no matplotlib."""
    place = journal.at(1) / "map"
    if not map_file.exists(place):
        return False
    try:
        ErrorMap.load(place).plot(path)
    except ImportError:
        return False
    return True


def _text(journal: Journal) -> str:
    last, before = journal.kept[-1], journal.before
    lines = [
        "## What it brings",
        "",
        "Losses of text that no weight was trained on and no gate was fitted on, nats per token:",
        "",
        "| text | base | grown | |",
        "|---|---|---|---|",
        f"| held out, of the domain | {before['heldout']:.4f} | {last.heldout:.4f} | "
        f"gain {before['heldout'] - last.heldout:.4f} |",
    ]
    if last.retain is not None:
        lines.append(
            f"| retain text{', mean' * bool(last.retained)} | {before[RETAIN]:.4f} | {last.retain:.4f} | "
            f"forgetting {last.retain - before[RETAIN]:+.4f} |"
        )
        lines += [
            f"| {_cell(name)} | {before[key]:.4f} | {last.retained[key]:.4f} | {rise:+.4f} |"
            for (name, rise), key in zip(risen(before, last.retained).items(), last.retained, strict=True)
        ]
    else:
        lines += ["", "There was no retain text: what was forgotten is not known."]
    lines += [
        "",
        "The best look of each round, and how strict its gates are, were chosen on these texts, which makes both a "
        "little too good. No control (LoRA on the same text, for example) was part of this run.",
        "",
        "| round | what grew | nodes | why | steps | learning rate | gate_fpr | held out | retain | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for done in journal.rounds:
        rate, retain = ("-" if each is None else f"{each:.4g}" for each in (done.gate_fpr, done.retain))
        why, outcome = map(_cell, (done.why, done.outcome))
        lines.append(
            f"| {done.number} | {done.growth} | {done.nodes} | {why} | {done.steps} | {done.lr:.3g} | {rate} | "
            f"{done.heldout:.4f} | {retain} | {'kept' if done.kept else 'taken back'}: {outcome} |"
        )
    taken: dict[str, float] = {}
    for done in journal.rounds:
        for phase, seconds in done.seconds.items():
            taken[phase] = taken.get(phase, 0.0) + seconds
    lines += [
        "",
        f"Ended: {journal.ended or 'not yet, this run was interrupted'}.",
        "",
        f"Cost: {sum(taken.values()):.0f} s ({', '.join(f'{phase} {held:.0f}' for phase, held in taken.items())}), "
        f"{sum(done.steps for done in journal.rounds)} steps up to the best looks; "
        f"{sum(done.parameters for done in journal.kept):,} parameters trained.",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text as a Markdown table holds it."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
