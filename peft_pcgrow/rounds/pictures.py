"""What the maps in a run's folder say about its rounds: the life of every node, and what held-out texts become."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as CONFIG
from torch import Tensor, nn

from peft_pcgrow.adapter.model_card import folder_of
from peft_pcgrow.files import write_whole
from peft_pcgrow.locus import Locus
from peft_pcgrow.maps import map_file
from peft_pcgrow.maps.batches import held_still
from peft_pcgrow.maps.draw import Column, Page
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.maps.lifecycle import COMPRESSIBLE, LIGHT, STAGES, course
from peft_pcgrow.maps.node_table import MEANINGS, contents, located
from peft_pcgrow.rounds.journal import ADAPTER, Journal
from peft_pcgrow.training.curriculum import adapters_off

TEXTS = "texts.json"
# what has no panel on the page of a run
ASIDE = ("frequency", "coherent", "separability")
# tokens of a held-out window that are given, and that are then written
GIVEN, WRITTEN = 24, 48
LIVES = [(name, MEANINGS[name]) for name in STAGES] + [
    (COMPRESSIBLE, f"one of the lightest nodes, which together hold at most {LIGHT:.0%} of the error: packed first")
]


def maps_of(journal: Journal) -> tuple[list[str], list[ErrorMap], list[Tensor]]:
    """What was measured, before the rounds and after those that were kept: what to call it, the maps, and what had
    grown until then, `[L, E]` bool.

    Raises:
        FileNotFoundError: the map from before the rounds is gone.
    """
    names, maps, grown = ["before"], [ErrorMap.load(journal.at(1) / "map")], []
    mask = torch.zeros_like(maps[0].count, dtype=torch.bool)
    grown.append(mask)
    for done in journal.kept:
        place = folder_of(journal.folder / ADAPTER, done.adapter) / CONFIG
        mask = mask | located(maps[0], Locus(json.loads(place.read_text())["locus"]))
        if map_file.exists(journal.at(done.number + 1) / "map"):
            names.append(f"after round {done.number}")
            maps.append(ErrorMap.load(journal.at(done.number + 1) / "map"))
            grown.append(mask)
    return names, maps, grown


def lives(journal: Journal, title: str) -> Page:
    """The stages of every node, a panel for each map."""
    names, maps, grown = maps_of(journal)
    panels = _stages(journal, names, maps, grown)
    facts = [f"{name}: {meaning}" for name, meaning in LIVES]
    facts += ["Bystanders, which did not grow, are relieved or the frontier; outlined: what grew"]
    present = maps[-1].with_newborns("frequency") > 0
    return Page(title, facts, "", maps[0].layers, panels, present, grown[-1], LIVES, ())


def nodes(journal: Journal, title: str) -> Page:
    """The map before and after, and the stages in between."""
    names, maps, grown = maps_of(journal)
    first, last = contents(maps[0], None, None), maps[-1]
    if len(maps) == 1:
        columns = first.columns
    else:
        first, columns = contents(last, maps[0], Locus(_locus(last, grown[-1]))), []
        for column in first.columns:
            if column.name in ("share", "removable"):
                columns.append(_before(maps[0], column.name))
                column = replace(column, label=f"{column.label} {names[-1]}")
            columns.append(column)
    shown = [replace(column, hue="") if column.name in ASIDE else column for column in columns]
    lives = _stages(journal, names, maps, grown)
    return replace(first, title=title, columns=lives + [c for c in shown if c.name != "lifecycle"], stages=LIVES)


def _stages(journal: Journal, names: list[str], maps: list[ErrorMap], grown: list[Tensor]) -> list[Column]:
    losses = {"before": journal.before["heldout"]} | {f"after round {r.number}": r.heldout for r in journal.kept}
    what = {name: f"held-out loss {loss:.3f} nats per token" for name, loss in losses.items()}
    return [
        Column(f"lifecycle {name}", f"Lifecycle {name}", stage, "stages", what[name], bars_label="experts")
        for name, stage in zip(names, course(maps, grown), strict=True)
    ]


def _before(emap: ErrorMap, name: str) -> Column:
    (found,) = [column for column in contents(emap, None, None).columns if column.name == name]
    return replace(found, name=f"{name} before", label=f"{found.label} before")


def _locus(emap: ErrorMap, mask: Tensor) -> dict[int, list[int]]:
    rows = {layer: row.nonzero().flatten().tolist() for layer, row in zip(emap.layers, mask, strict=True)}
    return {layer: row for layer, row in rows.items() if row}


def texts_of(result: Any) -> list[dict[str, str]]:
    """How the model goes on from the beginnings of some held-out windows, before and after, word by most likely word:
    `given`, what `really` follows, and what is written `before` and `after`. Written once for a folder."""
    path: Path = result.journal.folder / TEXTS
    if path.is_file():
        return _read(path)
    decode = getattr(result.tokenizer, "decode", None)
    model = result.model
    if decode is None or model is None or not hasattr(model, "generate"):
        return []
    found = []
    for window in result.windows:
        cut = min(GIVEN, len(window) // 2)
        parts = {"given": window[:cut], "really": window[cut : cut + WRITTEN]}
        with adapters_off(model):
            parts["before"] = _written(model, window[:cut])
        parts["after"] = _written(model, window[:cut])
        found.append({name: decode(ids, skip_special_tokens=True) for name, ids in parts.items()})
    if found:
        write_whole(path, (json.dumps(found, indent=1) + "\n").encode())
    return found


def _written(model: nn.Module, ids: list[int]) -> list[int]:
    given = torch.tensor([ids], device=next(model.parameters()).device)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": WRITTEN}
    with held_still(model), torch.no_grad():
        whole = model.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)  # type: ignore[operator]
    return whole[0, len(ids) :].tolist()


def _read(path: Path) -> list[dict[str, str]]:
    try:
        held = json.loads(path.read_text())
        wanted = ("given", "really", "before", "after")
        if not all(isinstance(each, Mapping) and all(isinstance(each[name], str) for name in wanted) for each in held):
            raise TypeError("no texts")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to have the texts written anew") from None
    return held
