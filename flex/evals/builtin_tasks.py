"""The built-in tasks as two benchmarks, Python and Java, that ask for the same functions.

The reference of both twins has the same context, the text: a difference of likelihoods is then one
of the solutions.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from flex.data import builtin
from flex.evals import mbpp
from flex.evals.tasks import Benchmark, Task

_MAIN = """
}}

class Main {{
    public static void main(String[] args) throws Exception {{
{body}
    }}
}}
"""


def load(name: str) -> Benchmark:
    """`builtin-python` or `builtin-java`, with `-validation` for the tasks that are not trained on.

    Raises:
        DataError: the installation is damaged.
    """
    rows = builtin.split_tasks()[1] if name.endswith("-validation") else builtin.load_tasks()
    java = name.startswith("builtin-java")
    tasks = tuple((_java if java else _python)(row) for row in rows)
    digest = hashlib.sha256()
    for file in sorted(builtin.FOLDER.glob("*.yaml")):
        digest.update(file.read_bytes())
    source = {"builtin": "flex/data/tasks", "sha256": digest.hexdigest()}
    protocol = {
        "prompt": "imports, comment of the text and the first assert, to the method's brace"
        if java
        else mbpp.PROMPT,
        "program": "prompt, completion, closing brace, java_tests in a main method"
        if java
        else "completion, test_list",
        "stops": list(tasks[0].stops),
        "split": "validation" if name.endswith("-validation") else "all",
    }
    return Benchmark(name, "java" if java else "py", tasks, source, protocol)


def _python(row: dict[str, Any]) -> Task:
    return Task(
        task_id=f"builtin/{row['task_id']}",
        language="py",
        prompt=mbpp.docstring_prompt(row["text"], row["test_list"]),
        stops=mbpp.STOPS,
        before="",
        after="\n" + "\n".join(row["test_list"]) + "\n",
        solution=row["code"],
        reference=(row["text"] + "\n", row["code"] + "\n"),
    )


def _java(row: dict[str, Any]) -> Task:
    prompt, solution = split_java(row)
    body = "\n".join(f"        {test}" for test in row["java_tests"])
    return Task(
        task_id=f"builtin/{row['task_id']}",
        language="java",
        prompt=prompt,
        stops=("\n}",),
        before=prompt,
        after=_MAIN.format(body=body),
        solution=solution,
        reference=(row["text"] + "\n", row["java_code"] + "\n"),
        main_class="Main",
    )


def split_java(row: dict[str, Any]) -> tuple[str, str]:
    """(prompt, completion) of a task's Java solution, without the brace that closes the class.

    The prompt shows the records, which the tests make; other members that stand before the method
    are hints at the solution, and move behind it.
    """
    imports, _, members = row["java_code"].partition("class Solution {\n")
    words = row["entry_point"].split("_")
    method = words[0] + "".join(word.capitalize() for word in words[1:])
    found = re.search(rf"(?m)^    [^\n=;{{]*\b{method}\([^{{]*{{\n", members)
    if found is None:  # builtin's own check makes sure of the method, not of its layout
        raise ValueError(f"task {row['task_id']}: no line begins the method {method}")
    before = re.split(r"\n\n", members[: found.start()].rstrip("\n"))
    shown = [part + "\n" for part in before if part.startswith("    record ")]
    moved = ["\n" + part for part in before if part and not part.startswith("    record ")]
    head = "".join(f"{record}\n" for record in shown)
    example = row["java_tests"][0]
    comment = f"    // {row['text']}\n    // {example}\n"
    prompt = f"import java.util.*;\n{imports}class Solution {{\n{head}{comment}{found.group()}"
    body = members[found.end() :].rstrip().removesuffix("}").rstrip()
    return prompt, "\n".join([body, *moved])
