import ast
import shutil
from collections import Counter

import pytest
import yaml

from flex.data import check_tasks
from flex.data.builtin import HELD_OUT, KEYS, _load, load_tasks, split_tasks
from flex.data.check_tasks import NO_JAVA, check_java, check_python, has_java, main, report
from flex.data.mutants import java_mutants, python_mutants
from flex.errors import DataError

needs_jdk = pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK")


def item(**changed):
    """A correct item of a file."""
    good = {
        "task_id": 1,
        "entry_point": "count_up",
        "text": "Write a function to count up to a number.",
        "code": "def count_up(n):\n    i = 0\n    while i < n:\n        i += 1\n    return i\n",
        "test_list": [f"assert count_up({n}) == {n}" for n in (0, 1, 3)],
        "java_code": "class Solution {\n"
        "    static int countUp(int n) {\n"
        "        int i = 0;\n"
        "        while (i < n) {\n"
        "            i = 1 + i;\n"
        "        }\n"
        "        return i;\n"
        "    }\n"
        "}\n",
        "java_tests": [f"assert Solution.countUp({n}) == {n};" for n in (0, 1, 3)],
    }
    return {**good, **changed}


def write(folder, *items, name="topic.yaml"):
    (folder / name).write_text(yaml.safe_dump(list(items), sort_keys=False))
    return folder


def test_there_are_at_least_150_tasks_in_mbpps_schema():
    tasks = load_tasks()
    assert len(tasks) >= 150
    for task in tasks:
        assert task["test_setup_code"] == "" and task["challenge_test_list"] == []
        assert len(task["test_list"]) == len(task["java_tests"]) == 3
    assert [t["task_id"] for t in tasks if t["topic"] == "bits"] == list(range(228, 242))


def test_a_caller_cannot_change_the_tasks_of_the_next():
    load_tasks()[0]["code"] = "changed"
    assert load_tasks()[0]["code"] != "changed"


def test_a_correct_file_is_read(tmp_path):
    (task,) = _load(write(tmp_path, item()))
    assert task["topic"] == "topic" and task["code"] == item()["code"].rstrip()


NO_CALL = ["assert 1", "assert 2", "assert 3"]
JAVA_CODE = item()["java_code"]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"extra": 1}, "the keys must be"),
        ({"task_id": 0}, "task_id 0 is not a positive integer"),
        ({"task_id": True}, "task_id True is not a positive integer"),
        ({"task_id": "1"}, "task_id '1' is not a positive integer"),
        ({"entry_point": 3}, "entry_point is not a text"),
        ({"text": None}, "text is not a text"),
        ({"code": " \n"}, "code is not a text"),
        ({"java_code": []}, "java_code is not a text"),
        ({"test_list": "assert"}, "test_list is not a list of texts"),
        ({"java_tests": [1, 2, 3]}, "java_tests is not a list of texts"),
        ({"test_list": item()["test_list"][:2]}, "test_list must hold 3 different tests"),
        ({"java_tests": item()["java_tests"][:1] * 3}, "java_tests must hold 3 different tests"),
        ({"entry_point": "countUp"}, "entry_point 'countUp' is not in snake_case"),
        ({"text": "Count up."}, "text must be one line that starts with"),
        ({"text": item()["text"] + "\nTwo."}, "text must be one line that starts with"),
        ({"code": "def count_up(n:"}, "Python: "),
        ({"code": "def other(n):\n    return n"}, "code defines no function count_up"),
        ({"test_list": ["count_up(1)", *item()["test_list"][1:]]}, "not one assert: count_up(1)"),
        ({"test_list": NO_CALL}, "the test does not call count_up: assert 1"),
        ({"java_code": "int x;\n" + JAVA_CODE}, "java_code must be import lines, then"),
        ({"java_code": "class Other {}"}, "java_code must be import lines, then"),
        ({"java_code": "class Solution {}"}, "java_code defines no static method countUp"),
        ({"java_code": JAVA_CODE.replace("static ", "")}, "java_code defines no static method"),
        ({"java_tests": ["a", "b", "c"]}, "not an assert on Solution.countUp: a"),
        ({"java_tests": [f"{t};" for t in NO_CALL]}, "not an assert on Solution.countUp: assert 1"),
    ],
)
def test_an_item_that_breaks_the_schema_is_refused(tmp_path, changed, complaint):
    with pytest.raises(DataError) as error:
        _load(write(tmp_path, item(**changed)))
    assert "topic.yaml, item 1 (task " in error.value.what and complaint in error.value.what


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "no tasks in "),
        ("", "topic.yaml holds no list of tasks"),
        ("[]", "topic.yaml holds no list of tasks"),
        ("task_id: 1", "topic.yaml holds no list of tasks"),
        ("- 5", "item 1 (task ?): the keys must be"),
        ("- [", "topic.yaml cannot be read"),
        ("- \N{LATIN SMALL LETTER E WITH ACUTE}", "topic.yaml cannot be read"),
        ("- task_id: 1\n  task_id: 2", "`task_id` is given twice"),
        ("- " + "\n  ".join(f"{key}: 1" for key in reversed(KEYS)), "in this order"),
    ],
)
def test_a_file_that_is_no_list_of_items_is_refused(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / "topic.yaml").write_text(text, "utf-8")
    with pytest.raises(DataError) as error:
        _load(tmp_path)
    assert complaint in error.value.what


