"""The result file: the same bytes however it came about, and nothing read that does not hold together."""

import json
import math
from dataclasses import replace

import pytest

from flex.errors import DataError
from flex.evals.journal import Generated, Journal, Outcome, journal_path
from flex.evals.results import (
    REQUIRED,
    EvalReport,
    load,
    save,
    save_timing,
    summarise,
    tasks_from,
    timing_path,
)
from flex.evals.stats import pass_at_k, wilson
from tests.evals.made_reports import changed, judged, made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "r.json"


def test_what_was_saved_is_loaded(path):
    report = replace(made([3, 0, 20], samples=20), unsolvable=("T/1",))
    report = judged(report, 1, "compile")
    text = "\u2028\x00 </script> \U0001f600"
    task = report.tasks[0]
    samples = (replace(task.samples[0], text=text), *task.samples[1:])
    report = replace(report, tasks=(replace(task, samples=samples), *report.tasks[1:]))
    save(report, path)
    assert load(path) == report
    path.read_bytes().decode("ascii")


def test_the_bytes_do_not_depend_on_the_order_of_keys(path, tmp_path):
    report = made([1, 0])
    shuffled = replace(
        report,
        protocol=dict(reversed(report.protocol.items())),
        benchmark={
            **dict(reversed(report.benchmark.items())),
            "source": dict(reversed(report.benchmark["source"].items())),
        },
    )
    save(report, path)
    save(shuffled, tmp_path / "other.json")
    assert path.read_bytes() == (tmp_path / "other.json").read_bytes()
    save(load(path), path)
    assert path.read_bytes() == (tmp_path / "other.json").read_bytes()


def test_a_summary_by_hand(path):
    report = made([1, 1, 0, 0, 0, 0])
    for task, kind in [(2, "compile"), (3, "timeout"), (4, "limit")]:
        report = judged(report, task, kind)
    report = replace(report, unsolvable=("T/2", "T/5"))
    task = report.tasks[3]
    report = replace(
        report,
        tasks=tuple(
            replace(t, samples=(replace(t.samples[0], finish="length", new_tokens=512),))
            if t is task
            else t
            for t in report.tasks
        ),
    )
    summary = summarise(report)
    limits, solvable = wilson(2, 6), wilson(2, 4)
    assert summary == {
        "tasks": 6,
        "samples": 1,
        "pass_at": {
            "1": {
                "value": 2 / 6,
                "low": round(limits.low, 6),
                "high": round(limits.high, 6),
                "method": "wilson",
            }
        },
        "level": 0.95,
        "solvable": {
            "tasks": 4,
            "pass_at": {
                "1": {
                    "value": 0.5,
                    "low": round(solvable.low, 6),
                    "high": round(solvable.high, 6),
                    "method": "wilson",
                }
            },
        },
        "verdicts": {
            **{"passed": 2, "compile": 1, "exception": 0, "wrong": 1},
            **{"timeout": 1, "limit": 1, "missing": 0},
        },
        "compile_rate": 5 / 6,
        "cut": 1,
        "new_tokens": 5 * 7 + 512,
    }


def test_pass_at_the_ks_that_there_are_samples_for():
    table = summarise(made([0, 3, 12], samples=12))["pass_at"]
    assert set(table) == {"1", "10"}
    assert table["1"]["value"] == pytest.approx((3 + 12) / 36)
    assert table["10"]["value"] == pytest.approx((pass_at_k(12, 3, 10) + 1) / 3)
    assert table["10"]["method"] == "bootstrap"


def test_a_missing_tool_chain_is_no_failure(path):
    report = judged(replace(made([1, 1, 0]), toolchain=None), 1, "missing")
    summary = summarise(report)
    assert summary["pass_at"] is None
    assert summary["verdicts"]["missing"] == 1
    assert summary["compile_rate"] == 1.0
    save(report, path)
    assert load(path) == report
    none = made([0])
    assert summarise(judged(none, 0, "missing"))["compile_rate"] is None


def test_no_solvable_task_at_all():
    assert summarise(replace(made([0]), unsolvable=("T/0",)))["solvable"] == {
        "tasks": 0,
        "pass_at": None,
    }


def test_a_pass_of_an_unsolvable_task_is_said(path, caplog):
    save(replace(made([1, 0]), unsolvable=("T/0",)), path)
    assert "1 tasks passed although their stub does not compile" in caplog.text
    assert "T/0" in caplog.text


def test_from_a_journal_killed_or_not(tmp_path):
    """Two sessions in another order, with other times, end in the same bytes as one."""
    report = made([2, 0], samples=2)

    def add(journal, task, number, seconds):
        done = report.tasks[task].samples[number]
        key = (f"T/{task}", number)
        made_ = Generated(done.seed, done.text, done.new_tokens, done.finish)
        journal.add_sample(key, made_)
        journal.add_verdict(key, Outcome(done.verdict, seconds, f"at {seconds}"))

    def finished(out, sessions):
        for keys in sessions:
            with Journal(journal_path(out), {}, {}) as journal:
                for task, number in keys:
                    add(journal, task, number, seconds=len(sessions) + task)
        with Journal(journal_path(out), {}, {}) as journal:
            ids = ["T/0", "T/1"]
            save(replace(report, tasks=tasks_from(journal, ids, 2)), out)
            save_timing(out, journal, ids, 2, tokens_per_second=9.5)
            journal.delete()
        return out.read_bytes()

    once = finished(tmp_path / "a.json", [[(0, 0), (0, 1), (1, 0), (1, 1)]])
    twice = finished(tmp_path / "b.json", [[(1, 1), (0, 1)], [(0, 0), (1, 0)]])
    assert once == twice
    assert load(tmp_path / "a.json") == report
    timing = json.loads(timing_path(tmp_path / "b.json").read_text())
    assert timing["tokens_per_second"] == 9.5
    assert timing["tasks"][1]["samples"][0] == {"seconds": 3, "detail": "at 3"}
    assert {p.name for p in tmp_path.iterdir()} == {
        *("a.json", "a.json.timing.json", "b.json", "b.json.timing.json")
    }


