"""What a profile shows: a table of ranges, a table of operators or GPU kernels, a Chrome trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .files import write_atomic
from .ranges import STEP, Span

OPERATORS = 15  # rows of the second table
WIDTH = 110  # of table.txt


@dataclass(frozen=True)
class RangeRow:
    """All passages through one range."""

    name: str
    calls: int
    seconds: float  # summed over the calls
    share: float | None  # of the steps' time; none for what runs between steps
    bytes: int | None  # summed over the calls; none where a call had no closed form
    floor: float | None  # bytes / bandwidth, as a share of the time; 1 would be the floor itself


def range_rows(spans: Sequence[Span], bandwidth: float | None = None) -> list[RangeRow]:
    """One row per name: phases in the order they first began, then kernels, the longest first.

    Args:
        spans: of the whole profile.
        bandwidth: bytes per second that the device can move; none: no share of the floor.
    """
    steps = sum(span.seconds for span in spans if span.name == STEP)
    groups: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        groups.setdefault(span.name, []).append(span)
    phases: list[RangeRow] = []
    kernels: list[RangeRow] = []
    for name, group in groups.items():
        seconds = sum(span.seconds for span in group)
        inside = all(span.in_step for span in group)
        known = [span.bytes for span in group if span.bytes is not None]
        total = sum(known) if len(known) == len(group) else None
        row = RangeRow(
            name,
            len(group),
            seconds,
            seconds / steps if inside and steps > 0 else None,
            total,
            total / bandwidth / seconds if total and bandwidth and seconds > 0 else None,
        )
        (kernels if "/" in name else phases).append(row)
    return phases + sorted(kernels, key=lambda row: -row.seconds)


def range_table(title: str, spans: Sequence[Span], bandwidth: float | None = None) -> Table:
    """The rows of `range_rows` for rich; the last two columns only where bytes are known."""
    rows = range_rows(spans, bandwidth)
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, caption_justify="left"
    )
    table.add_column("range", overflow="fold")
    headers = ["calls", "total ms", "ms/call", "of the step"]
    if bandwidth is not None:
        headers += ["MB/call", "of the floor"]
        table.caption = (
            f"floor: bytes at {bandwidth / 1e9:.1f} GB/s, as a copy here moves them; above 100 %: "
            "from cache"
        )
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        cells = [
            f"{row.calls}",
            f"{1e3 * row.seconds:.3f}",
            f"{1e3 * row.seconds / row.calls:.3f}",
            "" if row.share is None else f"{row.share:.1%}",
        ]
        if bandwidth is not None:
            cells.append("" if row.bytes is None else f"{row.bytes / row.calls / 1e6:.3f}")
            cells.append("" if row.floor is None else f"{row.floor:.1%}")
        table.add_row(row.name, *cells)
    return table


def operator_table(operators: Sequence[tuple[str, int, float]]) -> Table:
    """The longest-running operators (on a GPU: kernels) of (name, calls, seconds)."""
    whole = sum(seconds for _, _, seconds in operators)
    title = f"operators by their own time, {min(OPERATORS, len(operators))} of {len(operators)}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("operator or GPU kernel", overflow="fold")
    for header in ("calls", "total ms", "ms/call", "share"):
        table.add_column(header, justify="right")
    for name, calls, seconds in operators[:OPERATORS]:
        numbers = (f"{1e3 * seconds:.3f}", f"{1e3 * seconds / calls:.3f}", f"{seconds / whole:.1%}")
        table.add_row(name, f"{calls}", *numbers)
    return table


def print_tables(
    path: Path,
    title: str,
    spans: Sequence[Span],
    bandwidth: float | None,
    operators: Sequence[tuple[str, int, float]],
) -> None:
    """Print both tables and write them to `path`."""
    tables = [range_table(title, spans, bandwidth)]
    if operators:
        tables.append(operator_table(operators))
    screen = Console(highlight=False, markup=False)
    file = Console(width=WIDTH, color_system=None, highlight=False, markup=False)
    with file.capture() as text:
        for table in tables:
            file.print(table, "")
    for table in tables:
        screen.print(table, "")
    lines = [line.rstrip() for line in text.get().splitlines()]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """The ranges as a Chrome trace: host threads as process 0, the GPU's clock as process 1."""
    events = []
    for span in spans:
        at = {"name": span.name, "ph": "X", "cat": "range", "args": {"bytes": span.bytes}}
        times = {"ts": 1e6 * span.start, "dur": 1e6 * (span.end - span.start)}
        events.append({**at, "pid": 0, "tid": span.thread, **times})
        if span.device_start is not None:
            times = {"ts": 1e6 * span.device_start, "dur": 1e6 * span.seconds}
            events.append({**at, "pid": 1, "tid": 0, **times})
    names = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "host"}}]
    names.append({"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "GPU"}})
    write_atomic(path, json.dumps({"traceEvents": [*names, *events]}).encode())
