"""A whole evaluation: generate, run, write the result. A kill at any point costs little: the same
command goes on from the journal and ends with the same bytes."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flex.errors import ConfigError, DataError
from flex.evals.engine import Engine
from flex.evals.generate import Request
from flex.evals.journal import Journal, Key, Outcome, differing, journal_path
from flex.evals.progress import Meter
from flex.evals.results import EvalReport, load, save, save_timing, tasks_from
from flex.evals.sampling import Sampling, sample_seed
from flex.evals.tasks import Benchmark, Program

log = logging.getLogger("flex.evals")


class Runner(Protocol):
    """The part of execute.Runner that is used here."""

    @property
    def level(self) -> str: ...
    @property
    def toolchain(self) -> str | None: ...
    def run_many(
        self, programs: Iterable[tuple[Any, Program]]
    ) -> Iterator[tuple[Any, Outcome]]: ...


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How completions are made, the same for every system that is compared.

    Raises ConfigError: fewer than one sample, or several greedy ones, which would all be the same.
    """

    sampling: Sampling = Sampling()
    samples: int = 1
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples = {self.samples}", "nothing would be run", "give 1 or more")
        if self.samples > 1 and self.sampling.greedy:
            raise ConfigError(
                f"{self.samples} samples with temperature 0",
                "greedy decoding gives the same completion each time",
                "give --temperature, such as 0.2, or leave --samples out",
            )

    def describe(self, benchmark: Benchmark) -> dict[str, Any]:
        """The `protocol` section of a result."""
        return {
            **benchmark.protocol,
            "max_new_tokens": self.max_new_tokens,
            "samples": self.samples,
            "seed": self.seed,
            "temperature": float(self.sampling.temperature),
            "top_p": float(self.sampling.top_p),
        }

    def requests(self, benchmark: Benchmark) -> list[Request]:
        """Every completion that the result will hold."""
        return [
            Request(
                task.task_id,
                number,
                sample_seed(self.seed, task.task_id, number),
                task.prompt,
                task.stops,
            )
            for task in benchmark.tasks
            for number in range(self.samples)
        ]


@dataclass(frozen=True)
class Evaluation:
    """One system on one benchmark.

    Attributes:
        model: the `model` section of the result, see `Subject.describe`.
        probe: finds the tasks that nothing can solve; None leaves that open.
    """

    benchmark: Benchmark
    plan: SamplingPlan
    model: dict[str, Any]
    engine: Engine
    runner: Runner
    probe: Callable[[], tuple[str, ...]] | None = None

    def run(self, out: Path) -> EvalReport:
        """Do what is left to do, and write `out` and its times.

        A result that is there already, of the same settings, is returned as it is.

        Raises DataError: `out` is of other settings, or the disk refuses.
        """
        sections = self._sections()
        execution = {"sandbox": self.runner.level, "toolchain": self.runner.toolchain}
        if out.exists() and (found := self._finished(out, sections, execution)) is not None:
            return found
        if self.runner.toolchain is None:
            log.warning(
                "no tool chain for %s: completions are generated and kept, but none can be run",
                self.benchmark.language,
            )
        with Journal(journal_path(out), sections, execution) as journal:
            made = self._generate(journal)
            ran = self._execute(journal)
            report = self._report(journal, sections)
            figures = {"tokens_per_second": made.rate, "generated_now": made.made}
            seconds = {"generate_seconds": made.seconds, "run_seconds": ran.seconds}
            ids = [task.task_id for task in self.benchmark.tasks]
            save_timing(out, journal, ids, self.plan.samples, **figures, **seconds)
            save(report, out)  # after the times: where there is a result, they are there too
            if report.missing:
                log.warning(
                    "%s is kept: once the tool chain is there, the same command runs the completions",
                    journal.path,
                )
            else:
                journal.delete()
        return report

    def _sections(self) -> dict[str, Any]:
        """All that a completion depends on, as it comes back from JSON."""
        sections = {
            "benchmark": {
                "name": self.benchmark.name,
                "language": self.benchmark.language,
                "source": self.benchmark.source,
                "tasks": len(self.benchmark.tasks),
            },
            "protocol": self.plan.describe(self.benchmark),
            "model": self.model,
            "engine": self.engine.describe(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(sections, allow_nan=False))
        return plain

    def _finished(
        self, out: Path, sections: dict[str, Any], execution: dict[str, Any]
    ) -> EvalReport | None:
        """The result that is there; None if it waits for a tool chain."""
        report = load(out)
        there = {name: getattr(report, name) for name in (*sections, *execution)}
        if report.missing and journal_path(out).exists():
            asked, there = sections, {name: there[name] for name in sections}
        else:
            asked = {**sections, **execution}
        keys = sorted(differing(there, asked))
        if self.probe is not None and report.unsolvable is None:
            keys.append("unsolvable")
        if keys:
            raise DataError(
                f"{out} exists and differs in {', '.join(keys)}",
                "a result is never overwritten",
                f"give another --out; then `python -m flex compare {out} OTHER` shows what changed",
            )
        if report.missing and journal_path(out).exists():
            return None
        log.info("%s exists with the same settings: nothing is done again", out)
        journal_path(out).unlink(missing_ok=True)  # killed between the result and this line
        return report

    def _generate(self, journal: Journal) -> Meter:
        requests = self.plan.requests(self.benchmark)
        done = dict(journal.samples)
        with Meter("generating", len(requests), len(done)) as meter:
            if len(done) < len(requests):
                for key, made in self.engine.generate(requests, done):
                    journal.add_sample(key, made)
                    meter.add(made.new_tokens)
        return meter

    def _execute(self, journal: Journal) -> Meter:
        """Run what has no verdict yet; completions of a task with the same text are run once."""
        same: dict[tuple[str, str], list[Key]] = defaultdict(list)
        for task_id, number in sorted(journal.samples.keys() - journal.verdicts.keys()):
            same[task_id, journal.samples[task_id, number].text].append((task_id, number))
        tasks = {task.task_id: task for task in self.benchmark.tasks}
        programs = ((each, tasks[each[0]].program(each[1])) for each in same)
        with Meter("running", len(journal.samples), len(journal.verdicts)) as meter:
            for each, outcome in self.runner.run_many(programs):
                for key in same[each]:
                    journal.add_verdict(key, outcome)
                    meter.add()
        return meter

    def _report(self, journal: Journal, sections: dict[str, Any]) -> EvalReport:
        ids = [task.task_id for task in self.benchmark.tasks]
        return EvalReport(
            **sections,
            sandbox=self.runner.level,
            toolchain=self.runner.toolchain,
            unsolvable=None if self.probe is None else self.probe(),
            tasks=tasks_from(journal, ids, self.plan.samples),
        )
