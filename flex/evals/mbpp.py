"""MBPP: write a Python function from one sentence and one test.

A program is the solution, then `test_setup_code`, then the asserts: with the set-up first, tasks
367 and 927 fail with their own solutions. The challenge tests are not part of the benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flex.data.ledger import BadRow
from flex.data.reading import field, int_field, text_field, text_list
from flex.evals.reading import HubSet, make_tasks, read_rows, warn_if_partial
from flex.evals.tasks import Benchmark, Task

HUB = HubSet("google-research-datasets/mbpp", ("full/*.parquet",))
TEST_SPLIT = range(11, 511)  # the authors' README
TASKS = 974
# Those of BigCode's harness.
STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
PROMPT = "docstring of the text and the first assert (InCoder), zero-shot"


def load(name: str, data: Path | None = None) -> Benchmark:
    """`mbpp`, the 500 tasks of the test split, or `mbpp-all`. Raises DataError."""
    rows = read_rows(data, HUB, name)
    ids = TEST_SPLIT if name == "mbpp" else None

    def make(row: dict[str, Any]) -> Task | None:
        task = _task(row)
        return task if ids is None or row["task_id"] in ids else None

    tasks = make_tasks(name, rows, "mbpp", make)
    warn_if_partial(name, tasks, TASKS if ids is None else len(ids))
    protocol = {
        "prompt": PROMPT,
        "program": "completion, test_setup_code, test_list",
        "split": "ids 1 to 974" if ids is None else "test, ids 11 to 510",
        "stops": list(STOPS),
    }
    return Benchmark(name, "py", tasks, rows.source, protocol)


def docstring_prompt(text: str, tests: Sequence[str]) -> str:
    """InCoder's prompt: what to write and one example, as a module's docstring."""
    return f'"""\n{text}\n{tests[0]}\n"""\n'


def _task(row: dict[str, Any]) -> Task:
    tests = text_list(field(row, "test_list"), "test_list")
    if not tests:
        raise BadRow("empty field", "`test_list`")
    prompt = docstring_prompt(text_field(row, "text"), tests)
    # Its CRLF line ends are none that a model should be asked for; see flex.data.prompts.
    code = text_field(row, "code").replace("\r\n", "\n").replace("\r", "\n")
    setup = text_field(row, "test_setup_code", empty=True)
    return Task(
        task_id=f"MBPP/{int_field(row, 'task_id')}",
        language="py",
        prompt=prompt,
        stops=STOPS,
        before="",
        after="\n" + "\n".join([setup, *tests]) + "\n",
        solution=code,
        reference=(prompt, code),
    )
