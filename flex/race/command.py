"""`python -m flex race --config FILE`: hold a race, or go on with it, and print its verdict."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from flex.evals.command import check_counts


def race_command(args: argparse.Namespace) -> int:
    """Returns 0. Raises FlexError; what was run by then is kept."""
    from flex.race.protocol import load_race
    from flex.race.report import write_report
    from flex.race.stages import hold

    check_counts(args, "workers")
    race = load_race(Path(args.config), args.overrides)
    folder = Path(race.dir) / race.name
    workers = args.workers or len(os.sched_getaffinity(0))
    book = hold(race, folder, workers, lambda line: print(line, flush=True))
    print()
    print(write_report(race, book, folder), end="")
    print(folder)
    return 0
