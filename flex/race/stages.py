"""The course of a race: tune everyone, freeze the target, evaluate. Every finished run is kept, so a
race that was stopped goes on where it was."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex.errors import DataError
from flex.files import write_atomic
from flex.meters import format_duration
from flex.race.protocol import (
    BASELINE,
    ENTRANTS,
    FIRST_SEED,
    TUNING_SEED,
    RaceConfig,
    configure,
    trials,
)
from flex.race.single import Outcome
from flex.race.workers import Job, run_all

log = logging.getLogger("flex.race")

Settings = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """One run of a race and what it came to."""

    stage: str  # "tune", "rate", "evaluate"
    entrant: str
    budget: float
    seed: int
    settings: Settings
    outcome: Outcome

    @property
    def key(self) -> str:
        return run_key(self.stage, self.entrant, self.budget, self.seed, self.settings)


def run_key(stage: str, entrant: str, budget: float, seed: int, settings: Settings) -> str:
    """What tells a run from all others of its race."""
    return f"{stage} {entrant} {budget:g} {seed} {json.dumps(dict(settings), sort_keys=True)}"


class Book:
    """races/<name>/runs.jsonl: the protocol's digest, then one line per finished run.

    Raises DataError: the file belongs to another protocol, or is damaged before its last line.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.path = folder / "runs.jsonl"
        self.runs: dict[str, Run] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        whole = []
        for number, line in enumerate(lines):
            try:
                whole.append(json.loads(line))
            except ValueError:
                if number < len(lines) - 1:
                    raise DataError(
                        f"{self.path}, line {number + 1} is no JSON",
                        "the results of a race are read from it",
                        "restore the file, or name another race",
                    ) from None
                log.warning("%s: the last line was cut short by a kill and is run again", self.path)
        if whole and whole[0] != {"protocol": digest}:
            raise DataError(
                f"{folder} holds a race of another protocol",
                "runs of two protocols cannot be compared",
                "give the race another name, or remove that folder yourself",
            )
        for record in whole[1:]:
            one = Run(**record | {"outcome": Outcome.from_json(record["outcome"])})
            self.runs[one.key] = one
        text = "".join(json.dumps(record) + "\n" for record in whole or [{"protocol": digest}])
        write_atomic(self.path, text.encode())
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, run: Run) -> None:
        """Keep a finished run: on the disk when this returns."""
        self.runs[run.key] = run
        record = {**vars(run), "settings": dict(run.settings), "outcome": run.outcome.to_json()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def of(self, stage: str, entrant: str, budget: float | None = None) -> list[Run]:
        """Runs of a stage and entrant (at one budget), in the order they ended."""
        return [
            r
            for r in self.runs.values()
            if (r.stage, r.entrant) == (stage, entrant) and budget in (None, r.budget)
        ]

    def close(self) -> None:
        self._file.close()


def best(runs: list[Run]) -> Run:
    """The run with the lowest final loss; of equals the first."""
    return min(runs, key=lambda run: run.outcome.loss)


def tuned(race: RaceConfig, book: Book, entrant: str, budget: float) -> Settings:
    """The settings an entrant is evaluated with: the best trial's, with the best rate at `budget`."""
    trials = book.of("tune", entrant) if budget == 1.0 else []
    return best(trials + book.of("rate", entrant, budget)).settings


def hold(race: RaceConfig, folder: Path, workers: int, say: Callable[[str], None] = print) -> Book:
    """Run what is left of a race.

    Args:
        folder: of the race; made if it is not there.
        workers: runs at once, one core each.
        say: gets a line for each finished run.

    Raises:
        DataError: the folder belongs to another race.
        WorkerError: a run failed.
    """
    book = Book(folder, race.digest())
    try:
        _run(race, book, list(_tuning(race)), workers, "tuning", say)
        _run(race, book, list(_rates(race, book)), workers, "rates", say)
        # AdamW first: its loss is the target, known before any other entrant is evaluated.
        _run(race, book, list(_evaluation(race, book, [BASELINE])), workers, "target", say)
        target = target_loss(book)
        write_atomic(folder / "target.json", json.dumps({"loss": target}).encode())
        others = [name for name in race.entrants if name != BASELINE]
        _run(race, book, list(_evaluation(race, book, others)), workers, "evaluation", say)
    finally:
        book.close()
    return book


def target_loss(book: Book) -> float:
    """L*: mean final loss of tuned AdamW at the full budget."""
    losses = [run.outcome.loss for run in book.of("evaluate", BASELINE, 1.0)]
    return math.fsum(losses) / len(losses)


Planned = tuple[str, str, float, int, Settings]  # the fields of a Run before its outcome


def _tuning(race: RaceConfig) -> Iterator[Planned]:
    for entrant in race.entrants:
        for settings in trials(race, entrant):
            yield "tune", entrant, 1.0, TUNING_SEED, settings


def _rates(race: RaceConfig, book: Book) -> Iterator[Planned]:
    """The rate is tuned anew at each budget, a shorter run wants a higher one; the full one's trials count as well."""
    for budget in race.budgets:
        for entrant in race.entrants:
            chosen = best(book.of("tune", entrant)).settings
            for factor in race.rates:
                if budget == factor == 1.0:
                    continue  # that is the best trial
                rate = float(f"{chosen['optim.lr'] * factor:.4g}")
                yield "rate", entrant, budget, TUNING_SEED, {**chosen, "optim.lr": rate}


def _evaluation(race: RaceConfig, book: Book, entrants: list[str]) -> Iterator[Planned]:
    for seed in range(FIRST_SEED, FIRST_SEED + race.seeds):
        for budget in race.budgets:
            for entrant in entrants:
                yield "evaluate", entrant, budget, seed, tuned(race, book, entrant, budget)


def _run(
    race: RaceConfig,
    book: Book,
    planned: list[Planned],
    workers: int,
    what: str,
    say: Callable[[str], None],
) -> None:
    plans = {run_key(*plan): plan for plan in planned}
    left = {key: plan for key, plan in plans.items() if key not in book.runs}
    start = time.monotonic()

    def job(key: str, plan: Planned) -> Job:
        _, entrant, budget, seed, settings = plan
        cfg = configure(race, entrant, settings, race.steps_of(budget), seed)
        return Job(key, cfg, ENTRANTS[entrant].permuted)

    outcomes = run_all([job(*item) for item in left.items()], workers)
    for done, (key, outcome) in enumerate(outcomes, 1):
        _, entrant, budget, seed, settings = left[key]
        book.add(Run(*left[key], outcome))
        each = (time.monotonic() - start) / done
        say(
            f"{what} {len(plans) - len(left) + done}/{len(plans)} | {entrant} | budget {budget:g} | "
            f"seed {seed} | lr {settings['optim.lr']:.1e} | loss {outcome.loss:.4f} | "
            f"eta {format_duration(each * (len(left) - done))}"
        )


def best_of(runs: list[Run]) -> list[float]:
    """Lowest loss after the first 1, 2, ... trials: what a larger budget of tuning would have given."""
    lowest, curve = math.inf, []
    for run in runs:
        lowest = min(lowest, run.outcome.loss)
        curve.append(lowest)
    return curve


def at_edge(race: RaceConfig, book: Book, entrant: str) -> dict[str, Any]:
    """Searched options whose best value lies in the outer tenth of its range: value by name."""
    chosen = best(book.of("tune", entrant)).settings
    box = ENTRANTS[entrant].box
    return {key: v for key, v in chosen.items() if not 0.1 <= box[key].place(v) <= 0.9}
