"""`python -m flex compare`: read, compare, and say in words what was and what was not shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flex.errors import ConfigError
from flex.evals.compare import Comparison, Flip, System, compare
from flex.evals.compare_groups import GroupComparison, compare_groups
from flex.evals.results import EvalReport, load, write_asked
from flex.evals.stats import ALPHA, Interval, least_flips, permutation_floor, unseen_rate
from flex.evals.summary import summarise

FORMAT = "flex-compare-1"
_SHOWN = 15  # flipped tasks that are printed each way; the JSON holds all


def compare_command(
    paths: Sequence[str] = (),
    groups: Sequence[Sequence[str]] = (),
    pairs: Sequence[Sequence[str]] = (),
    json_out: str | None = None,
    k: int = 1,
) -> int:
    """Print a comparison and return 0, whatever it shows. One of three forms:

    Args:
        paths: result files; each is compared with the first.
        groups: a name and then the result files of one method's training runs, for each method; each
            is compared with the first.
        pairs: two result files each, for a table over benchmarks.
        json_out: also write everything there.
        k: of pass@k.

    Raises ConfigError for another number of files; DataError, see `results.load` and `check_comparable`.
    """
    if sum(map(bool, (paths, groups, pairs))) != 1:
        raise _usage("files, --group and --pair are three forms of one command", "give one of them")
    comparisons: Sequence[Comparison | GroupComparison] = (
        compare_groups(_read_groups(groups), k) if groups else compare(_read_pairs(paths, pairs), k)
    )
    if json_out is not None:
        _write(Path(json_out), comparisons)
    _print(comparisons)
    return 0


def _read_groups(groups: Sequence[Sequence[str]]) -> list[tuple[str, list[System]]]:
    if len(groups) < 2:
        raise _usage("one --group", "give --group twice or more: NAME FILE FILE ...")
    for name, *_ in groups:
        if Path(name).is_file():
            raise _usage(
                f"--group {name}: a file in place of the name", "give --group NAME FILE ..."
            )
    names = [name for name, *_ in groups]
    if len(set(names)) < len(names):
        raise _usage(f"--group names: {', '.join(names)}", "give each method a name of its own")
    _check_once([path for _, *files in groups for path in files])
    return [(name, [System(path, load(path)) for path in files]) for name, *files in groups]


def _read_pairs(
    paths: Sequence[str], pairs: Sequence[Sequence[str]]
) -> list[tuple[System, System]]:
    if paths and len(paths) < 2:
        raise _usage(
            f"one file: {paths[0]}", "give two or more; the first is the one compared with"
        )
    if any(len(pair) != 2 for pair in pairs):
        raise _usage("--pair takes two files", "give --pair A.json B.json for each benchmark")
    wanted = [(pair[0], pair[1]) for pair in pairs] or [(paths[0], path) for path in paths[1:]]
    for each in [list(paths)] if paths else wanted:
        _check_once(each)
    systems = {path: System(path, load(path)) for pair in wanted for path in pair}
    return [(systems[first], systems[second]) for first, second in wanted]


def _check_once(paths: Sequence[str]) -> None:
    seen: dict[Path, str] = {}
    for path in paths:
        real = Path(path).resolve()
        if real in seen:
            raise _usage(
                f"{path} is the same file as {seen[real]}",
                "give each file once; for the noise floor evaluate the same model twice",
            )
        seen[real] = path


def _usage(what: str, fix: str) -> ConfigError:
    return ConfigError(what, "a comparison is between different results", fix)


def print_report(report: EvalReport) -> None:
    """Print the figures of one evaluation."""
    summary = summarise(report)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        _head(report.benchmark["name"], summary["tasks"], summary["samples"]), style="bold"
    )
    table = _table("", "")
    table.show_header = False
    for label, figures in (("", summary), (" of solvable tasks", summary["solvable"] or {})):
        for k, found in (figures.get("pass_at") or {}).items():
            table.add_row(f"pass@{k}{label}, %", _percent(Interval(**found)))
    if summary["compile_rate"] is not None:
        table.add_row("compile, %", f"{100 * summary['compile_rate']:.1f}")
    for kind, count in summary["verdicts"].items():
        if count:
            table.add_row(kind, str(count))
    table.add_row("cut by max_new_tokens", str(summary["cut"]))
    console.print(table)
    if report.unsolvable:
        left = summary["solvable"]["tasks"]
        console.print(
            f"{left} of {summary['tasks']} tasks can be solved: the stub of the others does not compile"
        )
    if report.missing:
        console.print("no score: samples were not run, their tool chain is missing", style="bold")


def words(comparison: Comparison) -> str:
    """What the comparison shows, in a sentence or two."""
    d = comparison.difference
    name, other = comparison.second.name, comparison.first.name
    unit = "tasks" if comparison.samples == 1 else "scores"
    flips = len(comparison.gained) + len(comparison.lost)
    if not flips:
        rate = unseen_rate(comparison.tasks)
        return (
            f"No difference: all {comparison.tasks} tasks have the same result. Up to {_share(rate)} of such "
            "tasks may still differ in truth (one-sided 95 % limit)."
        )
    if comparison.shown:
        way = "higher" if d.value > 0 else "lower"
        text = (
            f"A difference was shown: {name} scores {abs(100 * d.value):.1f} points {way} than {other} "
            f"(95 % interval {_limits(d)}; {_p(comparison)})."
        )
        return text + (" The interval holds 0, but the test decides." * (d.low <= 0 <= d.high))
    text = (
        f"No difference was shown between {name} and {other}: {_points(d.value)} "
        f"(95 % interval {_limits(d)}; {_p(comparison)})."
    )
    if not d.low <= 0 <= d.high:
        text += " The interval leaves out 0, but the test decides."
    least = least_flips(ALPHA / comparison.comparisons)
    if comparison.samples == 1 and flips < least:
        text += f" {flips} {unit} differ; fewer than {least} cannot show anything, whichever way they go."
    if comparison.detectable is None:  # pass counts differ, pass@k nowhere
        return text
    return text + (
        f" A true difference below about {100 * comparison.detectable:.1f} points would mostly go "
        f"unseen with these {comparison.tasks} tasks (80 % power)."
    )


def group_words(comparison: GroupComparison) -> str:
    """What the comparison of two methods shows, in a sentence or two."""
    d, (a, b) = comparison.difference, (comparison.first, comparison.second)
    figures = f"95 % interval over runs and tasks {_limits(d)}; {_p(comparison)}"
    if comparison.shown:
        way = "higher" if d.value > 0 else "lower"
        return (
            f"A difference was shown: {b.name} scores {abs(100 * d.value):.1f} points {way} than {a.name} "
            f"({figures})."
        )
    text = f"No difference was shown between {b.name} and {a.name}: {_points(d.value)} ({figures})."
    needed = ALPHA / comparison.comparisons
    if comparison.least_p >= needed:
        runs = next(runs for runs in range(2, 100) if permutation_floor(runs, runs) < needed)
        text += (
            f" {len(a.runs)} and {len(b.runs)} training runs cannot show one: their smallest p is "
            f"{comparison.least_p:.3f}; it takes {runs} of each."
        )
    elif comparison.p_holm < ALPHA:
        text += " The permutation of the runs alone would show it; the interval, which holds 0, does not."
    return text


def _print(comparisons: Sequence[Comparison | GroupComparison]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    for number, comparison in enumerate(comparisons):
        if number:
            console.print()
        head = _head(comparison.benchmark, comparison.tasks, comparison.samples)
        console.print(f"{head}, pass@{comparison.k}", style="bold")
        if isinstance(comparison, Comparison):
            _print_pair(console, comparison)
            text = words(comparison)
        else:
            _print_groups(console, comparison)
            text = group_words(comparison)
        for note in comparison.notes:
            console.print(f"differs: {note}", style="dim", soft_wrap=True)
        console.print(text, style="bold" if comparison.shown else "", soft_wrap=True)


def _print_pair(console: Console, comparison: Comparison) -> None:
    sides = (comparison.first, comparison.second)
    table = _table("", *_short([side.name for side in sides]), "difference")
    table.add_row(
        f"pass@{comparison.k}, %",
        *(_percent(side.score) for side in sides),
        _percent(comparison.difference, "+"),
    )
    if comparison.solvable is not None:
        label = f"of {comparison.solvable_tasks} solvable tasks"
        scores = [_percent(side.solvable) for side in sides if side.solvable is not None]
        table.add_row(label, *scores, _percent(comparison.solvable, "+"))
    rates = [side.compile_rate for side in sides]
    table.add_row(
        "compile, %", *(f"{100 * r:.1f}" for r in rates), _points(rates[1] - rates[0], "")
    )
    for kind in sides[0].verdicts:
        counts = [side.verdicts[kind] for side in sides]
        if any(counts):
            table.add_row(kind, *map(str, counts), f"{counts[1] - counts[0]:+d}")
    console.print(table)
    every = comparison.tasks * comparison.samples
    console.print(f"texts  {comparison.texts_differ} of {every} completions differ")
    for label, flips in (("gained", comparison.gained), ("lost", comparison.lost)):
        console.print(_flipped(label, flips, comparison.samples), soft_wrap=True)


def _short(names: Sequence[str]) -> list[str]:
    """Files without the folders that they share."""
    parts = [Path(name).parts for name in names]
    same = next(n for n in range(99) if len({part[: n + 1] for part in parts}) > 1)
    return [str(Path(*part[same:])) for part in parts]


def _flipped(label: str, flips: Sequence[Flip], samples: int) -> str:
    told = [
        flip.task_id if samples == 1 else f"{flip.task_id} ({flip.first} to {flip.second})"
        for flip in flips[:_SHOWN]
    ]
    if len(flips) > _SHOWN:
        told.append(f"and {len(flips) - _SHOWN} more (--json has all)")
    return f"{label:<6} {len(flips)} tasks" + (f": {', '.join(told)}" if told else "")


def _print_groups(console: Console, comparison: GroupComparison) -> None:
    table = _table("method", "runs", "mean, %", "sd between runs", "each run, %")
    for method in (comparison.first, comparison.second):
        scores = " ".join(f"{100 * score:.1f}" for score in method.scores)
        table.add_row(
            *(method.name, str(len(method.runs)), f"{100 * method.mean:.1f}"),
            *(f"{100 * method.deviation:.1f}", scores),
        )
    console.print(table)
    console.print(f"difference {_percent(comparison.difference, '+')} points")


def _head(benchmark: str, tasks: int, samples: int) -> str:
    return f"{benchmark}, {tasks} tasks, {samples} sample{'s' * (samples > 1)} each"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        table.add_column(title, overflow="fold", justify="right" if number else "left")
    return table


def _percent(interval: Interval, sign: str = "") -> str:
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _limits(interval: Interval) -> str:
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _points(share: float, unit: str = " points") -> str:
    return f"{100 * share:+.1f}{unit}"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _p(comparison: Comparison | GroupComparison) -> str:
    text = f"{comparison.test.method}, p = {_number(comparison.test.p)}"
    if comparison.comparisons > 1:
        count = comparison.comparisons
        text += f", {_number(comparison.p_holm)} after Holm's correction for {count} comparisons"
    return text


def _number(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _write(path: Path, comparisons: Sequence[Comparison | GroupComparison]) -> None:
    entries = [
        {
            **asdict(comparison),
            "shown": comparison.shown,
            "words": words(comparison)
            if isinstance(comparison, Comparison)
            else group_words(comparison),
        }
        for comparison in comparisons
    ]
    write_asked(path, {"format": FORMAT, "comparisons": entries}, "comparison")
