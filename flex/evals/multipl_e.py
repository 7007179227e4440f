"""MultiPL-E: HumanEval and MBPP translated to other languages by small compilers.

The stop sequence of most languages cuts the end of the function, and the tests begin by closing it.
There are no solutions in the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flex.data.ledger import BadRow
from flex.data.reading import field, text_field
from flex.errors import DataError
from flex.evals.reading import HubSet, make_tasks, read_rows
from flex.evals.tasks import Benchmark, Task

# The commit that BigCode's harness pins: later ones have other prompts and tests.
REVISION = "28441b6024e71d4a1c1c0f6bf171c935cd5a43f2"
_LANGUAGE = {"go_test.go": "go"}  # what the data call a language


def load(name: str, language: str, base: str, data: Path | None = None) -> Benchmark:
    """The benchmark of one language.

    Args:
        base: "humaneval", "mbpp", or "" for HumanEval from the Hub and either of a file; a file of
            MBPP's tasks is then called multipl-e-mbpp-<language>.

    Raises:
        DataError: see `make_tasks`; or the file is of another language or base, or of both.
    """
    config = f"{base or 'humaneval'}-{language}"
    files = (f"{config}/*.parquet", f"data/{config}-reworded.json", f"*{config}-reworded.json*")
    rows = read_rows(data, HubSet("nuprl/MultiPL-E", files, REVISION), name)

    def make(row: dict[str, Any]) -> Task:
        return _task(row, language)

    tasks = make_tasks(name, rows, "multipl-e", make)
    found = sorted({task.task_id.partition("_")[0].lower() for task in tasks})
    if len(found) > 1 or found[0] not in ("humaneval", "mbpp") or (base and found != [base]):
        raise DataError(
            f"{name}: the names of the tasks begin with {', '.join(found)}",
            f"they are to be all of {base or 'humaneval, or all of mbpp'}",
            f"give --data the file {config}-reworded.json",
        )
    if found == ["mbpp"]:
        name = f"multipl-e-mbpp-{language}"
    protocol = {
        "prompt": "as in the data, stripped",
        "program": "prompt, completion, tests",
        "stops": list(tasks[0].stops),
        "base": found[0],
    }
    return Benchmark(name, language, tasks, rows.source, protocol)


def _task(row: dict[str, Any], language: str) -> Task:
    found = text_field(row, "language")
    if _LANGUAGE.get(found, found) != language:
        raise BadRow("wrong language", f"`language` is {found}, not {language}")
    # Stripped as by MultiPL-E and BigCode: the published figures are made like that.
    prompt = text_field(row, "prompt").strip()
    stops = field(row, "stop_tokens")  # no text_list: "\n\n" is one of them
    if not isinstance(stops, list) or not all(stops) or not all(isinstance(s, str) for s in stops):
        raise BadRow("wrong type", "`stop_tokens` is not a list of texts")
    if not stops:
        raise BadRow("empty field", "`stop_tokens`")
    return Task(
        task_id=text_field(row, "name"),
        language=language,
        prompt=prompt,
        stops=tuple(stops),
        before=prompt,
        after="\n" + text_field(row, "tests"),
        main_class="Problem" if language == "java" else "",
    )
