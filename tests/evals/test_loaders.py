"""Loaders: what a model reads, what judges it, and which files are refused with what words."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flex.errors import DataError
from flex.evals.benchmarks import NAMES, load_benchmark, parse_name
from tests.evals.made_benchmarks import (
    HUMANEVAL,
    HUMANEVAL_X,
    MBJSP,
    MBPP,
    MULTIPL_E,
    run,
    write,
)

node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def refused(name: str, data: Path | None = None) -> str:
    with pytest.raises(DataError) as error:
        load_benchmark(name, data)
    return str(error.value)


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz", "HumanEval.json"])
def test_humaneval_is_judged_by_the_check_of_its_row(tmp_path: Path, name: str):
    benchmark = load_benchmark("humaneval", write(tmp_path / name, HUMANEVAL))
    (task,) = benchmark.tasks
    assert HUMANEVAL["prompt"].endswith("\n")
    assert task.prompt == HUMANEVAL["prompt"].strip() and task.before == HUMANEVAL["prompt"]
    assert run(task, task.solution or "") == ""
    assert "AssertionError" in run(task, "    return x + 3\n")
    assert task.reference == (HUMANEVAL["prompt"], HUMANEVAL["canonical_solution"])
    assert benchmark.source["file"] == name and len(benchmark.source["sha256"]) == 64


def test_humaneval_unstripped_differs_in_the_prompt_alone_and_says_so(tmp_path: Path):
    data = write(tmp_path / "HumanEval.jsonl", HUMANEVAL)
    whole, stripped = (load_benchmark(n, data) for n in ("humaneval-unstripped", "humaneval"))
    assert whole.tasks[0].prompt == HUMANEVAL["prompt"]
    assert whole.protocol["prompt"] != stripped.protocol["prompt"]
    assert replace(whole.tasks[0], prompt=stripped.tasks[0].prompt) == stripped.tasks[0]


def test_mbpp_runs_the_setup_between_solution_and_asserts(tmp_path: Path):
    data = write(tmp_path / "mbpp.jsonl", MBPP)
    (task,) = load_benchmark("mbpp", data).tasks
    text, first = MBPP["text"], MBPP["test_list"][0]
    assert task.prompt == f'"""\n{text}\n{first}\n"""\n'
    assert "\r" not in (task.solution or "")
    assert run(task, task.solution or "") == ""
    assert "NameError: name 'Box'" in run(task, "def double(x):\n    return 2 * x")


def test_mbpp_is_the_test_split_and_mbpp_all_is_not(tmp_path: Path, caplog):
    rows = [{**MBPP, "task_id": number} for number in (10, 11, 510, 511)]
    data = write(tmp_path / "mbpp.jsonl", *rows)
    with caplog.at_level(logging.INFO, "flex.evals"):
        ids = [task.task_id for task in load_benchmark("mbpp", data).tasks]
    assert ids == ["MBPP/11", "MBPP/510"]
    assert "mbpp: 2 tasks, 2 rows left out" in caplog.text
    assert "the published set has 500" in caplog.text
    assert len(load_benchmark("mbpp-all", data).tasks) == 4


def test_multipl_e_strips_the_prompt_and_takes_its_stops_from_the_data(tmp_path: Path):
    data = write(tmp_path / "humaneval-java-reworded.json", MULTIPL_E)
    benchmark = load_benchmark("multipl-e-java", data)
    (task,) = benchmark.tasks
    assert task.prompt == MULTIPL_E["prompt"].rstrip()
    program = task.program("\n        return 2 * x;")
    assert program.source == f"{task.prompt}\n        return 2 * x;\n{MULTIPL_E['tests']}"
    assert (program.language, program.main_class) == ("java", "Problem")
    assert task.stops == ("\n    }\n",) and benchmark.protocol["base"] == "humaneval"


def test_multipl_e_keeps_a_stop_of_white_space_and_knows_go(tmp_path: Path):
    row = {**MULTIPL_E, "language": "go_test.go", "stop_tokens": ["\n\n", "struct"]}
    (task,) = load_benchmark("multipl-e-golang", write(tmp_path / "x.json", row)).tasks
    assert task.stops == ("\n\n", "struct") and task.language == "go"


def test_multipl_e_of_mbpp_has_a_name_of_its_own(tmp_path: Path):
    mbpp = {**MULTIPL_E, "name": "mbpp_3_double"}
    data = write(tmp_path / "mbpp.json", mbpp)
    assert load_benchmark("multipl-e-java", data).name == "multipl-e-mbpp-java"
    assert load_benchmark("multipl-e-mbpp-java", data).name == "multipl-e-mbpp-java"
    assert "begin with mbpp" in refused("multipl-e-humaneval-java", data)
    one = write(tmp_path / "humaneval.json", MULTIPL_E)
    assert "begin with humaneval" in refused("multipl-e-mbpp-java", one)
    both = write(tmp_path / "both.json", MULTIPL_E, mbpp)
    assert "begin with humaneval, mbpp" in refused("multipl-e-java", both)


@node
def test_mbxp_in_javascript_needs_no_lodash(tmp_path: Path):
    (task,) = load_benchmark("mbxp-js", write(tmp_path / "mbjsp.jsonl", MBJSP)).tasks
    assert run(task, task.solution or "", ("node",)) == ""  # 0 and -0 are equal to lodash
    assert run(task, "    return [0];", ("node",)) != ""
    # What follows the function is cut at its brace by the stop.
    assert task.stops == ("\n}",) and not (task.solution or "").endswith("}")


@node
def test_console_assert_fails_a_program(tmp_path: Path):
    data = write(tmp_path / "humaneval_js.jsonl", HUMANEVAL_X)
    (task,) = load_benchmark("humaneval-x-javascript", data).tasks
    assert run(task, task.solution or "", ("node",)) == ""
    assert "AssertionError" in run(task, "  return 5;", ("node",))


def test_python_of_the_translated_sets_is_judged_like_humaneval(tmp_path: Path):
    mbxp = {**HUMANEVAL, "language": "python", "task_id": "MBPP/1"}
    called = f"{HUMANEVAL['test']}\ncheck(double)\n"
    x = {**HUMANEVAL, "task_id": "Python/0", "declaration": "x", "test": called}
    for name, row in (("mbxp-python", mbxp), ("humaneval-x-py", x)):
        (task,) = load_benchmark(name, write(tmp_path / "x.jsonl", row)).tasks
        assert run(task, task.solution or "") == ""
        assert "AssertionError" in run(task, "    return 5\n")


def test_an_unknown_solution_is_none(tmp_path: Path):
    row = {**MBJSP, "canonical_solution": None}
    (task,) = load_benchmark("mbxp-js", write(tmp_path / "x.jsonl", row)).tasks
    assert task.solution is None and task.reference is None


def changed(row: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {key: value for key, value in {**row, **values}.items() if value is not ...}


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("humaneval", changed(HUMANEVAL, test=...), "row 2: missing key: `test`"),
        ("humaneval", changed(HUMANEVAL, prompt=3), "row 2: wrong type: `prompt`"),
        ("humaneval", changed(HUMANEVAL, entry_point=" "), "row 2: empty field: `entry_point`"),
        ("humaneval", HUMANEVAL, "row 2: task HumanEval/0 was already in x.jsonl, row 1"),
        ("mbpp", changed(MBPP, task_id="12"), "row 2: wrong type: `task_id`"),
        ("mbpp", changed(MBPP, task_id=12, test_list=[]), "row 2: empty field: `test_list`"),
        # also in a row that the split leaves out
        ("mbpp", changed(MBPP, task_id=900, code=None), "row 2: wrong type: `code`"),
        ("multipl-e-java", changed(MULTIPL_E, language="js"), "`language` is js, not java"),
        ("multipl-e-java", changed(MULTIPL_E, stop_tokens="x"), "`stop_tokens`"),
        ("multipl-e-java", changed(MULTIPL_E, stop_tokens=[""]), "`stop_tokens`"),
        ("mbxp-js", changed(MBJSP, language="java"), "`language` is java, not js"),
        ("mbxp-js", changed(MBJSP, canonical_solution="1"), "`canonical_solution`"),
        ("humaneval-x-js", changed(HUMANEVAL_X, task_id="CPP/0"), "`task_id` is CPP/0"),
        ("humaneval-x-js", changed(HUMANEVAL_X, declaration=...), "`declaration`"),
    ],
)
def test_the_first_bad_row_is_named_with_its_key(tmp_path: Path, name, row, words):
    good = {"h": HUMANEVAL, "m": MBPP, "u": MULTIPL_E, "x": MBJSP, "-": HUMANEVAL_X}
    kind = {"humaneval": "h", "mbpp": "m", "mbxp-js": "x", "humaneval-x-js": "-"}.get(name, "u")
    assert words in refused(name, write(tmp_path / "x.jsonl", good[kind], row))


@pytest.mark.parametrize(
    ("name", "row", "like"),
    [
        ("humaneval", MBPP, "mbpp"),
        ("humaneval", MBJSP, "mbxp-javascript"),  # it has all the keys of HumanEval
        ("humaneval", {**HUMANEVAL_X, "entry_point": "x"}, "humaneval-x-javascript"),
        ("mbpp", HUMANEVAL, "humaneval"),
        ("mbxp-js", MULTIPL_E, "multipl-e-java"),
        ("multipl-e-java", MBJSP, "mbxp-javascript"),
        ("apps", MBPP, "mbpp"),
        ("mbpp", {**MBPP, "prompt": "x", "test_imports": []}, "mbpp's sanitized set"),
    ],
)
def test_a_file_of_another_benchmark_is_recognised(tmp_path: Path, name, row, like):
    message = refused(name, write(tmp_path / "x.jsonl", row))
    assert f"look like those of {like} (" in message
    assert (f"evaluate {like}" in message) is ("sanitized" not in like)


def test_a_file_of_another_language_names_its_benchmark(tmp_path: Path):
    data = write(tmp_path / "x.json", {**MULTIPL_E, "language": "go_test.go"})
    assert "fix: evaluate multipl-e-go" in refused("multipl-e-java", data)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b"", "holds no rows"),
        ("x.json", b"[]", "holds no rows"),
        ("x.json", b"[1]", "row 1 is int"),
        ("x.json", b"[", "not JSON"),
        ("x.jsonl", b'{"a": 1}\n\n{"a": 1}\n', "row 2: blank line"),
        ("x.jsonl", b'{"a": 1}\n{"a": ', "row 2: not JSON"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-4], "not a whole gzip file"),
        ("x.parquet", b"PAR1", "not a parquet file"),
        ("x.txt", b"{}", "no known kind"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    assert words in refused("humaneval", path)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path):
    write(tmp_path / "HumanEval.jsonl.gz", HUMANEVAL)
    assert "did you mean" in refused("humaneval", tmp_path / "HumanEval.jsonl")
    assert "--data" in refused("humaneval", tmp_path / "elsewhere" / "x.jsonl")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("HumanEval", ("humaneval", "", "")),
        ("multipl_e_c++", ("multipl-e-cpp", "multipl-e", "cpp")),
        ("multipl-e-mbpp-Rust", ("multipl-e-mbpp-rs", "multipl-e-mbpp", "rs")),
        ("multipl-e-humaneval-bash", ("multipl-e-sh", "multipl-e-humaneval", "sh")),
        ("humaneval-x-python", ("humaneval-x-py", "humaneval-x", "py")),
        ("mbxp-javascript", ("mbxp-js", "mbxp", "js")),
        ("builtin-py", ("builtin-python", "", "")),
        ("builtin-java-validation", ("builtin-java-validation", "", "")),
    ],
)
def test_names_are_taken_as_users_write_them(name, meant):
    assert parse_name(name) == meant


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("humanevl", "did you mean humaneval?"),
        ("mbpp-al", "did you mean mbpp-all?"),
        ("multipl-e-jav", "did you mean multipl-e-java?"),
        ("multiple-java", "did you mean multipl-e-java?"),
        ("mbxp-rust", "multipl-e-rs"),
        ("zzz", NAMES[0]),
    ],
)
def test_an_unknown_name_says_what_is_near(name, words):
    assert words in refused(name)


def test_a_limit_is_part_of_the_source(tmp_path: Path):
    rows = [{**HUMANEVAL, "task_id": f"HumanEval/{i}"} for i in range(3)]
    data = write(tmp_path / "x.jsonl", *rows)
    benchmark = load_benchmark("humaneval", data, limit=2)
    assert [task.task_id for task in benchmark.tasks] == ["HumanEval/0", "HumanEval/1"]
    assert (benchmark.source["limit"], benchmark.source["of"]) == (2, 3)
    with pytest.raises(DataError, match="limit is 0"):
        load_benchmark("humaneval", data, limit=0)


def test_without_network_the_fix_is_a_local_file(monkeypatch):
    def unreachable(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    for name in ("humaneval", "mbpp", "apps", "multipl-e-java", "mbxp-java", "humaneval-x-java"):
        message = refused(name)
        assert "no route to host" in message and "--data FILE" in message


def test_the_hub_is_read_at_a_commit_that_is_recorded(tmp_path: Path, monkeypatch):
    folder = tmp_path / ("a" * 40)
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "humaneval-java-reworded.json", MULTIPL_E)
    (folder / "data" / "mbpp-java-reworded.json").write_text(json.dumps([{"not": "read"}]))
    asked: dict[str, Any] = {}

    def snapshot(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    benchmark = load_benchmark("multipl-e-java")
    assert benchmark.source == {
        "hub": "nuprl/MultiPL-E",
        "revision": "a" * 40,
        "files": ["data/humaneval-java-reworded.json"],
    }
    assert asked["repo_type"] == "dataset" and asked["revision"].startswith("28441b60")
    assert "holds none of" in refused("multipl-e-cpp")
