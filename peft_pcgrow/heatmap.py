"""A layer x expert picture, as text and as a matplotlib figure."""

import os
from collections.abc import Sequence
from pathlib import Path

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
    width = min(18.0, max(6.0, 2.6 + 0.26 * experts))
    height = min(16.0, max(2.8, 1.5 + 0.3 * layers))
    # a Figure of its own, without pyplot: no window, no global state
    figure = Figure(figsize=(width, height), layout="constrained")
    cells, sums = figure.subplots(1, 2, width_ratios=[max(4, experts / 4), 1], sharey=True)
    image = cells.imshow(100 * values, aspect="auto", cmap="magma", origin="lower", vmin=0)
    for row, column in marked:
        cells.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#4fd1ff", linewidth=1.6))
    cells.set_xlabel("expert")
    cells.set_ylabel("layer")
    step = max(1, layers // 16)
    cells.set_yticks(range(0, layers, step), [str(rows[i]) for i in range(0, layers, step)])
    column_step = max(1, experts // 16)
    cells.set_xticks(range(0, experts, column_step))
    sums.barh(range(layers), 100 * values.sum(axis=1), color="#b5367a")
    sums.set_xlabel("% in the layer")
    for side in ("top", "right"):
        sums.spines[side].set_visible(False)
    figure.colorbar(image, ax=sums, label="% of the whole model", fraction=0.4)
    figure.suptitle(title if not subtitle else f"{title}\n", fontsize=12)
    if subtitle:
        figure.text(0.5, 0.985 - 0.34 / height, subtitle, ha="center", va="top", fontsize=7.5, color="#555555")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