@pytest.mark.parametrize("key", ["task_id", "entry_point", "text"])
@pytest.mark.parametrize("files", [("a.yaml", "a.yaml"), ("a.yaml", "b.yaml")])
def test_what_must_be_unique_is_refused_twice(tmp_path, key, files):
    first = item()
    other = item(
        task_id=2,
        entry_point="go_up",
        text="Write a function to go up.",
        code="def go_up(n):\n    return count_up(n)\n\ndef count_up(n):\n    return n",
        test_list=[f"assert go_up({n}) == count_up({n})" for n in (1, 2, 3)],
        java_code=first["java_code"].replace("int n)", "int n) { return goUp(n); }")
        + "static int goUp(int n) { return n; }",
        java_tests=[f"assert Solution.goUp({n}) == Solution.countUp({n});" for n in (1, 2, 3)],
    )
    for i, tasks in enumerate(([first, other], [first, {**other, key: first[key]}])):
        folder = tmp_path / str(i)
        folder.mkdir()
        if files[0] == files[1]:
            write(folder, *tasks, name=files[0])
        else:
            for name, task in zip(files, tasks, strict=True):
                write(folder, task, name=name)
    assert len(_load(tmp_path / "0")) == 2
    with pytest.raises(DataError) as error:
        _load(tmp_path / "1")
    assert error.value.what.startswith(f"built-in tasks: {key} {first[key]!r} is used twice, in ")
    assert f"in {files[0]} and {files[1]}" in error.value.what


