"""Result files without an evaluation: what each task's samples came to is given."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flex.evals.compare import System
from flex.evals.results import EvalReport, Sample, TaskResult, save


def made(passed: Sequence[int], samples: int = 1, adapter: str | None = None) -> EvalReport:
    """A report with that many passes for each task; what does not pass is "wrong"."""
    tasks = []
    for number, count in enumerate(passed):
        verdicts = ["passed"] * count + ["wrong"] * (samples - count)
        tasks.append(
            TaskResult(
                f"T/{number}",
                tuple(
                    Sample(1000 * number + i, f"return {verdict}", 7, "stop", verdict)
                    for i, verdict in enumerate(verdicts)
                ),
            )
        )
    return EvalReport(
        benchmark={
            "name": "humaneval",
            "language": "python",
            "source": {"file": "h.jsonl", "sha256": "ab"},
            "tasks": len(tasks),
        },
        protocol={
            "prompt": "stripped",
            "stops": ["\nclass", "\ndef"],
            "max_new_tokens": 512,
            "temperature": 0.0 if samples == 1 else 0.2,
            "top_p": 1.0,
            "samples": samples,
            "seed": 0,
        },
        model={
            "id": "m",
            "revision": None,
            "adapter": adapter,
            "merged": False,
            "dtype": "float32",
            "quantised": None,
        },
        engine={"name": "transformers", "dtype": "float32", "batch_size": 8},
        sandbox="bubblewrap",
        toolchain="Python 3.11.2",
        tasks=tuple(tasks),
    )


def changed(report: EvalReport, section: str, **values) -> EvalReport:
    return replace(report, **{section: {**getattr(report, section), **values}})


def judged(report: EvalReport, task: int, verdict: str, sample: int = 0) -> EvalReport:
    """The report with another verdict on one sample."""
    old = report.tasks[task]
    samples = list(old.samples)
    samples[sample] = replace(samples[sample], verdict=verdict)
    tasks = list(report.tasks)
    tasks[task] = TaskResult(old.task_id, tuple(samples))
    return replace(report, tasks=tuple(tasks))


def saved(folder: Path, name: str, report: EvalReport) -> str:
    path = folder / f"{name}.json"
    save(report, path)
    return str(path)


def paired(both: int, lost: int, gained: int, neither: int) -> tuple[System, System]:
    """Two greedy systems with these four counts of tasks."""
    first = [1] * both + [1] * lost + [0] * gained + [0] * neither
    second = [1] * both + [0] * lost + [1] * gained + [0] * neither
    return System("a.json", made(first, adapter="a")), System("b.json", made(second, adapter="b"))


def runs(name: str, scores: Sequence[int], tasks: int = 50) -> tuple[str, list[System]]:
    """Runs of one method that solve so many of the tasks, beginning with the first."""
    return name, [
        System(f"{name}-{i}.json", made([1] * c + [0] * (tasks - c), adapter=f"{name}{i}"))
        for i, c in enumerate(scores)
    ]
