"""A picture beside the CSV: every measured ratio with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.figure import Figure
from flex.loss_plot import save_figure


def plot(figures: Sequence[Figure], image: Path) -> bool:
    """Ratios ours / peer on a logarithmic axis, aims as ticks; False if there is none.

    Draws without pyplot: no display and no global state.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    rows = [f for f in figures if f.ratio is not None]
    if not rows:
        return False
    drawing = Drawing(figsize=(10, 1.2 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    for y, row in enumerate(rows):
        axes.plot([row.ratio_low, row.ratio_high], [y, y], color="tab:blue", linewidth=2)
        axes.plot(row.ratio, y, "o", color="tab:blue", markersize=5)
        if row.aim is not None:
            axes.plot(row.aim, y, "|", color="tab:red", markersize=14)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    labels = [f"{r.suite}: {r.name}, {r.shape}, {r.dtype} | {r.variant}" for r in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ours / peer, 95 % interval; red: the aim")
    save_figure(drawing, image)
    return True
