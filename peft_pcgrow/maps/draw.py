"""One page of layer x expert panels: what it holds, and its drawing by matplotlib. `page_html` draws the same page.

Shapes: L layers with experts, E experts.
"""

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from torch import Tensor

SUFFIXES = (".html", ".png", ".pdf", ".svg")
# light to dark, each of one hue: their order survives colour blindness and grey print
HUES = {
    "orange": ("#fff6ec", "#fdc98f", "#f48a3a", "#c4510a", "#6b2503"),
    "blue": ("#f2f7fd", "#bcd7ee", "#6aaed6", "#2474b7", "#08306b"),
    "purple": ("#f7f5fa", "#d0cfe6", "#9f98c9", "#6f52a2", "#3a0d6f"),
    "green": ("#f1f9f2", "#bfe3c3", "#72c08a", "#238b57", "#00401f"),
    # blue and brown differ for every kind of colour vision
    "change": ("#1b5fa5", "#8fbfe0", "#f5f5f5", "#e9b16e", "#9a4d05"),
}
# of the stages of lifecycle.STAGES, after Okabe and Ito, and of what is compressible
STAGE_COLOURS = ("#dfe2e6", "#b9a7d3", "#e69f00", "#56b4e9", "#00795a", "#cc79a7")
NOWHERE = "#cfd2d6"
INK = "#444444"
# above this quantile of its values a panel's colours do not tell apart: a few nodes must not bleach thousands
TOP_QUANTILE = 0.995


@dataclass(frozen=True)
class Column:
    """One number of every node.

    Attributes:
        name: key of the column. label: what it is called. values: `[L, E]`.
        hue: of the panel that shows it, a key of `HUES`, or "stages"; "": no panel, a tooltip only.
        explanation: one line below the panel's title.
        percent: the values are shares, shown in per cent.
        bars: one number per layer for the bars beside the panel, `[L]`; None: no bars. bars_label: what they are.
    """

    name: str
    label: str
    values: Tensor
    hue: str = ""
    explanation: str = ""
    percent: bool = False
    bars: Tensor | None = None
    bars_label: str = ""


@dataclass(frozen=True)
class Page:
    """What a page shows, whatever draws it.

    Attributes:
        title, facts: heading and the lines below it. top: the line of the top nodes.
        layers: decoder layer of each row. columns: all numbers; those with a hue have a panel, in this order.
        present: nodes that a row was routed to, `[L, E]` bool. located: nodes of the locus, `[L, E]` bool.
        stages: names and meanings of the values of the column "lifecycle".
        top_nodes: (row, expert) of the nodes with the most error, most first.
    """

    title: str
    facts: Sequence[str]
    top: str
    layers: Sequence[int]
    columns: Sequence[Column]
    present: Tensor
    located: Tensor
    stages: Sequence[tuple[str, str]]
    top_nodes: Sequence[tuple[int, int]]

    @property
    def panels(self) -> list[Column]:
        return [column for column in self.columns if column.hue]


def limits(panel: Column) -> tuple[float, float]:
    """Values of the first and the last colour of a panel."""
    if panel.hue == "stages":
        return -0.5, len(STAGE_COLOURS) - 0.5
    values = panel.values.double()
    values = values[values.isfinite()].abs().flatten().sort().values
    top = float(values[math.ceil(TOP_QUANTILE * (len(values) - 1))]) if len(values) else 0.0
    # where nearly all nodes are 0, the few others must show
    top = top or (float(values[-1]) if len(values) else 0.0) or 1.0
    return (-top if panel.hue == "change" else 0.0), top


def outline(located: Tensor) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Line segments (column, row) around the located nodes, none between two of them; cells are centred on integers."""
    rows, columns = located.shape
    inside = {(row, column) for row, column in located.nonzero().tolist()}
    found = []
    for row in range(rows + 1):
        for column in range(columns + 1):
            here = (row, column) in inside
            if here != ((row - 1, column) in inside):
                found.append(((column - 0.5, row - 0.5), (column + 0.5, row - 0.5)))
            if here != ((row, column - 1) in inside):
                found.append(((column - 0.5, row - 0.5), (column - 0.5, row + 0.5)))
    return found


def suffix_of(path: str | os.PathLike) -> str:
    """The suffix of a page's file, in lower case; ValueError if no page is drawn in that format."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot draw a page as {os.fspath(path)!r}: give a name that ends in {', '.join(SUFFIXES)}")
    return suffix


def rendered(drawn: Any, suffix: str) -> bytes:
    """A figure as a picture in the format of `suffix`."""
    content = io.BytesIO()
    drawn.savefig(content, format=suffix.removeprefix("."), dpi=150)
    return content.getvalue()


