"""The journal of an evaluation: killed anywhere, nothing is lost and nothing is mixed."""

import json
import logging
import subprocess
import sys

import pytest

from flex.errors import DataError
from flex.evals.journal import Generated, Journal, Outcome, differing, journal_path

GENERATION = {"model": {"id": "m"}, "protocol": {"stops": ("\n", "#"), "seed": 0}}
EXECUTION = {"sandbox": "bubblewrap", "toolchain": "Python 3.11"}
TEXT = "  \u00e9\u2028\n\x00 \U0001f600\r\n"  # U+2028 ends a line for some readers


def sample(number: int = 0) -> Generated:
    return Generated(number, TEXT, 9, "stop")


def opened(path, generation=GENERATION, execution=EXECUTION) -> Journal:
    return Journal(path, generation, execution)


def begun(path) -> None:
    """Three samples, two of them judged."""
    with opened(path) as journal:
        for number in range(3):
            journal.add_sample(("T/0", number), sample(number))
        journal.add_verdict(("T/0", 0), Outcome("passed", 0.25))
        journal.add_verdict(("T/0", 1), Outcome("wrong", 1.5, "Error \udcff"))


@pytest.fixture
def path(tmp_path):
    return journal_path(tmp_path / "out.json")


def test_it_goes_on_where_it_stopped(path):
    assert path.name == "out.json.partial.jsonl"
    begun(path)
    with opened(path) as journal:
        assert journal.samples == {("T/0", number): sample(number) for number in range(3)}
        assert journal.verdicts == {
            ("T/0", 0): Outcome("passed", 0.25),
            ("T/0", 1): Outcome("wrong", 1.5, "Error \udcff"),
        }
        journal.add_verdict(("T/0", 2), Outcome("timeout", 3.0))
    with opened(path) as journal:
        assert len(journal.verdicts) == 3
        journal.delete()
    assert not path.exists()


