"""What a step costs as work grows: seconds and memory against length, batch, rank, adapted layers, processes.

    python benchmarks/cost_scaling.py --plot scaling.png

One thing grows at a time, from the same centre. Steps of all sizes of an axis run in turns (their batches are random
tokens; what they hold does not change the cost), and log(cost) = a + x log(size) is fitted over their medians. x = 1:
twice the work, twice the cost; x = 0: it does not matter. Processes are whole runs of the same global batch under
ZeRO-0: x = -1 would be a perfect division.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]

import contestants  # noqa: E402
import torch  # noqa: E402
from step_profile import make_engine  # noqa: E402

from benchmarks.harness.table import quantity  # noqa: E402
from benchmarks.harness.timing import peak_memory  # noqa: E402
from flex.config import RunConfig  # noqa: E402
from flex.loss_plot import save_figure  # noqa: E402
from flex.state import Batch, Example  # noqa: E402

TARGETS = ("down_proj", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Size:
    """What is trained in a step. modules: adapted projections of each layer, the first of TARGETS."""

    length: int = 256
    documents: int = 4
    rank: int = 8
    modules: int = 3

    @property
    def positions(self) -> int:
        return self.length * self.documents


AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "document length": ("length", (128, 256, 512, 1024, 2048)),
    "documents a batch": ("documents", (1, 2, 4, 8, 16)),
    "rank": ("rank", (4, 8, 16, 32, 64)),
    "adapted modules a layer": ("modules", (1, 2, 3, 5, 7)),
}
PROCESSES = "processes"


@dataclass(frozen=True)
class Fit:
    """cost ~ size^exponent by least squares of the logarithms, with the 95 % limits of Student's t."""

    exponent: float
    low: float
    high: float

    def __str__(self) -> str:
        if not math.isfinite(self.low):
            return f"{self.exponent:+.2f} (two points: no interval)"
        return f"{self.exponent:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Series:
    """One axis: at each size the seconds of every round, the positions of a step, the peak bytes of one."""

    axis: str
    sizes: tuple[int, ...]
    seconds: list[list[float]]
    positions: list[int]
    peak_bytes: list[float]

    @property
    def medians(self) -> list[float]:
        return [statistics.median(rounds) for rounds in self.seconds]

    def time_fit(self) -> Fit:
        return fit(self.sizes, self.medians)

    def memory_fit(self) -> Fit:
        return fit(self.sizes, self.peak_bytes)

    def exponents(self) -> list[float]:
        """Of each round's times alone."""
        return [fit(self.sizes, column).exponent for column in zip(*self.seconds, strict=True)]


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Raises ValueError for fewer than two sizes, or for what has no logarithm."""
    from scipy.stats import linregress, t

    if len(sizes) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError(
            f"sizes {list(sizes)}, costs {list(costs)}: two sizes or more, all above 0"
        )
    found = linregress([math.log(s) for s in sizes], [math.log(c) for c in costs])
    free = len(sizes) - 2
    wide = float(t.ppf(0.975, free)) * float(found.stderr) if free else math.inf
    return Fit(float(found.slope), float(found.slope) - wide, float(found.slope) + wide)


class OneBatch:
    """A loader of the same batch for every step."""

    total_steps = 10**6

    def __init__(self, size: Size, vocabulary: int) -> None:
        from flex.data.packing import collate

        generator = torch.Generator().manual_seed(0)
        examples = []
        for _ in range(size.documents):
            ids = torch.randint(0, vocabulary, (size.length,), generator=generator)
            labels = torch.full_like(ids, -100)
            half = size.length // 2  # as in code data, about the second half bears loss
            labels[half:-1] = ids[half + 1 :]
            examples.append(Example(ids, labels, row="random"))
        self.batch: Batch = collate(examples, range(size.documents), "packed", 0)

    def micro_batches(self, step: int) -> list[Batch]:
        return [self.batch]

    def targets(self, step: int) -> int:
        return self.batch.num_targets

    def positions(self, step: int) -> int:
        return self.batch.num_positions

    def refresh_micro_batches(self, step: int) -> list[tuple[Batch, int]]:
        return [(self.batch, self.batch.num_targets)]


def config(model: str, size: Size) -> RunConfig:
    """Sophia and the penalty as by default; refreshes as often as they come by default."""
    return RunConfig.model_validate(
        {
            "model": {"name": model},
            "data": {"name": "builtin"},
            "lora": {"r": size.rank, "alpha": 2.0 * size.rank, "targets": TARGETS[: size.modules]},
        }
    )


def make_step(model: str, size: Size) -> Callable[[], object]:
    """A call that does the next optimizer step of a model of its own; the first one refreshes the curvature."""
    from flex.step import train_step

    cfg = config(model, size)
    engine, penalty, vocabulary = make_engine(cfg)
    loader, done = OneBatch(size, vocabulary), 0

    def step() -> object:
        nonlocal done
        done += 1
        # never a multiple of `every` but for the first: refreshes are counted by the waterfall
        at = 0 if done == 1 else 1
        report, _ = train_step(cfg, engine, loader, penalty, at, loader.total_steps)  # type: ignore[arg-type]
        if not math.isfinite(report.loss):
            raise FloatingPointError(f"{size}: loss {report.loss} in step {done}")
        return report

    return step


def grow(model: str, axis: str, rounds: int, centre: Size, sizes: Sequence[int] = ()) -> Series:
    """Time one axis. `sizes`: in place of its own."""
    name, usual = AXES[axis]
    values = tuple(sizes or usual)
    points = [Size(**{**vars(centre), name: value}) for value in values]
    steps = [make_step(model, point) for point in points]
    peaks = []
    for step in steps:
        step()  # warm-up, and the only refresh
        peaks.append(float(peak_memory(step, torch.device("cpu")) or math.nan))
    seconds: list[list[float]] = [[] for _ in points]
    for turn in range(rounds):
        order = range(len(points))
        for i in order if turn % 2 == 0 else reversed(order):
            begin = time.perf_counter()
            steps[i]()
            seconds[i].append(time.perf_counter() - begin)
    return Series(axis, values, seconds, [p.positions for p in points], peaks)


def grow_processes(model: str, steps: int, counts: Sequence[int]) -> Series:
    """Whole runs of `model` on the built-in tasks, 16 examples a step divided among the processes."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        job = contestants.Job(model, Path(folder) / "none", ("data.name=builtin",), steps)
        for count in counts:
            setup = contestants.Setup(f"{count} processes", "flex", count)
            runs.append(contestants.run_flex(setup, job))
    return Series(
        PROCESSES,
        tuple(counts),
        [run.seconds for run in runs],
        [sum(run.positions) // len(run.positions) for run in runs],
        [float(run.peak_bytes) for run in runs],
    )


def table(found: Sequence[Series]) -> str:
    lines = []
    for series in found:
        lines.append(f"{series.axis}: time ~ {series.time_fit()}, memory ~ {series.memory_fit()}")
        rows = zip(series.sizes, series.medians, series.positions, series.peak_bytes, strict=True)
        for size, seconds, positions, peak in rows:
            lines.append(
                f"  {size:>6}  {seconds:8.3f} s/step  {positions / seconds:8.0f} positions/s  "
                f"{quantity(peak, 'bytes'):>8}"
            )
    return "\n".join(lines)


def plot(found: Sequence[Series], path: Path) -> None:
    """Time and memory over each axis, both logarithmic, with the fitted exponents."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4 * len(found), 6.5), layout="constrained")
    axes = canvas.subplots(2, len(found), squeeze=False)
    for column, series in enumerate(found):
        drawn = ((series.medians, "seconds a step", series.time_fit()),)
        drawn += (([p / 1e6 for p in series.peak_bytes], "peak MB of a step", series.memory_fit()),)
        for row, (costs, label, exponent) in enumerate(drawn):
            chart = axes[row][column]
            chart.loglog(series.sizes, costs, "o-")
            chart.set_xticks(series.sizes, [str(s) for s in series.sizes])
            chart.minorticks_off()
            chart.set(xlabel=series.axis, ylabel=label, title=f"x = {exponent}")
    save_figure(canvas, path)


def measured(model: str, rounds: int, centre: Size, processes: Sequence[int]) -> Iterator[Series]:
    for axis in AXES:
        yield grow(model, axis, rounds, centre)
    if len(processes) > 1:
        yield grow_processes(model, rounds, processes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="shape:small")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each axis (5)")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(args.threads or cores)
    counts = [n for n in (1, 2, 4, 8) if n <= cores]
    found = []
    print(f"{args.model}, {torch.get_num_threads()} threads; centre: {Size()}", flush=True)
    for series in measured(args.model, args.rounds, Size(), counts):
        found.append(series)
        print(table([series]), flush=True)
    if args.plot:
        plot(found, args.plot)
        print(f"written: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
