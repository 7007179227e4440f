"""APPS: the program that runs a completion once for each case, and compares what comes out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from flex.errors import DataError
from flex.evals import apps_program
from flex.evals.benchmarks import load_benchmark
from flex.evals.tasks import Task
from tests.evals.made_benchmarks import apps_row, run, write

SUMS = {"inputs": ["1 2\n", "30 4\n"], "outputs": ["3\n", "34"]}
SOLUTION = "print(sum(map(int, input().split())))"


@pytest.fixture
def task(tmp_path: Path):
    def make(cases: dict[str, Any], solution: str = SOLUTION) -> Task:
        path = write(tmp_path / "apps.jsonl", apps_row(cases, solution))
        return load_benchmark("apps", path).tasks[0]

    return make


def test_the_prompt_says_how_input_comes(task):
    assert (
        task(SUMS).prompt == "\nQUESTION:\nAdd two numbers.\nUse Standard Input format\nANSWER:\n"
    )
    calls = {"fn_name": "f", "inputs": [[1]], "outputs": [1]}
    assert "\nUse Call-Based format\n" in task(calls).prompt


@pytest.mark.parametrize(
    "solution",
    [
        SOLUTION,
        "import sys\na, b = sys.stdin.buffer.readline().split()\nprint(int(a) + int(b))\nexit()",
        "import os\na, b = os.read(0, 99).split()\nos.write(1, b'%d' % (int(a) + int(b)))",
        "a, b = open(0).read().split()\nif __name__ == '__main__':\n    print(int(a) + int(b))",
        "import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False))\n" + SOLUTION,
        "import os, sys\nclass Fast:\n    text = ''\n    def write(self, x): self.text += x\n"
        "    def flush(self): os.write(1, self.text.encode()); self.text = ''\n"
        "sys.stdout = Fast()\n" + SOLUTION,
        f"import threading\nthreading.Thread(target=lambda: {SOLUTION}).start()",
        "from __future__ import annotations\n'''it\\'s \"quoted\" \\n'''\n# \u00e9\n" + SOLUTION,
    ],
)
def test_a_solution_reads_and_writes_as_it_likes(task, solution):
    assert run(task(SUMS), solution) == ""


@pytest.mark.parametrize(
    ("solution", "why"),
    [
        ("print(3)", "case 1: wrong output"),  # the first case is right
        (SOLUTION + "\nprint()\nprint(1)", "case 0: wrong output"),
        ("print(input()", "SyntaxError"),
        ("raise ValueError('mine')", "ValueError: mine"),
        ("import os\nprint(3)\nos._exit(3)", "no message"),
        ("assert False, CASES", "NameError"),  # a solution has no names of the tests
    ],
)
def test_a_wrong_solution_fails(task, solution, why):
    assert why in run(task(SUMS), solution)


@pytest.mark.parametrize(
    ("wanted", "printed", "right"),
    [
        ("1.5\n2", "1.5000001  2\n\n", True),
        ("1.5", "1.51", False),
        ("0.000001", "1e-6", True),
        ("1000000007", "1000000008", False),  # the authors compare integers as floats
        ("1000000007", "1000000007.0", False),
        ("1.0", "nan", False),
        ("a b\nc", "a b c", True),
        ("a\nb", "b\na", False),
        ("Yes", "YES", False),
        ("1 2", "1", False),
        (["1", "2"], "1\n2\n", True),
    ],
)
def test_text_is_compared_by_tokens(task, wanted, printed, right):
    cases = {"inputs": [["x", "y"]], "outputs": [wanted]}
    assert (run(task(cases), f"print({printed!r})") == "") is right


@pytest.mark.parametrize(
    ("wanted", "body", "right"),
    [
        (3, "return a + b", True),
        ([3], "return a + b", True),  # the form of half of the data
        ([3, 1], "return a + b, 1", True),
        ([[3, 1]], "return (a + b, 1)", True),
        ({"1": 2}, "return {1: 2}", True),
        (3, "return str(a + b)", False),
        (3, "return 4", False),
        ([1, 2], "return {1, 2}", False),
        (True, "class Same:\n    __eq__ = lambda *_: True\n  return Same()", False),
    ],
)
@pytest.mark.parametrize("owned", [False, True])
def test_calls_are_compared_as_json(task, wanted, body, right, owned):
    if "class Same" in body:
        body = "return type('Same', (), {'__eq__': lambda *_: True})()"
    code = f"def f(a, b) -> List[int]:\n    {body}\n"
    if owned:
        lines = code.replace("f(a", "f(self, a").splitlines()
        code = "class Solution:\n" + "".join(f"    {line}\n" for line in lines)
    cases = {"fn_name": "f", "inputs": [[1, 2]], "outputs": [wanted]}
    assert (run(task(cases, code), code) == "") is right


def test_keys_of_dictionaries_are_integers_again(task):
    cases = {"fn_name": "f", "inputs": [[{"1": 5}]], "outputs": [5]}
    assert run(task(cases), "def f(d):\n    return d[1]\n") == ""


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "try: time.sleep(9)\nexcept BaseException: pass",
        "while True:\n    try: time.sleep(9)\n    except Exception: pass",
    ],
)
def test_a_case_has_a_time_limit_that_cannot_be_caught(task, monkeypatch, body):
    monkeypatch.setattr(apps_program, "CASE_SECONDS", 1)
    body = f"print(3)\n{body}"
    cases = {"inputs": ["", ""], "outputs": ["3", "3"]}
    assert "case 0: more than 1 s" in run(task(cases), body)


def test_the_limit_of_a_task_grows_with_its_cases(task):
    assert task(SUMS).seconds == 5 + 2 * 4


def test_a_number_of_thousands_of_digits_is_a_case(tmp_path: Path):
    digits = "1" * 5000
    cases = {"fn_name": "f", "inputs": [[1]], "outputs": [0]}
    made = apps_row(cases)
    made["input_output"] = made["input_output"].replace("[0]", f"[{digits}]")
    (long,) = load_benchmark("apps", write(tmp_path / "apps.jsonl", made)).tasks
    assert run(long, "def f(x):\n    return (10**5000 - 1) // 9") == ""


def test_problems_without_tests_are_left_out_and_counted(tmp_path: Path, caplog):
    uneven = {"inputs": ["1"], "outputs": []}
    rows = [apps_row({}, number=7), apps_row(SUMS, number=8), apps_row(uneven, number=9)]
    with caplog.at_level(logging.WARNING, "flex.evals"):
        benchmark = load_benchmark("apps", write(tmp_path / "apps.jsonl", *rows))
    assert [task.task_id for task in benchmark.tasks] == ["APPS/8"]
    assert benchmark.source["without_tests"] == 2 and "ids 7, 9" in caplog.text
    assert benchmark.tasks[0].solution is None


def test_difficulties_are_benchmarks(tmp_path: Path):
    path = write(tmp_path / "apps.jsonl", apps_row(SUMS))
    assert len(load_benchmark("apps-interview", path).tasks) == 1
    with pytest.raises(DataError, match="no row belongs to apps-competition"):
        load_benchmark("apps-competition", path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_output": "{"}, "row 1: not JSON: `input_output`"),
        ({"input_output": "[]"}, "`input_output` is not an object"),
        ({"input_output": '{"inputs": 1, "outputs": []}'}, "are not both lists"),
        ({"solutions": "[1]"}, "`solutions` is not a list of texts"),
        ({"difficulty": "hard"}, "`difficulty` is 'hard'"),
        ({"starter_code": None}, "`starter_code` is NoneType"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change, words):
    path = write(tmp_path / "apps.jsonl", {**apps_row(SUMS), **change})
    with pytest.raises(DataError) as error:
        load_benchmark("apps", path)
    assert words in str(error.value)
