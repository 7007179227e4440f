"""The one table that is printed at the end."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.harness.figure import MEASURED, OURS, Figure, peers
from benchmarks.harness.machine import describe
from benchmarks.harness.session import Session

WIDTH = 400  # beyond any row: none is folded or cut, so that they can be searched
COLUMNS = (
    "figure",
    "shape",
    "dtype",
    "peer",
    "ours",
    "peer's",
    "ratio",
    "aim",
    "floor",
    "share",
    "memory",
)
LEFT = 4  # columns of words


def render(session: Session) -> Iterator[str]:
    """Lines: machine, ceilings, table, legend."""
    yield describe(session.card)
    measured = [f for f in session.figures if f.status == MEASURED]
    if any(f.floor for f in measured):
        yield f"ceilings of this run: {session.ceilings}"
    if session.tiny:
        yield "--tiny: the code was tried, the times mean nothing"
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(as_table(session.figures))
    yield from (line.rstrip() for line in out.getvalue().splitlines())
    yield (
        "ratio: ours / peer, medians of rounds in turns, with 95 % limits; aim: the largest wanted. floor: the counted "
        "work at the ceilings; share: floor / ours. memory: of one call, ours / peer's. Gates passed first."
    )


def as_table(figures: Sequence[Figure]) -> Table:
    """A row per figure and peer."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(COLUMNS):
        table.add_column(title, justify="left" if i < LEFT else "right", no_wrap=True)
    for ours, peer in peers(figures):
        table.add_row(*_cells(ours, peer))
    return table


def _cells(ours: Figure | None, peer: Figure) -> list[str]:
    alone = peer.variant == OURS
    best = ours or peer
    found = [f"{peer.suite}: {peer.name}", peer.shape, peer.dtype, "-" if alone else peer.variant]
    found += [_value(ours) if ours else "-", "-" if alone else _value(peer)]
    if peer.ratio is None:
        found.append("-")
    else:
        found.append(f"{peer.ratio:.3f} [{peer.ratio_low:.3f}, {peer.ratio_high:.3f}]")
    found.append(_aim(peer))
    found.append("-" if best.floor is None else quantity(best.floor, best.unit))
    found.append("-" if best.floor_share is None else f"{100 * best.floor_share:.0f} %")
    memory = [
        quantity(f.peak_memory, "bytes") if f and f.peak_memory is not None else "-"
        for f in (ours, peer)
    ]
    found.append(memory[0] if alone else " / ".join(memory) if memory != ["-", "-"] else "-")
    return found


def _value(figure: Figure) -> str:
    if figure.median is None:
        return figure.status
    return quantity(figure.median, figure.unit)


def _aim(peer: Figure) -> str:
    """The aim and how it stands; within the interval neither can be said."""
    if peer.aim is None:
        return "-"
    if peer.ratio is None or peer.ratio_low is None or peer.ratio_high is None:
        return f"{peer.aim:.3g}"
    verdict = (
        "met" if peer.ratio_high <= peer.aim else "missed" if peer.ratio_low > peer.aim else "open"
    )
    return f"{peer.aim:.3g} {verdict}"


def quantity(value: float, unit: str) -> str:
    """With a prefix that reads well."""
    if unit == "bytes":
        scale, name = (1e9, "GB") if value >= 1e9 else (1e6, "MB") if value >= 1e6 else (1e3, "kB")
        return f"{value / scale:.3g} {name}"
    if unit == "s" or unit.startswith("s/"):
        scale, name = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "us")
        return f"{scale * value:.3g} {name}{unit[1:]}"
    return f"{value:.4g}" + ("" if unit == "1" else f" {unit}")
