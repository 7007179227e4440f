"""Options of the benchmarks. Times mean something only on a machine that does nothing else."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flex benchmarks")
    group.addoption("--mbpp", metavar="FILE", type=Path, help="mbpp.jsonl; none: from the Hub")
    group.addoption("--steps", metavar="N", type=int, default=10, help="timed steps a run (10)")
    group.addoption("--results", metavar="DIR", type=Path, help="write result files there")
