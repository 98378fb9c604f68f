"""A layer x expert picture, as text and as a matplotlib figure."""

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

BLOCKS = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float]) -> str:
    """One character per value in 0..1."""
    return "".join(BLOCKS[min(len(BLOCKS) - 1, round(max(0.0, v) * (len(BLOCKS) - 1)))] for v in values)


def draw(
    values,
    rows: Sequence[int],
    title: str,
    subtitle: str = "",
    marked: Sequence[tuple[int, int]] = (),
    path: str | os.PathLike | None = None,
):
    """Heat map of `values [L, E]` with a bar of row sums beside it; the cells in `marked` (row, column) are outlined.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'peft-pcgrow[plot]'") from error
    layers, experts = values.shape
    # all sizes in inches
    width = min(18.0, max(6.0, 2.6 + 0.26 * experts))
    lines = wrap(subtitle, int(15.5 * width))
    high = min(14.5, max(2.0, 0.45 + 0.3 * layers))
    foot, head = 0.55, 0.5 + 0.15 * len(lines)
    height = foot + high + head
    # a Figure of its own, without pyplot: no window, no global state
    figure = Figure(figsize=(width, height))
    beside = min(2.0, 0.16 * width)
    left, right = 0.65, 0.95
    wide = width - left - right - beside - 0.12
    places = (left, wide), (left + wide + 0.12, beside), (width - right + 0.1, 0.16)
    cells, sums, scale = (figure.add_axes((x / width, foot / height, w / width, high / height)) for x, w in places)
    image = cells.imshow(100 * values, aspect="auto", cmap="magma", origin="lower", vmin=0, interpolation="nearest")
    line = 1.6 if experts <= 48 else 0.7
    for row, column in marked:
        cells.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#4fd1ff", linewidth=line))
    cells.set_xlabel("expert")
    cells.set_ylabel("layer")
    step = max(1, -(-layers // 16))
    cells.set_yticks(range(0, layers, step), [str(rows[i]) for i in range(0, layers, step)])
    cells.set_xticks(range(0, experts, max(1, -(-experts // 16))))
    sums.barh(range(layers), 100 * values.sum(axis=1), color="#b5367a")
    sums.set_xlabel("% in the layer")
    sums.set_ylim(cells.get_ylim())
    sums.set_yticks([])
    for side in ("top", "right"):
        sums.spines[side].set_visible(False)
    figure.colorbar(image, cax=scale).set_label("% of the whole model", fontsize=8.5)
    figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", fontsize=12)
    for place, text in enumerate(lines):
        above = 1 - (0.36 + 0.15 * place) / height
        figure.text(0.5, above, text, ha="center", va="top", fontsize=7.5, color="#555555", parse_math=False)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
