"""Options, the fixture `bench` and the table of the benchmarks. How to use them: benchmarks/README.md.

Nothing here imports torch at import time: --device cuda without a GPU must set Triton's interpreter first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SESSION = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flex benchmarks")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what to measure (cpu)"
    )
    group.addoption(
        "--tiny", action="store_true", help="small shapes: tries the code, times mean nothing"
    )
    group.addoption("--seconds", type=float, default=10.0, help="to measure a figure for (10)")
    group.addoption("--threads", type=int, help="of torch; default: all cores that may be used")
    results = Path(__file__).with_name("results")
    group.addoption(
        "--results",
        metavar="DIR",
        type=Path,
        default=results,
        help="result files (benchmarks/results)",
    )
    group.addoption("--no-results", action="store_true", help="print the table, write nothing")
    group.addoption(
        "--mbpp", metavar="FILE", type=Path, help="mbpp.jsonl; none: the built-in tasks"
    )
    group.addoption(
        "--steps", metavar="N", type=int, default=5, help="timed steps of a training run (5)"
    )


def pytest_configure(config: pytest.Config) -> None:
    # torch, which could tell whether there is a GPU, imports triton
    if config.getoption("--device") == "cuda" and not Path("/dev/nvidiactl").exists():
        os.environ["TRITON_INTERPRET"] = "1"
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # its table knows one variant of a figure


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest):
    """The run that figures belong to; torch's threads are put back afterwards."""
    import torch

    from benchmarks.harness.session import Session

    config = request.config
    before = torch.get_num_threads()
    threads = config.getoption("--threads") or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)  # whatever OMP_NUM_THREADS says
    results = None if config.getoption("--no-results") else config.getoption("--results")
    session = Session(
        config.getoption("--device"),
        config.getoption("--tiny"),
        threads,
        config.getoption("--seconds"),
        results,
    )
    config.stash[SESSION] = session
    yield session
    torch.set_num_threads(before)


@pytest.fixture
def bench(bench_session, request: pytest.FixtureRequest):
    """See benchmarks/harness/__init__.py."""
    from benchmarks.harness import Bench

    return Bench(bench_session, request.path.stem.removeprefix("test_"), request)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is None or not session.figures:
        return
    from benchmarks.harness.table import render

    terminalreporter.section("benchmarks")
    for text in render(session):
        terminalreporter.write_line(text)
    for path in session.close():
        terminalreporter.write_line(f"written: {os.path.relpath(path)}")
