"""Rows in the public schemas of the benchmarks, files of them, and a way to run their programs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from flex.evals.tasks import Task

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """ Twice x. """\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(2) == 4\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "class Box:\r\n    size = 2\r\ndef double(x):\r\n    return 2 * x",
    "test_setup_code": "box = Box()",
    "test_list": ["assert double(2) == 4", "assert double(box.size) == 4"],
    "challenge_test_list": ["assert double('a') == 'never run'"],
}
MULTIPL_E = {
    "name": "HumanEval_0_double",
    "language": "java",
    "prompt": "class Problem {\n    // Twice x.\n    public static long twice(long x) {\n",
    "tests": "    }\n    public static void main(String[] args) {\n    assert(twice(2l) == 4l);\n    }\n}\n",
    "stop_tokens": ["\n    }\n"],
}
MBJSP = {
    "task_id": "MBJSP/1",
    "language": "javascript",
    "prompt": "function same(x) {\n",
    "entry_point": "same",
    "canonical_solution": "    return x;\n}",
    "test": '\nconst _ = require("lodash")\n\nif (!_.isEqual(same([0, -0]), [-0, 0])) {\n    throw "x"\n}\n',
    "description": "The same.",
}
HUMANEVAL_X = {
    "task_id": "JavaScript/0",
    "prompt": "/* Twice x. */\nconst twice = (x) => {\n",
    "declaration": "\nconst twice = (x) => {\n",
    "canonical_solution": "  return 2 * x;\n}\n\n",
    "test": "const testTwice = () => {\n  console.assert(twice(2) === 4)\n}\n\ntestTwice()\n",
    "example_test": "",
}
MBJP = {
    **{"task_id": "MBJP/1", "language": "java", "entry_point": "twice"},
    "prompt": "import java.util.*;\n\nclass Twice {\n    public static int twice(int x) {\n",
    "canonical_solution": "        return 2 * x;\n    }\n}",
    "test": "\n\nclass Main {\n    public static void main(String[] args) throws Exception {\n"
    '        if (Twice.twice(2) != 4) {\n            throw new Exception("0");\n        }\n    }\n}\n',
}
HUMANEVAL_X_JAVA = {
    "task_id": "Java/0",
    "prompt": "import java.util.*;\n\nclass Solution {\n    public int twice(int x) {\n",
    "declaration": "import java.util.*;\n\nclass Solution {\n    public int twice(int x) {\n",
    "canonical_solution": "        return 2 * x;\n    }\n}",
    "test": "public class Main {\n    public static void main(String[] args) {\n"
    "        if (new Solution().twice(2) != 4) {\n            throw new AssertionError();\n"
    "        }\n    }\n}\n",
    "example_test": "",
}


def apps_row(cases: dict[str, Any], solution: str = "", number: int = 1) -> dict[str, Any]:
    return {
        "problem_id": number,
        "question": "Add two numbers.",
        "solutions": json.dumps([solution]) if solution else "",
        "input_output": json.dumps(cases) if cases else "",
        "difficulty": "interview",
        "url": "",
        "starter_code": "",
    }


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """The rows as .json, .jsonl or .jsonl.gz, by the end of the name."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".json"):
        path.write_text(json.dumps(rows), "utf-8")
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, "utf-8")
    return path


def run(task: Task, completion: str, command: tuple[str, ...] = (sys.executable, "-I")) -> str:
    """Standard error of the program, "" if it passes. The completions of these tests are ours."""
    end = "console.log('the end')" if task.language == "js" else "print('the end')"
    source = f"{task.program(completion).source}\n{end}\n"
    done = subprocess.run(
        [*command, "-"], input=source, capture_output=True, text=True, timeout=20, check=False
    )
    if done.returncode == 0 and done.stdout.endswith("the end\n"):
        return ""
    return done.stderr or "no message"
