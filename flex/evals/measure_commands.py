"""`python -m flex nll` and `merge-check`: load, measure, print. Logging is set up by the caller."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flex.errors import ConfigError
from flex.evals import nll
from flex.evals.benchmarks import load_benchmark
from flex.evals.command import check_counts, subject
from flex.evals.engine import versions
from flex.evals.merge_check import MergeCheck, check
from flex.evals.results import write_asked


def nll_command(args: argparse.Namespace) -> int:
    """Measure, print, compare. Returns 0. Raises FlexError."""
    check_counts(args, "limit")
    files = args.data or [None] * len(args.benchmark)
    if len(files) != len(args.benchmark):
        raise ConfigError(
            f"{len(args.benchmark)} benchmarks and {len(files)} files",
            "each file is the data of one benchmark",
            "give as many to --data as to --benchmark, or none",
        )
    other = nll.load(Path(args.against)) if args.against else None
    benchmarks = [
        load_benchmark(name, file and Path(file), args.limit)
        for name, file in zip(args.benchmark, files, strict=True)
    ]
    system = subject(args, merged=args.merged)
    described = system.describe()
    report = nll.NllReport(
        benchmarks=tuple(
            {"name": b.name, "source": b.source, "tasks": len(b.tasks)} for b in benchmarks
        ),
        model=described,
        engine={"device": str(system.where), "versions": versions("torch", "transformers", "peft")},
        tasks=nll.measure(system.load(), system.tokenizer(), benchmarks),
    )
    if args.json:
        nll.save(report, Path(args.json))
    _print_nll(report, other, args.against)
    return 0


def _print_nll(report: nll.NllReport, other: nll.NllReport | None, name: str | None) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    table = _table("language", "tasks", "nats per token", "bits per byte")
    for figure in nll.figures(report):
        found = figure.per_token
        told = f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"
        table.add_row(figure.language, str(figure.tasks), told, f"{figure.bits_per_byte:.4f}")
    console.print(table)
    if other is None:
        return
    console.print(f"\nminus {name}, by task (below 0: this one finds the references likelier)")
    table = _table("language", "tasks", "nats per token", "p")
    for entry in nll.compare(other, report):
        d = entry.difference
        told = f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
        table.add_row(entry.language, str(entry.tasks), told, f"{entry.test.p:.2g}")
    console.print(table)


def merge_check_command(args: argparse.Namespace) -> int:
    """Load both models, compare, print. Returns 0. Raises FlexError."""
    check_counts(args, "limit", "max_new_tokens", "batch_size")
    if args.adapter is None:
        raise ConfigError(
            "merge-check without --adapter",
            "it compares an adapter with the same adapter merged",
            "give the adapter's folder",
        )
    benchmark = load_benchmark(args.benchmark, args.data and Path(args.data), args.limit)
    system = subject(args)
    described = system.describe()
    # An adapter trained beside 4 bits is merged into the full-precision base all the same.
    unmerged, merged = system.load(), replace(system, merged=True, quantise=None).load()
    found = check(
        unmerged, merged, system.tokenizer(), benchmark, args.max_new_tokens, args.batch_size
    )
    if args.json:
        record = {
            "format": "flex-merge-check-1",
            "model": described,
            "benchmark": {"name": benchmark.name, "source": benchmark.source},
            "max_new_tokens": args.max_new_tokens,
            **asdict(found),
        }
        write_asked(Path(args.json), record)
    _print_check(found, args.dtype, args.quantise)
    return 0


def _print_check(found: MergeCheck, dtype: str, quantise: str | None) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        f"merged against unmerged, {dtype}"
        f"{', merged into the full base, unmerged beside the 4-bit one' if quantise else ''}",
        style="bold",
    )
    table = _table("", "")
    table.show_header = False
    share = 100 * found.agreeing / found.positions
    table.add_row("logits, largest difference", f"{found.largest:.2e}")
    table.add_row("logits, mean of a position's largest", f"{found.mean:.2e}")
    table.add_row("largest logit", f"{found.scale:.1f}")
    table.add_row(
        "likeliest token the same", f"{found.agreeing} of {found.positions} ({share:.2f} %)"
    )
    count = len(found.diverged)
    table.add_row("greedy completions that differ", f"{count} of {found.completions}")
    if found.diverged:
        places = sorted(place for _, place in found.diverged)
        middle = places[len(places) // 2]
        table.add_row("new tokens before they part", f"first {places[0]}, median {middle}")
    console.print(table)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    return table
