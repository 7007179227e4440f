"""The races that are told of: their verdicts follow from the runs that are kept, and the README says the same."""

import csv
import json
from pathlib import Path

import pytest

from flex.race.analysis import verdict
from flex.race.protocol import ENTRANTS, RaceConfig, load_race
from flex.race.report import render, summary
from flex.race.single import Outcome
from flex.race.stages import Book, Run

ROOT = Path(__file__).parents[2]
KEPT = sorted(path.parent for path in (ROOT / "benchmarks/results/races").glob("*/runs.csv"))


def read_runs(path: Path, race: RaceConfig, folder: Path) -> Book:
    """The inverse of `flex.race.report.as_csv`."""
    book = Book(folder, race.digest())
    for row in csv.DictReader(path.read_text().splitlines()):
        outcome = Outcome(
            float(row["loss"]),
            int(row["steps"]),
            int(row["positions"]),
            float(row["cpu_seconds"]),
            float(row["wall_seconds"]),
            float(row["clipped"]) if row["clipped"] else None,
        )
        kept = json.loads(row["settings"])
        settings = {key: kept[key] for key in ENTRANTS[row["entrant"]].box}
        budget, seed = float(row["budget"]), int(row["seed"])
        book.add(Run(row["stage"], row["entrant"], budget, seed, settings, outcome))
    book.close()
    return book


def test_three_races_are_kept():
    assert len(KEPT) >= 3


@pytest.mark.parametrize("folder", KEPT, ids=[folder.name for folder in KEPT])
def test_the_verdict_follows_from_the_kept_runs(folder, tmp_path):
    race = load_race(ROOT / f"flex/recipes/races/{folder.name}.yaml")
    book = read_runs(folder / "runs.csv", race, tmp_path)
    assert len(book.of("evaluate", "sophia")) == race.seeds * len(race.budgets)
    assert len(book.of("tune", "sophia")) == len(book.of("tune", "adamw")) == race.trials
    found = verdict(race, book)
    told = json.loads((folder / "verdict.json").read_text())
    assert {**summary(race, found), "protocol": told["protocol"]} == told
    assert render(race, book, found) == (folder / "verdict.txt").read_text()


@pytest.mark.parametrize("folder", KEPT, ids=[folder.name for folder in KEPT])
def test_the_readme_says_what_the_verdict_says(folder):
    told = json.loads((folder / "verdict.json").read_text())
    (row,) = (
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(f"| `{folder.name}`")
    )
    assert told["words"] in row and told["cause"] in row