def test_the_split_is_stable_and_disjoint():
    train, validation = split_tasks()
    assert split_tasks() == (train, validation)
    ids = [[task["task_id"] for task in part] for part in (train, validation)]
    assert not set(ids[0]) & set(ids[1])
    assert sorted(ids[0] + ids[1]) == sorted(task["task_id"] for task in load_tasks())
    assert ids[1][:4] == [233, 239, 359, 365]  # the 6th and 12th of `bits`, then of `calendar`
    sizes = Counter(task["topic"] for task in load_tasks())
    held_out = Counter(task["topic"] for task in validation)
    assert held_out == {topic: size // HELD_OUT for topic, size in sizes.items()}


def test_no_mutant_is_the_solution_itself():
    for task in split_tasks()[1]:
        source = ast.unparse(ast.parse(task["code"]))
        assert all(mutant != source for _, mutant in python_mutants(task["code"]))
        assert all(mutant != task["java_code"] for _, mutant in java_mutants(task["java_code"]))


def test_java_mutants_leave_comments_and_the_inside_of_literals_alone():
    source = '// a == b\nString f() { return x == \'"\' ? "a < b" : /* 1 < 2 */ List.<A>of(); }'
    changes = [change for change, _ in java_mutants(source)]
    assert changes[:2] == ["line 2: == to !=", 'line 2: "a < b" to "a < bx"']
    assert all(change.startswith("line 2: x == ") for change in changes[2:])


def test_every_python_solution_passes_and_a_mutant_of_it_does_not():
    verdicts = check_python(load_tasks())
    assert len(verdicts) == len(load_tasks())
    assert [verdict.complaint for verdict in verdicts if verdict.complaint] == []
    assert all(verdict.error is None and verdict.killed == 1 for verdict in verdicts)


@needs_jdk
def test_every_java_solution_passes_and_a_mutant_of_it_does_not():
    verdicts = check_java(load_tasks())
    assert len(verdicts) == len(load_tasks())
    assert [verdict.complaint for verdict in verdicts if verdict.complaint] == []
    assert all(verdict.error is None and verdict.killed for verdict in verdicts)


PYTHON_FAULTS = [
    ("def count_up(n):\n    return min(n, 2)", "AssertionError in: assert count_up(3) == 3"),
    ("def count_up(n):\n    return 1 / 0", "ZeroDivisionError division by zero in: assert"),
    ("import numpy\n\ndef count_up(n):\n    return n", "ModuleNotFoundError"),
    ("raise SystemExit(0)", "SystemExit 0 in: the solution"),
    ("import os\nos._exit(3)", "the process died, status 3"),
    ("def count_up(n):\n    x = [n]\n    while x:\n        x += x", "MemoryError"),
]


def test_a_wrong_python_solution_is_caught_and_the_others_are_checked():
    tasks = [item(task_id=i, code=code) for i, (code, _) in enumerate(PYTHON_FAULTS)]
    *wrong, right = check_python([*tasks, item(task_id=99)])
    for verdict, (_, complaint) in zip(wrong, PYTHON_FAULTS, strict=True):
        start = f"python, task {verdict.task_id}: the solution fails: {complaint}"
        assert verdict.complaint.startswith(start) and "\n" not in verdict.complaint
        assert verdict.run == 0
    assert right.complaint is None and right.task_id == 99


JAVA_FAULTS = [
    (JAVA_CODE.replace("return i", "return i % 3"), "test 3: java.lang.AssertionError"),
    (JAVA_CODE.replace("return i", "return i / 0"), "test 1: java.lang.ArithmeticException: / by"),
    (JAVA_CODE.replace("return i", "return j"), "javac: Solution.java:8: cannot find"),
    (JAVA_CODE.replace("return i;", "return i"), "javac: Solution.java:8: ';' expected"),
    (
        JAVA_CODE.replace("return i", "Arrays.asList(); return i"),
        "javac: Solution.java:8: cannot find",
    ),
    (JAVA_CODE.replace("return i", "System.exit(3); return i"), "the process died, status 3"),
    (JAVA_CODE.replace("1 + i", "i"), "too slow"),
    (
        "import java.util.*;\n\nclass Solution {\n    static int countUp(int n) {\n"
        "        List<long[]> x = new ArrayList<>();\n        while (n > 0) {\n"
        "            x.add(new long[1000000]);\n        }\n        return 0;\n    }\n}",
        "test 2: java.lang.OutOfMemoryError",
    ),
]


@needs_jdk
def test_a_wrong_java_solution_is_caught_and_the_others_are_checked():
    tasks = [item(task_id=i, java_code=code) for i, (code, _) in enumerate(JAVA_FAULTS)]
    *wrong, right = check_java([*tasks, item(task_id=99)])
    for verdict, (_, complaint) in zip(wrong, JAVA_FAULTS, strict=True):
        start = f"java, task {verdict.task_id}: the solution fails: {complaint}"
        assert verdict.complaint.startswith(start) and "\n" not in verdict.complaint
    assert right.complaint is None and right.task_id == 99


SAME = {
    "code": "def count_up(n):\n    return n + 0",
    "java_code": "class Solution {\n    static int countUp(int n) {\n        return n - 0;\n    }\n}",
}


def test_useless_python_tests_are_caught():
    tests = [f"assert count_up({n}) or True" for n in (1, 2, 3)]
    (verdict,) = check_python([item(**SAME, test_list=tests)])
    assert verdict.complaint == "python, task 1: the tests notice none of its 3 mutants"
    assert verdict.survivors == ["line 2: return None", "line 2: Add to Sub", "line 2: 0 to 1"]


@needs_jdk
def test_useless_java_tests_are_caught():
    # of its mutants, "return !(n - 0)" and "return null" do not compile
    tests = [f"assert Solution.countUp({n}) < 9;" for n in (1, 2, 3)]
    (verdict,) = check_java([item(**SAME, java_tests=tests)])
    assert verdict.complaint == "java, task 1: the tests notice none of its 3 mutants"
    assert verdict.survivors == [
        "line 3: - to +",
        "line 3: 0 to 1",
        "line 3: n - 0 to 1 + (n - 0)",
    ]


def test_mutants_that_loop_for_ever_are_stopped():
    (verdict,) = check_python([item()], every=True)
    # `i -= 1` is among them
    assert verdict.error is None and verdict.run == verdict.killed == 5


@needs_jdk
def test_java_mutants_that_loop_for_ever_are_stopped():
    (verdict,) = check_java([item()], every=True)
    # `i = 1 - i` is among them
    assert verdict.error is None and verdict.run == verdict.killed == 5


def test_what_a_program_prints_is_not_taken_for_an_answer():
    code = "print('1\\t{}')\n" + item()["code"]
    (verdict,) = check_python([item(code=code)])
    assert verdict.error is None and verdict.killed


def test_the_report_counts_and_names_what_failed(capsys):
    wrong = item(task_id=2, code="def count_up(n):\n    return -n")
    assert report([item(), wrong], "python", every=False) == 1
    complaint, summary = capsys.readouterr().out.splitlines()
    assert complaint.startswith("python, task 2: the solution fails: AssertionError")
    counts = "1 pass, 1 notice a mutant (1 of 1 mutants noticed)"
    assert summary == f"2 built-in tasks; python: {counts}"


def test_the_report_lists_unnoticed_mutants_when_all_are_run(capsys):
    assert report([item(**SAME)], "python", every=True) == 0
    unnoticed, summary = capsys.readouterr().out.splitlines()
    assert unnoticed == "python, task 1: unnoticed: line 2: Add to Sub"
    assert summary.endswith("1 pass, 1 notice a mutant (2 of 3 mutants noticed)")


@pytest.mark.parametrize(("language", "status"), [("java", 1), ("all", 0)])
def test_without_a_jdk_java_is_not_checked_and_never_passed(monkeypatch, capsys, language, status):
    monkeypatch.setattr(check_tasks.shutil, "which", lambda name: None)
    monkeypatch.setattr(check_tasks, "load_tasks", lambda: [item()])
    assert not has_java()
    assert main(["--language", language]) == status
    said, summary = capsys.readouterr().out.splitlines()
    assert said == NO_JAVA and summary.endswith("; java: not checked")


@needs_jdk
def test_the_command_line_checks_both_languages(monkeypatch, capsys):
    monkeypatch.setattr(check_tasks, "load_tasks", lambda: [item()])
    assert main([]) == 0
    counts = "1 pass, 1 notice a mutant (1 of 1 mutants noticed)"
    assert capsys.readouterr().out == f"1 built-in tasks; python: {counts}; java: {counts}\n"


def test_a_process_that_does_not_end_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(check_tasks, "PROCESS_SECONDS", 0.001)
    monkeypatch.setattr(check_tasks, "load_tasks", lambda: [item()])
    assert main(["--language", "python"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "timed out after 0.001 seconds" in printed.err


@needs_jdk
def test_a_compiler_that_does_not_work_is_an_error(monkeypatch):
    monkeypatch.setattr(check_tasks, "JAVAC", ("javac", "-nonsense"))
    with pytest.raises(DataError, match="javac failed: .*nonsense"):
        check_java([item()])