def test_an_incomplete_journal_is_no_result(tmp_path):
    with Journal(tmp_path / "j", {}, {}) as journal:
        journal.add_sample(("T/0", 0), Generated(0, "", 1, "eos"))
        with pytest.raises(ValueError, match="has no verdict yet"):
            tasks_from(journal, ["T/0"], 1)


def edited(path, change) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def put(value, *keys):
    def change(raw):
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


def drop(*keys):
    def change(raw):
        for key in keys[:-1]:
            raw = raw[key]
        del raw[keys[-1]]

    return change


EDITS = {
    "format = 'flex-eval-2'": put("flex-eval-2", "format"),
    "format = None": drop("format"),
    "engine: Field required": drop("engine"),
    "surprise = '1': Unexpected": put(1, "surprise"),
    "tasks[1].samples[0].seed = 'None'": put(None, "tasks", 1, "samples", 0, "seed"),
    "tasks[1].samples[0].seed = '1.0'": put(1.0, "tasks", 1, "samples", 0, "seed"),
    "tasks[0].samples[0].new_tokens = 'True'": put(True, "tasks", 0, "samples", 0, "new_tokens"),
    "tasks[0].samples[0].verdict = 'PASSED'": put("PASSED", "tasks", 0, "samples", 0, "verdict"),
    "tasks[0].samples[0].text: Field required": drop("tasks", 0, "samples", 0, "text"),
    "tasks[0].samples[0].note = 'x'": put("x", "tasks", 0, "samples", 0, "note"),
    "tasks: 'T/0' stands there 2 times": put("T/0", "tasks", 1, "task_id"),
    "tasks[1].samples holds 0": put([], "tasks", 1, "samples"),
    "benchmark.tasks = 3, but tasks holds 2": put(3, "benchmark", "tasks"),
    "benchmark.source is empty": put({}, "benchmark", "source"),
    "benchmark.source is missing": drop("benchmark", "source"),
    "protocol.samples = True": put(True, "protocol", "samples"),
    "protocol.samples = '1'": put("1", "protocol", "samples"),
    "protocol.samples = 0": put(0, "protocol", "samples"),
    "protocol.temperature = False": put(False, "protocol", "temperature"),
    "model.adapter is missing": drop("model", "adapter"),
    "model.merged = None": put(None, "model", "merged"),
    "unsolvable: 'T/7' is no task": put(["T/7"], "unsolvable"),
    "unsolvable: 'T/1' stands there 2 times": put(["T/1", "T/1"], "unsolvable"),
    "summary.verdicts.passed does not follow": put(2, "summary", "verdicts", "passed"),
    "summary.pass_at.1.value does not follow": put(0.75, "summary", "pass_at", "1", "value"),
    "summary.compile_rate does not follow": put(0.5, "summary", "compile_rate"),
    "summary.best does not follow": put(1, "summary", "best"),
}


@pytest.mark.parametrize(("words", "change"), EDITS.items(), ids=EDITS)
def test_edited_files_are_refused_by_key(path, words, change):
    save(made([1, 0]), path)
    edited(path, change)
    with pytest.raises(DataError) as error:
        load(path)
    assert error.value.what.startswith(f"{path}: {words}")


def test_a_verdict_turned_by_hand_is_noticed(path):
    save(made([1, 0]), path)
    edited(path, put("passed", "tasks", 1, "samples", 0, "verdict"))
    with pytest.raises(DataError, match=r"summary\.pass_at"):
        load(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "format = None"),
        (b'{"format": "flex-eval-1"', "not JSON"),
        (b'{"format": "flex-eval-1", "format": "flex-eval-1"}', "stands there 2 times"),
        (b'{"format": "flex-eval-1", "model": {"x": NaN}}', "NaN is no number"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_what_is_no_result_file(path, data, words):
    path.write_bytes(data)
    with pytest.raises(DataError, match=words):
        load(path)


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            load(path)
    with pytest.raises(DataError, match="cannot be written"):
        save(made([1]), tmp_path / "none" / "r.json")


def test_other_draws_of_a_later_numpy_do_not_spoil_a_file(path):
    save(made([1, 3, 2], samples=4), path)
    edited(path, put(0.123, "summary", "pass_at", "1", "low"))
    load(path)


@pytest.mark.parametrize(
    "bad",
    [
        lambda report: changed(report, "benchmark", tasks=9),
        lambda report: replace(report, tasks=()),
        lambda report: changed(report, "model", merged="no"),
        lambda report: replace(report, model={}),
    ],
)
def test_what_would_not_load_is_not_saved(path, bad):
    with pytest.raises(DataError):
        save(bad(made([1, 0])), path)
    assert not path.exists()


def test_nan_is_not_saved(path):
    with pytest.raises(ValueError, match="JSON compliant"):
        save(changed(made([1]), "engine", x=math.nan), path)
    assert not path.exists()


def test_required_keys_are_in_the_reports_sections():
    assert REQUIRED.keys() <= EvalReport.__dataclass_fields__.keys()
