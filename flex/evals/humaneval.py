"""HumanEval: complete a Python function from its signature and docstring.

Two forms of the prompt, named as in BigCode's harness. `humaneval` strips it: where a tokenizer joins a line
break and the spaces after it, a prompt that ends in a line break cannot be continued as the model learnt
(SmolLM2 then closes a code fence in a third of the tasks and solves none). `humaneval-unstripped` is
the data's own prompt, with which Code Llama was measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flex.data.reading import text_field
from flex.evals.reading import HubSet, make_tasks, read_rows, warn_if_partial
from flex.evals.tasks import Benchmark, Task

HUB = HubSet("openai/openai_humaneval", ("openai_humaneval/test-*.parquet",))
NAMES = ("humaneval", "humaneval-unstripped")
TASKS = 164
# The Codex paper's, and those that BigCode's harness added.
STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")


def load(name: str, data: Path | None = None) -> Benchmark:
    """The benchmark, of a file or of the Hub. Raises DataError."""
    rows = read_rows(data, HUB, name)
    tasks = make_tasks(name, rows, "humaneval", _task)
    stripped = name == "humaneval"
    if stripped:
        tasks = tuple(replace(task, prompt=task.prompt.strip()) for task in tasks)
    warn_if_partial(name, tasks, TASKS)
    protocol = {
        "prompt": f"as in the data, {'stripped' if stripped else 'not stripped'}",
        "program": "prompt, completion, test, check(entry_point)",
        "stops": list(STOPS),
    }
    return Benchmark(name, "py", tasks, rows.source, protocol)


def python_tests(row: dict[str, Any]) -> str:
    """What follows a completion: the data's `check`, and its call."""
    return f"\n{text_field(row, 'test')}\ncheck({text_field(row, 'entry_point')})\n"


def _task(row: dict[str, Any]) -> Task:
    prompt = text_field(row, "prompt")
    solution = text_field(row, "canonical_solution")
    return Task(
        task_id=text_field(row, "task_id"),
        language="py",
        prompt=prompt,
        stops=STOPS,
        before=prompt,
        after=python_tests(row),
        solution=solution,
        reference=(prompt, solution),
    )
