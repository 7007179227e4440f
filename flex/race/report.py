"""What a race leaves behind: every run as CSV, the verdict as JSON and text, and three plots."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from flex.files import write_atomic
from flex.loss_plot import save_figure
from flex.race.analysis import COSTS, Verdict, center, table, verdict
from flex.race.protocol import BASELINE, CHALLENGER, RaceConfig
from flex.race.stages import Book, at_edge, best, best_of

COLUMNS = (
    *("stage", "entrant", "budget", "seed", "steps", "loss", "positions", "cpu_seconds"),
    *("wall_seconds", "clipped", "settings"),
)


def write_report(race: RaceConfig, book: Book, folder: Path) -> str:
    """Write runs.csv, verdict.json, verdict.txt and the plots into `folder`; returns the text."""
    found = verdict(race, book)
    text = render(race, book, found)
    write_atomic(folder / "runs.csv", as_csv(book).encode())
    write_atomic(folder / "verdict.txt", text.encode())
    content = summary(race, found)
    write_atomic(folder / "verdict.json", (json.dumps(content, indent=1) + "\n").encode())
    _plot(race, book, folder)
    return text


def summary(race: RaceConfig, found: Verdict) -> dict[str, Any]:
    """What verdict.json holds; a ratio that was not reached is "inf", since JSON has no infinity."""
    return {
        "race": race.name,
        "protocol": race.digest(),
        "words": found.words(),
        "cause": found.cause(),
        "target": found.target,
        "ratios": {
            name: {cost: [str(v) if np.isinf(v) else v for v in (r.value, r.low, r.high)] for cost, r in each.items()}
            for name, each in {CHALLENGER: found.ratios, **found.others}.items()
        },
    }  # fmt: skip


def as_csv(book: Book) -> str:
    """Every run, one row; columns COLUMNS, settings as JSON."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in sorted(book.runs.values(), key=lambda run: run.key):
        record: dict[str, Any] = {**vars(run), **vars(run.outcome)}
        record["settings"] = json.dumps(dict(run.settings), sort_keys=True)
        writer.writerow(["" if record[name] is None else record[name] for name in COLUMNS])
    return out.getvalue()


def render(race: RaceConfig, book: Book, found: Verdict) -> str:
    """The race in words and a table."""
    shared = race.shared()
    lines = [
        f"{race.name}: {shared.model.name} on {shared.data.name}, {race.steps} steps of "
        f"{shared.train.batch_size} examples; {race.trials} trials each, {race.seeds} paired seeds",
        f"target: loss {found.target:.4f}, tuned {BASELINE} at the full budget",
        f"{CHALLENGER} against {BASELINE}: {found.words()}",
        found.cause(),
        "",
        f"{'R to the target':<18}" + "".join(f"{cost:>30}" for cost in COSTS),
    ]
    for name, each in {CHALLENGER: found.ratios, **found.others}.items():
        lines.append(f"{name:<18}" + "".join(f"{each[cost]!s:>30}" for cost in COSTS))
    lines += ["", f"{'final loss at the full budget':<32}{'to ' + CHALLENGER:>30}   best setting"]
    full = sorted(race.budgets).index(1.0)
    for name in race.entrants:
        own = center(table(race, book, name).losses)[full]
        gap = found.controls.get(name)
        away = "" if gap is None else f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        settings = best(book.of("tune", name)).settings
        chosen = " ".join(f"{key.removeprefix('optim.')}={v:g}" for key, v in settings.items())
        lines.append(f"{name:<20}{own:>12.4f}{away:>30}   {chosen}")
    for name in race.entrants:
        if edge := at_edge(race, book, name):
            which = ", ".join(f"{key.removeprefix('optim.')}={v:g}" for key, v in edge.items())
            lines.append(
                f"{name}: best at the edge of its range: {which}; a wider one may be better"
            )
    return "\n".join(lines) + "\n"


def basin(book: Book, entrant: str, within: float = 0.01) -> tuple[float, float]:
    """Lowest and highest learning rate of the trials whose loss is within 1 % of the best."""
    runs = book.of("tune", entrant)
    bound = best(runs).outcome.loss * (1 + within)
    rates = [run.settings["optim.lr"] for run in runs if run.outcome.loss <= bound]
    return min(rates), max(rates)


def _plot(race: RaceConfig, book: Book, folder: Path) -> None:
    """race.png: loss over the learning rate, over the number of trials, over the budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    rate, tried, budget = figure.subplots(1, 3)
    budgets = np.array(sorted(race.budgets))
    for number, name in enumerate(race.entrants):
        color = f"C{number}"
        runs = book.of("tune", name)
        low, high = basin(book, name)
        label = f"{name} (within 1 %: x {high / low:.1f})"
        rates = [run.settings["optim.lr"] for run in runs]
        rate.scatter(rates, [run.outcome.loss for run in runs], s=12, color=color, label=label)
        tried.plot(range(1, len(runs) + 1), best_of(runs), color=color, label=name)
        losses = table(race, book, name).losses
        budget.plot(budgets, center(losses), "o-", markersize=4, color=color, label=name)
        for row in losses:
            budget.plot(budgets, row, ".", markersize=2, color=color, alpha=0.5)
    rate.set(xscale="log", xlabel="learning rate", ylabel="final validation loss (nats per token)")
    best_loss = min(best(book.of("tune", name)).outcome.loss for name in race.entrants)
    rate.set_ylim(best_loss * 0.99, best_loss * 1.3)
    tried.set(xlabel="trials", ylabel="best final loss so far")
    tried.set_ylim(best_loss * 0.99, best_loss * 1.15)
    budget.set(xlabel=f"budget (1 = {race.steps} steps)", ylabel="final loss, each run decayed")
    for axes in (rate, tried, budget):
        axes.legend(fontsize=7)
    save_figure(figure, folder / "race.png")