def test_cut_at_every_byte(path, caplog):
    """A kill may leave any beginning of the file."""
    caplog.set_level(logging.WARNING)
    begun(path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        caplog.clear()
        with opened(path) as journal:
            whole = data[:size].split(b"\n")[:-1]
            assert len(journal.samples) == sum(b'{"sample"' in line for line in whole)
            assert len(journal.verdicts) == sum(b'{"verdict"' in line for line in whole)
            torn = size > 0 and data[size - 1 : size] != b"\n"
            assert ("a line cut short by a kill is dropped" in caplog.text) == torn
            for number in range(len(journal.samples), 3):
                journal.add_sample(("T/0", number), sample(number))
        with opened(path) as journal:
            assert len(journal.samples) == 3


def test_a_killed_process_leaves_what_it_added(path):
    code = """
import os, signal, sys
from flex.evals.journal import *
journal = Journal(sys.argv[1], {"a": 1}, {})
for number in range(5):
    journal.add_sample(("T", number), Generated(number, "x", 1, "eos"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code, str(path)])
    assert process.returncode == -9
    with Journal(path, {"a": 1}, {}) as journal:
        assert len(journal.samples) == 5


def test_other_settings_are_refused_by_name(path):
    begun(path)
    before = path.read_bytes()
    other = {"model": {"id": "m", "adapter": "x"}, "protocol": {"stops": ("\n",), "seed": 0}}
    with pytest.raises(DataError) as error:
        opened(path, other)
    assert "model.adapter, protocol.stops" in error.value.what
    assert "delete the file" in error.value.fix
    assert path.read_bytes() == before
    opened(path).close()  # the lock was let go


def test_another_tool_chain_costs_the_verdicts_only(path, caplog):
    begun(path)
    with opened(path, execution={**EXECUTION, "toolchain": "Python 3.12"}) as journal:
        assert len(journal.samples) == 3
        assert not journal.verdicts
        assert "2 verdicts are dropped and run again: toolchain differs" in caplog.text
        journal.add_verdict(("T/0", 0), Outcome("wrong", 0.1))
    with opened(path, execution={**EXECUTION, "toolchain": "Python 3.12"}) as journal:
        assert journal.verdicts == {("T/0", 0): Outcome("wrong", 0.1)}
    with opened(path) as journal:  # and back: the old verdicts stay dropped
        assert not journal.verdicts


def test_missing_tool_chains_are_tried_again(path, caplog):
    caplog.set_level(logging.INFO)
    begun(path)
    with opened(path) as journal:
        journal.add_verdict(("T/0", 2), Outcome("missing", 0.0))
    for _ in range(2):
        with opened(path) as journal:
            assert ("T/0", 2) not in journal.verdicts
            assert "1 samples without a tool chain are tried again" in caplog.text
            journal.add_verdict(("T/0", 2), Outcome("missing", 0.0))
    with opened(path) as journal:
        journal.add_verdict(("T/0", 2), Outcome("passed", 0.0))
    with opened(path) as journal:
        assert journal.verdicts["T/0", 2].kind == "passed"


def test_one_process_at_a_time(path):
    with opened(path), pytest.raises(DataError, match="in use by another process"):
        opened(path)
    opened(path).close()


DAMAGE = {
    "no JSON": b"{nonsense",
    "no object": b"[1, 2]",
    "blank": b"",
    "unknown": b'{"surprise": 1}',
    "no seed": b'{"sample": ["T/9", 0], "text": "", "new_tokens": 1, "finish": "stop"}',
    "a key too many": b'{"sample": ["T/9", 0], "seed": 1, "text": "", "new_tokens": 1, "finish": "stop", "x": 1}',
    "a mistyped seed": b'{"sample": ["T/9", 0], "seed": "1", "text": "", "new_tokens": 1, "finish": "stop"}',
    "true for a number": b'{"sample": ["T/9", 0], "seed": true, "text": "", "new_tokens": 1, "finish": "stop"}',
    "a mistyped key": b'{"sample": ["T/9", "0"], "seed": 1, "text": "", "new_tokens": 1, "finish": "stop"}',
    "an unknown end": b'{"sample": ["T/9", 0], "seed": 1, "text": "", "new_tokens": 1, "finish": "tired"}',
    "a second sample": b'{"sample": ["T/0", 0], "seed": 1, "text": "", "new_tokens": 1, "finish": "stop"}',
    "no such sample": b'{"verdict": ["T/7", 0], "kind": "passed", "seconds": 1, "detail": ""}',
    "a second verdict": b'{"verdict": ["T/0", 0], "kind": "passed", "seconds": 1, "detail": ""}',
    "an unknown kind": b'{"verdict": ["T/0", 2], "kind": "PASSED", "seconds": 1, "detail": ""}',
}


@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE)
def test_damage_before_the_last_line_is_an_error(path, line):
    begun(path)
    data = path.read_bytes() + line + b'\n{"sample": ["T/8", 0], "seed": 1'
    path.write_bytes(data)
    with pytest.raises(DataError, match="line 8") as error:
        opened(path)
    assert "head -n 7" in error.value.fix


@pytest.mark.parametrize("data", [b"my notes", b"my notes\n", b'{"format": "flex-journal-2"}\n'])
def test_a_foreign_file_is_left_as_it_is(path, data):
    path.write_bytes(data)
    with pytest.raises(DataError, match="not a journal of the format flex-journal-1"):
        opened(path)
    assert path.read_bytes() == data


def test_what_the_caller_must_not_do(path):
    begun(path)
    with opened(path) as journal:
        before = path.read_bytes()
        for key, outcome, words in [
            (("T/9", 0), Outcome("passed", 0), "has no sample"),
            (("T/0", 0), Outcome("passed", 0), "a second verdict"),
            (("T/0", 2), Outcome("fine", 0), "kind = 'fine'"),
        ]:
            with pytest.raises(ValueError, match=words):
                journal.add_verdict(key, outcome)
        with pytest.raises(ValueError, match="a second sample"):
            journal.add_sample(("T/0", 0), sample())
        with pytest.raises(ValueError, match="surrogates"):
            journal.add_sample(("T/1", 0), Generated(0, "\ud800", 1, "eos"))
        assert ("T/1", 0) not in journal.samples
        with pytest.raises(ValueError, match="JSON compliant"):
            journal.add_verdict(("T/0", 2), Outcome("passed", float("nan")))
        assert ("T/0", 2) not in journal.verdicts
        assert path.read_bytes() == before


def test_a_full_disk_is_an_error_and_leaves_no_half_line(path, monkeypatch):
    begun(path)
    with opened(path) as journal:
        write = __import__("os").write
        monkeypatch.setattr("flex.evals.journal.os.write", lambda file, data: write(file, data[:9]))
        with pytest.raises(DataError, match="the disk is full"):
            journal.add_sample(("T/1", 0), sample())
        assert ("T/1", 0) not in journal.samples
        monkeypatch.undo()
        journal.add_sample(("T/1", 0), sample())
    with opened(path) as journal:
        assert len(journal.samples) == 4


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be opened") as error:
        opened(tmp_path / "none" / "out.jsonl")
    assert "create the folder" in error.value.fix


@pytest.mark.parametrize(
    ("one", "other", "keys"),
    [
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1}, {"a": True}, ["a"]),
        ({"a": None}, {}, ["a"]),
        ({"a": {"b": [1]}}, {"a": {"b": [1, 2]}}, ["a.b"]),
        ({"a": {}}, {"a": 0}, ["a"]),
        ("x", "y", ["everything"]),
    ],
)
def test_differing_keys(one, other, keys):
    assert list(differing(one, other)) == keys


def test_a_line_is_what_the_documentation_says(path):
    begun(path)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert lines[0]["format"] == "flex-journal-1"
    assert lines[1] == {"execution": EXECUTION}
    assert lines[2] == {
        "sample": ["T/0", 0],
        "seed": 0,
        "text": TEXT,
        "new_tokens": 9,
        "finish": "stop",
    }
    assert lines[5] == {"verdict": ["T/0", 0], "kind": "passed", "seconds": 0.25, "detail": ""}
