"""One HTML page on a run of `grow`, for whoever was not there: what was asked, what grew, what it brought and took.

It is the page of the run's maps (see `maps.draw_html`) with the run's story above the panels. All text is escaped.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from peft_pcgrow.maps import draw_html
from peft_pcgrow.rounds.decision import RoundDecision
from peft_pcgrow.rounds.energy import RANK
from peft_pcgrow.rounds.journal import Round, listed, risen
from peft_pcgrow.rounds.pictures import nodes, texts_of
from peft_pcgrow.rounds.texts import RETAIN

STYLE = """
.story { max-width: 62rem; margin: 0 0 2rem; }
.story section { margin: 1.6rem 0; }
.story h2 { margin: 0 0 .4rem; font-size: 1.2rem; }
.story h3 { margin: 0 0 .2rem; font-size: 1rem; }
.story p { margin: 0 0 .5rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.tile { flex: 1 1 9rem; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 8px; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.25; }
.tile span { color: var(--soft); font-size: .85rem; }
.round { margin: .7rem 0; padding: .8rem 1rem; border: 1px solid var(--line); border-left: 4px solid #238b57;
  border-radius: 8px; }
.round.back { border-left-color: #c4510a; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .3rem 1rem;
  margin: .5rem 0; }
.facts div { min-width: 0; overflow-wrap: anywhere; }
.facts span { display: block; color: var(--soft); font-size: .8rem; }
.path { display: block; width: 100%; max-width: 34rem; height: auto; font: 11px system-ui, sans-serif; }
.path text { fill: var(--soft); }
.path .label { fill: var(--ink); font-weight: 600; }
.path .grid { stroke: var(--line); }
.path .limit { stroke: #c4510a; stroke-dasharray: 5 4; }
.path .way { fill: none; stroke: #2474b7; stroke-width: 2; }
.path .kept { fill: #2474b7; }
.path .back { fill: var(--paper); stroke: #c4510a; stroke-width: 2; }
.written { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .5rem 1.2rem;
  margin: 0 0 1.2rem; padding: 0 0 1rem; border-bottom: 1px solid var(--line); }
.written blockquote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.written .given { grid-column: 1 / -1; }
.written span { display: block; color: var(--soft); font-size: .8rem; }
.bar { display: block; height: .55rem; min-width: 2px; border-radius: 2px; background: #2474b7; }
.story th[scope=row] { min-width: 9rem; text-align: left; }
"""
# what arguments are, for whoever reads of them first
ASKED = {
    "rounds": "rounds at most",
    "budget": "of the expert parameters may grow in a round",
    "max_forgetting": "nats per token that other text's loss may rise by, of several texts each one's",
    "length": "tokens of a window of text",
    "batch_size": "windows of a training step",
    "epochs": "passes over the text in a round, at most",
    "max_steps": "steps of a round, at most",
    "lr": "learning rate",
    "gate_fpr": "of other text's tokens may pass a gate in training",
    "map_windows": "windows that maps are measured on",
    "curriculum": "whether the least surprising text comes first",
    "config": "further settings of the adapter",
    "trainer": "further settings of the Trainer",
    "seed": "of what is drawn at random",
}
GROWTH = {
    "spawn": "newborns: copies beside experts, which take over only the tokens that look like this domain",
    "deepen": "experts themselves were trained on, for all tokens that come to them",
    "auto": "newborns beside some experts; others, which other text barely uses, were trained on themselves",
}


def draw(result: Any, domain: str) -> bytes:
    """The page of a GrowthResult as UTF-8 HTML."""
    shown = nodes(result.journal, f"{domain}: what growing did")
    facts = "".join(f"<p>{escape(line)}</p>" for line in (MAPS, *shown.facts, shown.top))
    parts = [_short(result), _asked(result), _rounds(result), _path(result), _texts(result), _taken(result)]
    stages = "".join(f"<li>{escape(name)}: {escape(meaning)}</li>" for name, meaning in shown.stages)
    facts += f"<details open><summary>The stages of a lifecycle</summary><ul>{stages}</ul></details>"
    story = f'<div class="story">{"".join(parts)}{_section("Where it grew", facts)}</div>'
    page = replace(shown, facts=[f"One run of peft_pcgrow.grow: a model learned {domain}."], top="")
    return draw_html.draw(page, story, STYLE)


MAPS = (
    "Each panel is a map of the model: a row for each layer, the lowest at the bottom, a cell for each expert. Error "
    "is how hard the loss pulls at what an expert puts out: it is high where the text comes out wrong. Point at a cell "
    "for its numbers."
)


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _short(result: Any) -> str:
    before, after = result.before["heldout"], result.after["heldout"]
    tiles = [
        (f"{result.gain:+.3f}", "gain: nats per token that unseen text of the domain is predicted better by"),
        (f"{math.exp(min(before, 50)):.4g} → {math.exp(min(after, 50)):.4g}", "words that the model hesitates between"),
    ]
    if result.forgetting is not None:
        tiles.append((f"{result.forgetting:+.3f}", "forgetting: nats per token that other text is predicted worse by"))
    kept = sum(done.kept for done in result.rounds)
    tiles.append((f"{kept} of {len(result.rounds)}", "rounds of growth were kept"))
    if result.size:
        tiles.append((_si(result.size, "B"), "takes the adapter, the only thing that is new: the model is as it was"))
    drawn = "".join(f'<div class="tile"><b>{escape(head)}</b><span>{escape(text)}</span></div>' for head, text in tiles)
    loss = (
        f"Loss on the domain's unseen text: {before:.3f} before, {after:.3f} after (nats per token; lower is better)."
    )
    if len(each := result.forgetting_by_text) > 1:
        loss += f" Forgetting by text: {listed(each)}."
    return f'<div class="tiles">{drawn}</div><p>{escape(loss)} The run ended: {escape(result.ended or "not yet")}.</p>'


def _asked(result: Any) -> str:
    asked = {name: value for name, value in result.journal.asked.items() if name in ASKED and value not in (None, {})}
    text = "There was no other text to spare." if "retain" not in result.before else "Other text was to be spared."
    return _section("What was asked", f"<p>{text}</p>", _facts({name: (asked[name], ASKED[name]) for name in asked}))


def _facts(facts: Mapping[str, tuple[Any, str]]) -> str:
    cells = []
    for name, (value, meaning) in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        cells.append(f"<div><b>{escape(shown)}</b> <span>{escape(name)}: {escape(meaning)}</span></div>")
    return f'<div class="facts">{"".join(cells)}</div>'


def _rounds(result: Any) -> str:
    if not result.rounds:
        return _section("What grew", "<p>Nothing: the first look ended the run.</p>")
    return _section("What grew", *(_round(result, done) for done in result.rounds))


def _round(result: Any, done: Round) -> str:
    facts = {
        "held-out": (done.heldout, "loss of the domain's unseen text afterwards"),
        "nodes": (done.nodes, "experts that grew"),
        "parameters": (f"{done.parameters:,}", "that were trained"),
        "steps": (done.steps, "of training, up to the best look"),
        "lr": (done.lr, "learning rate"),
    }
    if done.retain is not None:
        facts["retain"] = (done.retain, "loss of other text afterwards")
    if done.gate_fpr is not None:
        facts["gate_fpr"] = (done.gate_fpr, "of other text may still pass the gates")
    if done.protect:
        facts["protect"] = (done.protect, "of what other text puts in was kept off the updates")
    path, where = result.journal.at(done.number) / "decision.json", ""
    if path.is_file():
        decision = RoundDecision.load(path)
        verdict = f" (the verdict on the map: {decision.verdict})" if decision.verdict else ""
        listed = "".join(
            f"<li>layer {escape(str(layer))}: {', '.join(map(str, experts))}</li>"
            for layer, experts in decision.locus.items()
        )
        where = f"<details><summary>Where</summary><ul>{listed}</ul></details>" if listed else ""
    else:
        verdict = ""
    kept = "kept" if done.kept else "taken back"
    return (
        f'<div class="round{"" if done.kept else " back"}"><h3>Round {done.number}, {kept}: {escape(done.outcome)}</h3>'
        f"<p>{escape(done.growth)}: {escape(GROWTH.get(done.growth, ''))}. Why there: {escape(done.why + verdict)}.</p>"
        f"{_facts(facts)}{where}</div>"
    )


def _path(result: Any) -> str:
    """Gain against forgetting over the rounds, or over their numbers where nothing was to be spared."""
    if not result.rounds:
        return ""
    spared = result.forgetting is not None
    points = [(0.0, 0.0, "base", True)]
    for done in result.rounds:
        rises = risen(result.before, done.retained or {RETAIN: done.retain}) if done.retain is not None else {}
        lost = max(rises.values(), default=float(done.number))
        points.append((lost, result.before["heldout"] - done.heldout, f"round {done.number}", done.kept))
    limit = result.journal.asked.get("max_forgetting") if spared else None
    limit = limit if isinstance(limit, (int, float)) and limit >= 0 else None
    across = [x for x, *_ in points] + ([] if limit is None else [float(limit)])
    label = "forgetting: rise of other text's loss" if spared else "round"
    label += ", the largest" * (len(result.forgetting_by_text) > 1)
    said = "Up is better, and left is better. " if spared else "Up is better. "
    said += "Filled: kept; hollow: taken back" + ("; dashed: as much as was allowed." if limit is not None else ".")
    return _section("The way there", f"<p>{said}</p>", _chart(points, across, limit, label))


def _chart(points: Sequence[tuple[float, float, str, bool]], across: list[float], limit: float | None, x: str) -> str:
    left, right, top, bottom = 46.0, 346.0, 12.0, 216.0
    (low, high), (least, most) = _span(across), _span([gain for _, gain, *_ in points])

    def at(value: float, gain: float) -> tuple[float, float]:
        return (
            left + (value - low) / (high - low) * (right - left),
            bottom - (gain - least) / (most - least) * (bottom - top),
        )

    drawn = []
    for tick in _ticks(least, most):
        y = at(low, tick)[1]
        drawn.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(low, high):
        place = at(tick, least)[0]
        drawn.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}"/>')
        drawn.append(f'<text x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
    if limit is not None:
        place = at(limit, least)[0]
        drawn.append(f'<line class="limit" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}"/>')
    way = " ".join("{:.1f},{:.1f}".format(*at(*point[:2])) for point in points if point[3])
    drawn.append(f'<polyline class="way" points="{way}"/>')
    placed = [at(*point[:2]) for point in points]
    drawn += [
        f'<circle class="{"kept" if point[3] else "back"}" cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="5"/>'
        for spot, point in zip(placed, points, strict=True)
    ]
    # boxes that no label may lie on: first the points, then the labels that are there already
    taken = [(spot[0] - 6, spot[0] + 6, spot[1] - 6, spot[1] + 6) for spot in placed]
    for (place, y), (_, _, name, _) in zip(placed, points, strict=True):
        wide = 6.5 * len(name)
        # to the side with more room, and down until there is some
        start = place - 9 - wide if place > (left + right) / 2 else place + 9
        while any(start < b and start + wide > a and y - 5 < d and y + 5 > c for a, b, c, d in taken):
            y += 3
        taken.append((start, start + wide, y - 5, y + 5))
        drawn.append(f'<text class="label" x="{start:.1f}" y="{y + 4:.1f}">{escape(name)}</text>')
    drawn.append(f'<text x="{(left + right) / 2}" y="{bottom + 33}" text-anchor="middle">{escape(x)}</text>')
    middle = (top + bottom) / 2
    turned = f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">gain, nats per token</text>'
    return (
        f'<svg class="path" viewBox="0 0 360 256" role="img" aria-label="gain over {escape(x)}">'
        f"{turned}{''.join(drawn)}</svg>"
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.12 * (high - low) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Four or so round numbers between two others."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough)
    return [round(step * place, 12) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _texts(result: Any) -> str:
    found = texts_of(result)
    if not found:
        return ""
    shown = []
    for each in found:
        parts = {"given": "beginning of an unseen text", "really": "how it really goes on"}
        parts |= {"before": "the model before growing", "after": "the model after growing"}
        cells = "".join(
            f'<div class="{name}"><span>{title}</span><blockquote>{escape(each[name].strip())}</blockquote></div>'
            for name, title in parts.items()
        )
        shown.append(f'<div class="written">{cells}</div>')
    return _section("What it writes", "<p>Always the likeliest next word, so nothing is drawn at random.</p>", *shown)


def _taken(result: Any) -> str:
    energy = result.energy
    operations = {} if energy is None else energy.operations
    joules = {} if energy is None else energy.joules
    total = sum(operations.values()) or 1.0
    head = ["time", *(["operations"] if operations else []), *(["energy"] if joules else [])]
    rows = []
    for phase in {**result.seconds, **operations}:
        bar, cells = "", [_time(result.seconds.get(phase, 0.0))]
        if operations:
            bar = f'<span class="bar" style="width:{operations.get(phase, 0.0) / total:.1%}"></span>'
            cells.append(_si(operations.get(phase, 0.0), ""))
        if joules:
            cells.append(_si(joules.get(phase, 0.0), "J"))
        drawn = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(phase)}{bar}</th>{drawn}</tr>')
    headed = "".join(f'<th scope="col">{name}</th>' for name in ("phase", *head))
    table = f'<div class="scroll"><table><thead><tr>{headed}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    if energy is None:
        return _section("What it took", table)
    said = f"An operation is one addition or multiplication of two numbers; there were {_si(total, '')}."
    if energy.full and energy.lora:
        said += (
            f" To train on the same tokens, with the same looks, takes {_si(energy.full, '')} where all parameters "
            f"train, and {_si(energy.lora, '')} with LoRA of rank {RANK}; here, training took "
            f"{_si(operations.get('training', 0.0), '')} of them, and the rest went into finding out where, how fast "
            "and how far."
        )
    return _section("What it took", f"<p>{said}</p>", table)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _si(value: float, unit: str) -> str:
    """With a prefix of thousands."""
    power = 0 if value < 1000 else min(int(math.log10(value) // 3), 8)
    names = ("", "thousand", "million", "billion", "trillion", "quadrillion", "quintillion", "10²¹", "10²⁴")
    name = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")[power] + unit if unit else names[power]
    return f"{value / 1000**power:.3g} {name}".strip()
