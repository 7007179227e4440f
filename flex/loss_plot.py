"""metrics.jsonl -> loss.png: loss, validation and penalty over the steps of the whole run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_losses(metrics: Path, image: Path) -> bool:
    """Draw `metrics` into the PNG `image`, replacing it atomically; False if there is no step yet.

    Draws without pyplot, so that no display and no global state of matplotlib is touched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)

    def series(key: str) -> tuple[list[int], list[float]]:
        rows = [r for r in records if key in r]
        return [r["step"] for r in rows], [r[key] for r in rows]

    if not series("loss")[0]:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.plot(*series("loss"), label="training loss", linewidth=1)
    left.plot(*series("validation_loss"), "o-", label="validation loss", markersize=4)
    left.set_xlabel("optimizer step")
    left.set_ylabel("cross-entropy per target token (nats)")
    right = left.twinx()
    right.plot(
        *series("penalty_weighted"), color="tab:green", linewidth=1, label="lambda * penalty"
    )
    right.set_ylabel("lambda * penalty")
    figure.legend(loc="outside upper center", ncols=3)
    save_figure(figure, image)
    return True


def save_figure(figure: Figure, image: Path) -> None:
    """Write a figure of matplotlib as the PNG `image`, replacing it atomically."""
    tmp = image.with_name(image.name + ".tmp")
    figure.savefig(tmp, format="png", dpi=120)
    os.replace(tmp, image)
