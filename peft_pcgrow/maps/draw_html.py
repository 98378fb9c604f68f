"""A page as one HTML file that needs nothing else: no network, no library.

`page.html` is the frame: its script draws the panels from JSON arrays; without JavaScript the tables stay.
"""

import json
import math
from html import escape
from importlib.resources import files

from torch import Tensor

from peft_pcgrow.maps.draw import HUES, NOWHERE, STAGE_COLOURS, Column, Page, limits, outline

# digits of the numbers in the file: 48 x 128 nodes stay below 1.5 MB
DIGITS = 6


def draw(page: Page, story: str = "", style: str = "") -> bytes:
    """The page as UTF-8 HTML. Text is escaped, so that no marker of the frame can come from it.

    Args:
        story: HTML that stands above the panels. style: of it, CSS.
    """
    frame = files("peft_pcgrow.maps").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "style": style,
        "story": story,
        "title": escape(page.title),
        "facts": "\n".join(f"<p>{escape(line)}</p>" for line in page.facts),
        "top": escape(page.top),
        "nodes": _node_table(page),
        "layers": _layer_table(page),
        # the text of a script ends at the first "</", whatever JSON says
        "data": json.dumps(_data(page), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    for name, text in parts.items():
        frame = frame.replace(f"<!--{name}-->", text)
    return frame.encode()


def _data(page: Page) -> dict:
    return {
        "layers": list(page.layers),
        "experts": page.located.shape[1],
        "located": page.located.flatten().int().tolist(),
        "present": page.present.flatten().int().tolist(),
        "outline": outline(page.located),
        "hues": HUES,
        "nowhere": NOWHERE,
        "stages": [
            {"name": name, "meaning": meaning, "colour": colour}
            for (name, meaning), colour in zip(page.stages, STAGE_COLOURS, strict=False)
        ],
        "columns": [
            {
                "name": column.name,
                "label": column.label,
                "values": _numbers(column.values),
                "hue": column.hue,
                "explanation": column.explanation,
                "percent": column.percent,
                "bars": None if column.bars is None else _numbers(column.bars),
                "barsLabel": column.bars_label,
                "limits": [_number(limit) for limit in limits(column)] if column.hue else None,
            }
            for column in page.columns
        ],
    }


def _numbers(values: Tensor) -> list[float | int | None]:
    return [_number(value) for value in values.double().flatten().tolist()]


def _number(value: float) -> float | int | None:
    """To `DIGITS` digits, whole numbers as such; None for what JSON has no number for."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.{DIGITS}g}")


def _node_table(page: Page) -> str:
    head = "".join(f'<th scope="col">{escape(column.label)}</th>' for column in page.columns)
    rows = []
    for row, expert in page.top_nodes:
        cells = "".join(f"<td>{_shown(page, column, row, expert)}</td>" for column in page.columns)
        rows.append(f'<tr><th scope="row">{escape(f"{page.layers[row]}.{expert}")}</th>{cells}</tr>')
    return f'<thead><tr><th scope="col">node</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'


def _shown(page: Page, column: Column, row: int, expert: int) -> str:
    value = float(column.values[row, expert])
    if column.hue == "stages":
        return escape(page.stages[int(value)][0])
    if not math.isfinite(value):
        return "&ndash;"
    if column.percent:
        return f"{value:.2%}"
    return f"{int(value):,}" if value == int(value) else f"{value:.4g}"


def _layer_table(page: Page) -> str:
    barred = [column for column in page.panels if column.bars is not None]
    head = "".join(f'<th scope="col">{escape(f"{c.label}, {c.bars_label}")}</th>' for c in barred)
    rows = []
    for row, layer in enumerate(page.layers):
        values = [(c.percent, float(c.bars[row])) for c in barred if c.bars is not None]
        cells = "".join(f"<td>{f'{value:.2%}' if percent else f'{value:.4g}'}</td>" for percent, value in values)
        rows.append(f'<tr><th scope="row">{escape(str(layer))}</th>{cells}</tr>')
    return f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
