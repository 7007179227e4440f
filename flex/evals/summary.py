"""The figures of one result file: pass@k with limits, kinds of failure, compile rate."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from flex.evals.journal import KINDS
from flex.evals.stats import LEVEL, score_interval

if TYPE_CHECKING:
    from flex.evals.results import EvalReport

PASS_AT = (1, 10, 100)  # the k that are reported, as far as there are samples


def summarise(report: EvalReport, intervals: bool = True) -> dict[str, Any]:
    """The figures of a report, JSON values.

    pass_at: for each k in PASS_AT up to the samples there are, the mean of pass@k with its limits;
    None if a tool chain was missing, since nothing is known then. compile_rate: the share of samples
    that are not "compile", of those that were run. cut: samples that ran into max_new_tokens.
    Limits are rounded to 6 digits: the last bits of a bootstrap depend on the processor.
    """
    every = [sample for task in report.tasks for sample in task.samples]
    counts: Counter[str] = Counter(sample.verdict for sample in every)
    ran = len(every) - counts["missing"]
    solvable = None
    if report.unsolvable is not None:
        left = len(report.tasks) - len(report.unsolvable)
        solvable = {"tasks": left, "pass_at": _pass_at(report, True, intervals) if left else None}
    return {
        "tasks": len(report.tasks),
        "samples": report.samples,
        "pass_at": _pass_at(report, False, intervals),
        "level": LEVEL,
        "solvable": solvable,
        "verdicts": {kind: counts[kind] for kind in KINDS},
        "compile_rate": (ran - counts["compile"]) / ran if ran else None,
        "cut": sum(sample.finish == "length" for sample in every),
        "new_tokens": sum(sample.new_tokens for sample in every),
    }


def _pass_at(report: EvalReport, solvable_only: bool, intervals: bool) -> dict[str, Any] | None:
    if report.missing:
        return None
    table: dict[str, Any] = {}
    for k in (k for k in PASS_AT if k <= report.samples):
        scores = report.scores(k, solvable_only)
        if not intervals:
            table[str(k)] = {"value": math.fsum(scores) / len(scores)}
            continue
        found = score_interval(scores, report.samples)
        limits = {"low": round(found.low, 6), "high": round(found.high, 6)}
        table[str(k)] = {"value": found.value, **limits, "method": found.method}
    return table


def without_intervals(summary: Any) -> Any:
    """The summary without low, high and method: another numpy may draw other tasks."""
    if not isinstance(summary, dict):
        return summary
    kept = {key: without_intervals(value) for key, value in summary.items()}
    if "value" in kept:
        kept = {key: x for key, x in kept.items() if key not in ("low", "high", "method")}
    return kept
