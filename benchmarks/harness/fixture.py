"""The fixture `bench`: gate, then time, then rows. The package's docstring shows both calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.harness import statistics, timing
from benchmarks.harness.figure import MEASURED, OURS, Figure, Gate, Missing, Work
from benchmarks.harness.session import NO_GPU, Session

RED = "red gate"
DISABLED = "not measured: benchmarks are disabled"


class RedGate(AssertionError):
    """A result is wrong, so its speed is not told."""


class Bench:
    """What a benchmark is given.

    Attributes:
        device: torch.device to make operands on.
        tiny: small shapes are wanted: a trial of the code, or the interpreter.
        impl: of our kernels: "torch" on a CPU, "triton" for --device cuda, with or without a GPU.
        config: pytest's, for options.
    """

    def __init__(self, session: Session, suite: str, request: pytest.FixtureRequest) -> None:
        self.session, self.suite, self._request = session, suite, request
        self.config = request.config
        self.device: torch.device = session.torch_device
        self.tiny: bool = session.tiny or session.lacks_gpu
        self.impl = "triton" if session.device == "cuda" else "torch"

    def compare(
        self,
        name: str,
        ours: timing.Step,
        peers: Mapping[str, timing.Step | Missing],
        gate: Callable[[], Gate],
        *,
        shape: str,
        dtype: str,
        work: Work | None = None,
        aims: Mapping[str, float] | None = None,
        settings: Mapping[str, str] | None = None,
        seconds: float | None = None,
        memory: bool = False,
    ) -> list[Figure]:
        """Check, then time all variants in turns. Once a test: pytest-benchmark keeps one figure for each.

        Args:
            name: of the figure, unique in its file for one shape and dtype.
            ours, peers: calls to be timed; they must not grow or shrink what they work on.
            gate: checks results, before anything is timed.
            shape, dtype: in words, part of the figure's identity.
            work: for the floor; none: no floor.
            aims: largest ratio ours / peer aimed at, by peer. A missed one is shown, not failed: times vary.
            settings: how a variant was run, by variant.
            seconds: about how long to measure; none: --seconds.
            memory: also profile one call of each variant for its peak.

        Raises: RedGate.
        """
        steps = {OURS: ours, **{n: p for n, p in peers.items() if not isinstance(p, Missing)}}
        samples: dict[str, Sequence[float] | Missing] = {OURS: (), **peers}  # type: ignore[dict-item]
        options: dict[str, Any] = {"shape": shape, "dtype": dtype, "aims": aims}
        options |= {"settings": settings, "work": work}
        checked = self._check(name, gate, samples, options)
        if self.session.lacks_gpu:
            missing = {
                n: p if isinstance(p, Missing) else Missing(NO_GPU) for n, p in peers.items()
            }
            return self.record(name, {OURS: Missing(NO_GPU), **missing}, checked, **options)
        peaks = {n: timing.peak_memory(s, self.device) for n, s in steps.items()} if memory else {}
        benchmark = self._request.getfixturevalue("benchmark")
        seconds = self.session.seconds if seconds is None else seconds
        found = timing.in_turns(benchmark, steps, self.device, seconds)
        for variant in samples:
            if variant in steps:
                samples[variant] = found[variant] or Missing(DISABLED)
        return self.record(name, samples, checked, memory=peaks, **options)

    def record(
        self,
        name: str,
        samples: Mapping[str, Sequence[float] | Missing],
        gate: Gate,
        *,
        shape: str,
        dtype: str,
        unit: str = "s",
        work: Work | None = None,
        aims: Mapping[str, float] | None = None,
        memory: Mapping[str, float | None] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> list[Figure]:
        """Rows from samples taken elsewhere: one variant each, those of peers with the ratio ours / peer.

        Args:
            samples: by variant, "ours" among them if there is a ratio to tell.
            unit: of the samples, see `Figure`; less must be better, but for "1".
            memory: peak bytes by variant. The rest: as in `compare`.

        Raises: RedGate, after the rows "red gate" are kept.
        """
        work, aims, memory, settings = work or Work(), aims or {}, memory or {}, settings or {}
        for what, keys in (("aims", aims), ("memory", memory), ("settings", settings)):
            if unknown := set(keys) - set(samples):
                raise ValueError(f"{what} of {sorted(unknown)}; variants: {', '.join(samples)}")
        rows = []
        for variant, values in samples.items():
            row = Figure(
                *(self.suite, name, self.session.device, shape, dtype, variant),
                unit=unit,
                aim=aims.get(variant),
                bytes=work.bytes or None,
                flops=work.flops or None,
                settings=settings.get(variant, ""),
                gate=gate.what,
                gate_error=gate.error,
                gate_limit=gate.limit,
                commit=self.session.commit,
                machine=self.session.card["id"],
                time=f"{self.session.started:%Y-%m-%dT%H:%M:%SZ}",
            )
            if not gate.green:
                row = replace(row, status=RED)
            elif isinstance(values, Missing):
                row = replace(row, status=values.why)
            else:
                row = self._measured(row, values, samples.get(OURS), work)
                row = replace(row, peak_memory=memory.get(variant))
            rows.append(row)
        self.session.add(rows)
        if not gate.green:
            raise RedGate(f"{name}: {gate}; no speed is told")
        return rows

    def _check(
        self, name: str, gate: Callable[[], Gate], samples: Mapping[str, Any], options: dict
    ) -> Gate:
        """The gate's result; an assertion that failed in it is a red gate."""
        try:
            found = gate()
        except AssertionError as error:
            words = (str(error).splitlines() or ["assertion failed"])[0]
            self.record(name, samples, Gate(words, float("inf")), **options)
            raise
        if not found.green:
            self.record(name, samples, found, **options)  # raises
        return found

    def _measured(self, row: Figure, values: Sequence[float], ours: Any, work: Work) -> Figure:
        middle = statistics.median(values)
        row = replace(
            row,
            status=MEASURED,
            median=middle.value,
            low=middle.low,
            high=middle.high,
            samples=tuple(values),
        )
        if row.unit == "s" and (work.bytes or work.flops):
            floor = self.session.ceilings.floor(work)
            row = replace(row, floor=floor, floor_share=floor / middle.value)
        if row.variant != OURS and ours is not None and not isinstance(ours, Missing):
            found = statistics.ratio(ours, values)
            row = replace(row, ratio=found.value, ratio_low=found.low, ratio_high=found.high)
        return row
