"""A small benchmark, a tiny model and a runner that starts nothing, for whole evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flex.evals.engine import HfEngine
from flex.evals.journal import Outcome
from flex.evals.run import Evaluation, SamplingPlan
from flex.evals.sampling import Sampling
from flex.evals.subject import Subject
from flex.evals.tasks import Benchmark, Program, Task

KINDS = ("passed", "wrong", "exception", "compile")


def benchmark(tasks: int = 6) -> Benchmark:
    made = tuple(
        Task(
            f"T/{i}",
            "py",
            f"def f{'x' * i}():\n",
            ("Z",),
            "before:",
            ":after",
            reference=(f"def f{i}(a):\n", f"    return {'a' * (i + 1)} + 1\n"),
        )
        for i in range(tasks)
    )
    source = {"file": "made", "sha256": "00"}
    return Benchmark("made", "py", made, source, {"stops": ["Z"], "prompt": "plain"}, 8)


class FakeRunner:
    """Decides by the sha256 of the source; `before` is called ahead of each program."""

    def __init__(
        self,
        language: str = "py",
        workers: int = 2,
        allow_unsandboxed: bool = False,
        toolchain: str | None = "Fake 1.0",
        level: str = "fake",
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.level, self.toolchain, self.before = level, toolchain, before
        self.sources: list[str] = []
        self.closed = False

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed = True

    def run_many(self, programs: Iterable[tuple[Any, Program]]) -> Iterator[tuple[Any, Outcome]]:
        for key, program in programs:
            self.before()
            self.sources.append(program.source)
            if self.toolchain is None:
                yield key, Outcome("missing", 0.0, "no Fake")
                continue
            number = hashlib.sha256(program.source.encode()).digest()[0]
            yield key, Outcome(KINDS[number % 4], 0.01, "said")


def evaluation(
    runner: Any = None,
    tasks: int = 6,
    samples: int = 4,
    dtype: Any = "bfloat16",
    batch_size: int = 3,
    engine: Any = None,
    seed: int = 0,
    probe: Any = None,
) -> Evaluation:
    """shape:tiny, sampled, 8 new tokens."""
    sampling = Sampling(1.0, 0.95)
    subject = Subject(model="shape:tiny", dtype=dtype, device="cpu")
    plan = SamplingPlan(sampling=sampling, samples=samples, max_new_tokens=8, seed=seed)
    engine = engine or HfEngine(subject, sampling, 8, batch_size)
    return Evaluation(
        benchmark(tasks), plan, subject.describe(), engine, runner or FakeRunner(), probe
    )
