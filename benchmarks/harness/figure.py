"""What a benchmark says: a Figure per variant, the gate before it, the work it must do; and the CSV of them.

A figure is a name ("lora_linear p=0.05") with several variants: "ours" and peers. Each variant is a row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

SCHEMA = 1  # raise it when FIELDS change: compare.py refuses to read rows of another schema
OURS = "ours"
MEASURED = "measured"


@dataclass(frozen=True)
class Gate:
    """What was checked before a speed may be told, and how far off it was.

    Attributes:
        what: in words: "y, dx, dA, dB: share of the error budget".
        error: the error seen; the gate is green if it is at most `limit` (NaN is red).
        limit: in the same unit.
    """

    what: str
    error: float
    limit: float = 1.0

    @property
    def green(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.what}: {self.error:.3g} of at most {self.limit:.3g}"


@dataclass(frozen=True)
class Missing:
    """A peer that cannot run here. Its row says why: "not installed", "not measured: no GPU"."""

    why: str = "not installed"


@dataclass(frozen=True)
class Work:
    """What no implementation can avoid, counted by hand: the floor comes from it.

    Attributes:
        bytes: that must be read and written, each once.
        flops: multiplications and additions in matrix products (2 M N K each).
        dtype: of the products, "bf16" or "fp32": which measured GEMM rate applies.
    """

    bytes: float = 0.0
    flops: float = 0.0
    dtype: str = "fp32"


@dataclass(frozen=True)
class Figure:
    """One variant of one figure; a row of the CSV. Optional numbers are None: an empty cell.

    Attributes:
        suite: file of the benchmark, without "test_". name, shape, dtype, device: what was measured.
        variant: "ours" or the peer's name.
        status: "measured", or why there is no number: "red gate", "not installed", ...
        unit: of median, low, high and floor: "s" (seconds a call), "s/token", "bytes", "1". Of all of them
            less is better, but of "1" (an exponent, a share) nothing is said.
        median, low, high: of the samples, and the limits of its 95 % interval.
        ratio, ratio_low, ratio_high: ours / this peer, in rows of peers only.
        aim: the largest ratio aimed at, if there is an aim.
        floor: max(bytes / bandwidth, flops / rate) of the ceilings measured in the same run.
        floor_share: floor / median; 1 is as fast as the machine allows.
        bytes, flops: the counted work behind the floor.
        peak_memory: bytes that one call needs beyond its inputs, or of a whole process; `settings` says which.
        gate, gate_error, gate_limit: see Gate.
        samples: rounds measured, in their order.
        settings: words on how this variant was run.
        commit, machine, time: set by the session.
    """

    suite: str
    name: str
    device: str
    shape: str
    dtype: str
    variant: str
    status: str = MEASURED
    unit: str = "s"
    median: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    aim: float | None = None
    floor: float | None = None
    floor_share: float | None = None
    bytes: float | None = None
    flops: float | None = None
    peak_memory: float | None = None
    gate: str = ""
    gate_error: float | None = None
    gate_limit: float | None = None
    samples: tuple[float, ...] = field(default=())
    settings: str = ""
    commit: str = ""
    machine: str = ""
    time: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes rows of two runs the same measurement."""
        return (self.suite, self.name, self.device, self.shape, self.dtype, self.variant)


TEXTS = frozenset(f.name for f in fields(Figure) if f.type == "str")
FIELDS = ("schema", *(f.name for f in fields(Figure)))


class SchemaError(ValueError):
    """A file of results that this version does not read."""


def as_csv(figures: Iterable[Figure]) -> str:
    """Header and rows. Numbers keep 6 digits, which is more than any of them is good for."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for figure in figures:
        writer.writerow({"schema": SCHEMA, **{k: _cell(v) for k, v in asdict(figure).items()}})
    return out.getvalue()


def read_csv(path: Path) -> list[Figure]:
    """The rows of a results file.

    Raises: SchemaError: columns or schema are not this version's. OSError.
    """
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    found = {row["schema"] for row in rows if "schema" in row} or {str(SCHEMA)}
    if tuple(reader.fieldnames or ()) != FIELDS or found != {str(SCHEMA)}:
        raise SchemaError(
            f"{path}: schema {', '.join(sorted(found))} with {len(reader.fieldnames or ())} columns; "
            f"this version reads schema {SCHEMA} with {len(FIELDS)}. Measure again, or read it with its own commit."
        )
    return [_figure(row) for row in rows]


def _cell(value: object) -> object:
    if isinstance(value, tuple):
        return " ".join(f"{x:.6g}" for x in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _figure(row: dict[str, str]) -> Figure:
    def value(name: str) -> object:
        if name in TEXTS:
            return row[name]
        if name == "samples":
            return tuple(map(float, row[name].split()))
        return float(row[name]) if row[name] else None

    return Figure(**{name: value(name) for name in FIELDS[1:]})  # type: ignore[arg-type]


def peers(figures: Sequence[Figure]) -> list[tuple[Figure | None, Figure]]:
    """(our row or None, peer's row) of each figure; a figure without peers is (row, row)."""
    ours = {f.key[:-1]: f for f in figures if f.variant == OURS}
    alone = ours.keys() - {f.key[:-1] for f in figures if f.variant != OURS}
    return [(ours.get(f.key[:-1]), f) for f in figures if f.variant != OURS or f.key[:-1] in alone]
