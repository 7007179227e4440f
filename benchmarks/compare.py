"""Two results files of the benchmarks side by side: which figures became slower beyond noise.

    python benchmarks/compare.py BEFORE.csv AFTER.csv

Per row: AFTER / BEFORE of the medians, with its 95 % interval, and the same of ours / peer. On one machine the first
decides; on two machines seconds cannot be compared and the second does, because a peer was timed in the same turns.
Slower: the whole interval is above 1 + --margin. Exit status: 0 nothing is slower, 1 something is, 2 cannot compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.harness.figure import MEASURED, OURS, Figure, SchemaError, read_csv  # noqa: E402
from benchmarks.harness.statistics import Estimate, independent_ratio  # noqa: E402

MARGIN = 0.05  # two runs of one commit on an idle machine differ by less
NO_VERDICT = "1"  # the unit of which less is not better


@dataclass(frozen=True)
class Change:
    """One row in both files. time: AFTER / BEFORE of medians; beside: of ours / peer, in rows of peers."""

    figure: Figure
    time: Estimate
    beside: float | None
    verdict: str


def changes(
    before: Sequence[Figure], after: Sequence[Figure], margin: float = MARGIN
) -> list[Change]:
    """Of the rows measured in both, in AFTER's order. A verdict is "slower", "faster", "same" or "-"."""
    old = {f.key: f for f in before if f.status == MEASURED}
    found = []
    for new in after:
        if new.status != MEASURED or new.key not in old:
            continue
        was = old[new.key]
        if was.unit != new.unit:
            raise SchemaError(f"{new.name}, {new.variant}: {was.unit} and {new.unit}")
        time = independent_ratio(new.samples, was.samples)
        beside = new.ratio / was.ratio if new.ratio and was.ratio else None
        if was.machine == new.machine:
            limits = (time.low, time.high) if new.variant == OURS else None
        else:
            limits = _ratio_limits(was, new)
        verdict = "-" if limits is None or new.unit == NO_VERDICT else _verdict(*limits, margin)
        found.append(Change(new, time, beside, verdict))
    return found


def _ratio_limits(was: Figure, new: Figure) -> tuple[float, float] | None:
    """Of (ours / peer) after over before: from the ends of both intervals, which is wide and safe."""
    ends = (was.ratio_low, was.ratio_high, new.ratio_low, new.ratio_high)
    if not all(ends):
        return None
    low, high, new_low, new_high = (float(x) for x in ends if x is not None)
    return new_low / high, new_high / low


def _verdict(low: float, high: float, margin: float) -> str:
    if low > 1 + margin:
        return "slower"
    return "faster" if high < 1 / (1 + margin) else "same"


def lost(before: Sequence[Figure], after: Sequence[Figure]) -> list[str]:
    """Rows that had a number and have none now, and why."""
    now = {f.key: f.status for f in after}
    return [
        f"{f.suite}: {f.name}, {f.variant}: {now.get(f.key, 'not run')}"
        for f in before
        if f.status == MEASURED and now.get(f.key) != MEASURED
    ]


def lines(before: Sequence[Figure], after: Sequence[Figure], margin: float) -> list[str]:
    """The report."""
    machines, commits = (
        [sorted({getattr(f, what) for f in side}) for side in (before, after)]
        for what in ("machine", "commit")
    )
    text = [f"commits: {', '.join(commits[0])} -> {', '.join(commits[1])}"]
    if machines[0] != machines[1]:
        names = f"{', '.join(machines[0])} and {', '.join(machines[1])}"
        text.append(
            f"The machines differ ({names}): seconds cannot be compared, ratios to peers can."
        )
    text.append(f"{'verdict':<8} {'after / before':<26} {'ours / peer':<12} figure")
    for change in changes(before, after, margin):
        time, f = change.time, change.figure
        interval = f"{time.value:.3f} [{time.low:.3f}, {time.high:.3f}]"
        beside = "-" if change.beside is None else f"x {change.beside:.3f}"
        what = f"{f.suite}: {f.name}, {f.shape}, {f.dtype} | {f.variant}"
        text.append(f"{change.verdict:<8} {interval:<26} {beside:<12} {what}")
    return text + [f"lost     {line}" for line in lost(before, after)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--margin", type=float, default=MARGIN, help="that is not told (0.05)")
    options = parser.parse_args(arguments)
    try:
        before, after = read_csv(options.before), read_csv(options.after)
        print("\n".join(lines(before, after, options.margin)))
        found = changes(before, after, options.margin)
    except (SchemaError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return int(any(change.verdict == "slower" for change in found))


if __name__ == "__main__":
    sys.exit(main())
