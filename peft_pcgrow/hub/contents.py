"""What of a folder is to be shipped: the adapters that a run kept, or those that were saved by hand."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from peft_pcgrow.adapter.model_card import CARD, NAMELESS, PICTURE, SPELLED_OUT, UNMEASURED, adapters_in, make_card
from peft_pcgrow.adapter.register import NAME
from peft_pcgrow.files import write_whole
from peft_pcgrow.rounds.journal import ADAPTER, JOURNAL, Journal, read_journal
from peft_pcgrow.rounds.load import rounds_in
from peft_pcgrow.rounds.run_card import draw_map, measured_by, places_of


@dataclass(frozen=True)
class Grown:
    """Adapters in a folder.

    Attributes:
        folder: of the first. places: of each, by name, in the order that they grew in. journal: of their run; None:
            there is none, or it is about others.
    """

    folder: Path
    places: Mapping[str, Path]
    journal: Journal | None

    @property
    def measured(self) -> str:
        """What is known of them, for a card."""
        return UNMEASURED if self.journal is None else measured_by(self.journal).text

    @property
    def base(self) -> tuple[str | None, str | None]:
        """The name that their base was loaded by, and its revision."""
        config = json.loads((next(iter(self.places.values())) / CONFIG_NAME).read_text())
        return config.get("base_model_name_or_path"), config.get("revision")


def find_grown(folder: str | Path) -> Grown:
    """What was grown in a folder: of an adapter, or of a run of `grow`.

    Raises:
        FileNotFoundError: no such folder, or no adapter in it. ValueError: a run that kept nothing, adapters of another
            method, or files that are missing or cannot be read.
    """
    given = Path(folder)
    if not given.is_dir():
        raise FileNotFoundError(f"{given} is no folder: give that of an adapter, or of a run of grow")
    run = next((each for each in (given, given.parent) if (each / JOURNAL).is_file()), None)
    if run == given or (run is not None and given.name == ADAPTER):
        journal = read_journal(run)  # type: ignore[arg-type]
        if not journal.kept:
            raise ValueError(f"the run in {run} has kept nothing ({journal.ended or 'it has not ended'}): grow again")
        places = places_of(journal)
    else:
        journal, places = None, rounds_in(given)
        if not places:
            others = ", ".join(adapters_in(given))
            hint = f"it has those of {others} below, give one of these" if others else "save_pretrained writes one"
            raise FileNotFoundError(f"{given} has no {CONFIG_NAME}, so there is no adapter in it: {hint}")
    configs = [_config(place) for place in places.values()]
    if (configs[0].get("lineage") or {}).get("elders"):
        raise ValueError(
            f"{given} grew from newborns of other adapters, which it needs: give the folder that holds all"
        )
    return Grown(next(iter(places.values())), places, journal)


def _config(place: Path) -> dict[str, Any]:
    path = place / CONFIG_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error or 'empty'}): the adapter was not saved to its end") from None
    if kind not in (NAME, SPELLED_OUT):
        raise ValueError(f"{place} holds an adapter of the method {kind}, not of {NAME}: push it with PEFT")
    return found


def write_card(grown: Grown, folder: Path, measured: str, repo: str = NAMELESS) -> str:
    """Write the card, and the picture of the run's map where there can be one, into a folder that has the adapters."""
    if grown.journal is not None:
        draw_map(grown.journal, folder / PICTURE)
    text = make_card(folder, measured, repo)
    write_whole(folder / CARD, text.encode())
    return text