def figure(page: Page) -> Any:
    """The page as a matplotlib figure; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'peft-pcgrow[plot]'") from error
    panels = page.panels
    layers, experts = page.located.shape
    across = 2 if len(panels) in (2, 4) else min(3, len(panels))
    down = -(-len(panels) // across)
    # all sizes in inches; a panel is as large as its cells need, within what fits a wall
    wide = min(6.4, max(4.7, 2.4 + 0.045 * experts))
    high = 1.4 + min(3.6, max(1.5, 0.25 * min(layers, 8), 0.08 * layers))
    width = across * wide + 0.15
    title = wrap(page.title, int(7.5 * width))
    facts = [part for line in page.facts for part in wrap(line, int(13 * width))]
    top = wrap(page.top, int(13.5 * width))
    named = 0.5 + 0.28 * (len(title) - 1)
    head, foot = named + 0.12 + 0.22 * len(facts), 0.2 + 0.2 * len(top)
    height = down * high + head + foot
    # a Figure of its own, without pyplot: no window, no global state
    drawn = Figure(figsize=(width, height), facecolor="white")

    def say(text: str, above: float, **style: Any) -> None:
        drawn.text(0.18 / width, above / height, text, parse_math=False, va="top", **style)

    say("\n".join(title), height - 0.14, fontsize=15, weight="bold", color="#1a1a1a")
    for i, line in enumerate(facts):
        say(line, height - named - 0.22 * i, fontsize=9.5, color=INK)
    for i, line in enumerate(top):
        say(line, foot - 0.06 - 0.2 * i, fontsize=9, color=INK)
    for i, panel in enumerate(panels):
        left, low = 0.62 + wide * (i % across), height - head - high * (i // across + 1)
        cells = wide - 0.78

        def place(x: float, y: float, w: float, h: float, left: float = left, low: float = low, **options: Any) -> Any:
            return drawn.add_axes(((left + x) / width, (low + y) / height, w / width, h / height), **options)

        main = place(0, 0.88, 0.84 * cells, high - 1.4)
        sums = place(0.86 * cells, 0.88, 0.14 * cells, high - 1.4, sharey=main)
        _draw_panel(page, panel, main, sums, place(0, 0.34, 0.84 * cells, 0.09))
        if i % across == 0:
            main.set_ylabel("layer", fontsize=8.5)
    return drawn


def _draw_panel(page: Page, panel: Column, cells: Any, sums: Any, scale: Any) -> None:
    """A heat map into the axes `cells`, its bars into `sums`, its colour bar or legend into `scale`."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap
    from matplotlib.ticker import MaxNLocator

    layers, experts = page.located.shape
    staged, unit = panel.hue == "stages", 100.0 if panel.percent else 1.0
    if staged:
        colours = ListedColormap(STAGE_COLOURS)
    else:
        colours = LinearSegmentedColormap.from_list(panel.hue, HUES[panel.hue]).with_extremes(bad=NOWHERE)
    low, high = limits(panel)
    values = unit * panel.values.double()
    shown = values if staged else values.masked_fill(~page.present, float("nan"))
    image = cells.imshow(
        shown.numpy(), aspect="auto", cmap=colours, origin="lower", vmin=unit * low, vmax=unit * high,
        interpolation="nearest",
    )  # fmt: skip
    segments = outline(page.located)
    large = experts <= 48
    if large:
        cells.add_collection(LineCollection(segments, colors="white", linewidths=3.2, capstyle="projecting"))
    line = LineCollection(segments, colors="#111111", linewidths=1.5 if large else 0.7, capstyle="projecting")
    line.set_gid("locus")
    cells.add_collection(line)
    cells.set_title(panel.label, loc="left", fontsize=11.5, weight="bold", pad=17)
    cells.annotate(
        panel.explanation, (0, 1), xytext=(0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8,
        color=INK,
    )  # fmt: skip
    step = -(-layers // 12)
    cells.set_yticks(range(0, layers, step), [str(page.layers[i]) for i in range(0, layers, step)])
    cells.set_xticks(range(0, experts, max(1, 2 ** math.ceil(math.log2(experts / 8)))))
    cells.set_xlabel("expert", fontsize=8.5, labelpad=1)
    for axes in (cells, sums, scale):
        axes.tick_params(labelsize=8, length=2.5, color="#999999", labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    sums.tick_params(left=False, labelleft=False)
    sums.xaxis.set_major_locator(MaxNLocator(2))
    sums.set_xlabel(f"% {panel.bars_label}" if panel.percent else panel.bars_label, fontsize=8, labelpad=1)
    if staged:
        start = [0.0] * layers
        for code, (name, _) in enumerate(page.stages):
            counts = (panel.values == code).sum(1).tolist()
            label = f"{name} {sum(counts)}"
            sums.barh(range(layers), counts, left=start, color=STAGE_COLOURS[code], height=0.8, label=label)
            start = [a + b for a, b in zip(start, counts, strict=True)]
        scale.set_axis_off()
        handles, labels = sums.get_legend_handles_labels()
        scale.legend(
            handles, labels, loc="center left", bbox_to_anchor=(-0.01, 0), ncols=3, fontsize=8, frameon=False,
            handlelength=1, handletextpad=0.4, columnspacing=1, borderpad=0,
        )  # fmt: skip
        return
    if panel.bars is not None:
        bars = unit * panel.bars.double()
        sums.barh(
            range(layers), bars.numpy(), height=0.8, color=[colours(0.15 if b < 0 else 0.7) for b in bars.tolist()]
        )
        sums.axvline(0, color="#999999", linewidth=0.8)
    beyond = bool((panel.values.double().abs() > high).any())
    extend = "neither" if not beyond else "both" if low < 0 else "max"
    bar = cells.figure.colorbar(image, cax=scale, orientation="horizontal", extend=extend)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(6)
    if panel.percent:
        scale.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
