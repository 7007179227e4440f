"""metrics.jsonl: one flat record per step, each step once, whatever was killed in between.

JSON has no nan and no infinity, so they are held as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from .files import write_atomic

log = logging.getLogger("flex.metrics_file")

_NON_FINITE = ("nan", "inf", "-inf")


class MetricsFile:
    """Appends records, unbuffered: what was written survives a kill.

    A disk that refuses does not stop the run: it is logged once, and on `close` with a count.
    """

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "ab", buffering=0)  # noqa: SIM115
        self._lost = 0
        self._torn = False  # the last line may be incomplete

    def append(self, record: dict[str, Any]) -> None:
        line = (b"\n" if self._torn else b"") + _line(record)
        try:
            self._torn = self._stream.write(line) != len(line)
            if self._torn:
                raise OSError("the line was only partly written")
        except OSError as err:
            self._torn = True
            self._lost += 1
            if self._lost == 1:
                log.error("%s: a record was lost: %s; training goes on", self._stream.name, err)

    def close(self) -> None:
        self._stream.close()
        if self._lost:
            log.error("%s: %d records were lost", self._stream.name, self._lost)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line cut short by a kill is left out, logged with a count."""
    if not path.exists():
        return []
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError):
            broken += 1
        else:
            records.append({k: float(v) if v in _NON_FINITE else v for k, v in record.items()})
    if broken:
        log.warning("%s: %d unreadable lines left out", path, broken)
    return records


def truncate_after(path: Path, step: int) -> int:
    """Cut the records of steps after `step`, atomically; returns how many. No-op without a file."""
    if not path.exists():
        return 0
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= step]
    data = b"".join(_line(record) for record in kept)
    if path.read_bytes() != data:
        write_atomic(path, data)
    cut = len(records) - len(kept)
    if cut:
        log.info("%s: cut %d records of an earlier attempt, after step %d", path, cut, max(step, 0))
    return cut


def _line(record: dict[str, Any]) -> bytes:
    encoded = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(encoded, allow_nan=False).encode() + b"\n"
