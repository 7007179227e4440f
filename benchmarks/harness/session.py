"""One run of the benchmarks: its device, ceilings, figures and the files that they are written to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ceilings, machine
from benchmarks.harness.figure import Figure, as_csv
from flex.files import write_atomic

NO_GPU = "not measured: no GPU"


@dataclass
class Session:
    """device: "cpu" or "cuda", as asked for. tiny: small shapes. results: folder, or None to write nothing."""

    device: str
    tiny: bool
    threads: int
    seconds: float
    results: Path | None
    figures: list[Figure] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def lacks_gpu(self) -> bool:
        return self.device == "cuda" and not torch.cuda.is_available()

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu" if self.lacks_gpu else self.device)

    @cached_property
    def ceilings(self) -> ceilings.Ceilings:
        return ceilings.measure(self.torch_device, self.tiny)

    @cached_property
    def card(self) -> dict[str, Any]:
        return machine.card(self.threads)

    @cached_property
    def commit(self) -> str:
        return machine.commit()

    @cached_property
    def csv(self) -> Path:
        """A file of this run alone: <UTC time>-<commit>-<device>.csv."""
        assert self.results is not None
        self.results.mkdir(parents=True, exist_ok=True)
        stem = f"{self.started:%Y%m%dT%H%M%SZ}-{self.commit}-{self.device}" + "-tiny" * self.tiny
        for suffix in ("", *(f"-{i}" for i in range(2, 100))):
            path = self.results / f"{stem}{suffix}.csv"
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return path
        raise FileExistsError(f"{self.results}/{stem}*.csv: a hundred runs in one second")

    def add(self, figures: list[Figure]) -> None:
        """Keep rows, and replace the file: a run that is cut short leaves what it has measured."""
        self.figures += figures
        if self.results is not None:
            write_atomic(self.csv, as_csv(self.figures).encode())

    def close(self) -> list[Path]:
        """Write the card and the plots beside the CSV; the files of this run."""
        if self.results is None or not self.figures:
            return []
        from benchmarks.harness.plots import plot

        found = {**self.card, "commit": self.commit, "time": f"{self.started:%Y-%m-%dT%H:%M:%SZ}"}
        if "ceilings" in self.__dict__:
            found["ceilings"] = vars(self.ceilings)
        card, image = self.csv.with_suffix(".json"), self.csv.with_suffix(".png")
        write_atomic(card, (json.dumps(found, indent=1) + "\n").encode())
        return [self.csv, card, *([image] if plot(self.figures, image) else [])]
