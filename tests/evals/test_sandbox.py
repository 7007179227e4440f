"""Which sandbox is taken, and what is left without one: limits."""

import os
import time

import pytest

from flex.errors import DataError
from flex.evals import sandbox
from flex.evals.execute import Runner
from flex.evals.sandbox import LEVELS, NONE, Sandbox, Stage
from flex.evals.tasks import Program


@pytest.fixture
def nothing_isolates(monkeypatch):
    monkeypatch.setattr(Sandbox, "_problem", lambda self: f"no {self.level} here")


def test_without_a_sandbox_nothing_runs_unless_asked_for(nothing_isolates):
    with pytest.raises(DataError) as error:
        Runner("py")
    assert "no bwrap here" in str(error.value) and "--allow-unsandboxed" in str(error.value)
    with Runner("py", allow_unsandboxed=True) as runner:
        assert runner.level == NONE


def test_limits_hold_without_a_sandbox(nothing_isolates):
    with Runner("py", seconds=1, memory_bytes=256 << 20, allow_unsandboxed=True) as runner:
        for source, kind in {
            "assert 1 + 1 == 2": "passed",
            "assert False": "wrong",
            "x = bytearray(1 << 30)": "limit",
            "while True: print('x' * 99999)": "limit",
            "import os\nassert 'FLEX_SECRET' in os.environ": "wrong",
        }.items():
            assert runner.run(Program("py", source)).kind == kind, source
        begin = time.monotonic()
        daemon = "import os, time\nif os.fork() == 0: os.setsid(); time.sleep(60)\ntime.sleep(60)"
        assert runner.run(Program("py", daemon)).kind == "timeout"
        assert time.monotonic() - begin < 3


def test_the_strongest_that_works_is_taken(monkeypatch):
    monkeypatch.setattr(Sandbox, "_problem", lambda self: "" if self.level == "unshare" else "no")
    assert Sandbox().level == "unshare"
    monkeypatch.setattr(Sandbox, "_problem", lambda self: "")
    assert Sandbox().level == LEVELS[0]


def test_no_report_is_tried_once_more_and_then_said(monkeypatch, caplog):
    made = Sandbox(allow_unsandboxed=True)
    starts = []

    def dies(self, spec, stderr=None):
        starts.append(spec)
        return sandbox.subprocess.Popen(
            ["/bin/false"],
            stdin=sandbox.subprocess.PIPE,
            stdout=sandbox.subprocess.PIPE,
            stderr=sandbox.subprocess.PIPE,
        )

    monkeypatch.setattr(Sandbox, "_start", dies)
    report = made.run({}, [Stage(("/bin/true",))])
    assert report.status != 0 and not report.ended
    assert len(starts) == 2 and "no report again" in caplog.text


def test_secrets_do_not_pass_by_the_environment(monkeypatch):
    monkeypatch.setenv("FLEX_SECRET", "x")
    with Runner("py", allow_unsandboxed=True) as runner:
        source = "import os\nassert 'FLEX_SECRET' not in os.environ"
        assert runner.run(Program("py", source)).kind == "passed"
    assert os.environ["FLEX_SECRET"] == "x"
