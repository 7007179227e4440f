"""Promise R5: a signal becomes a save at the end of the step; a second Ctrl-C leaves at once."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flex.stop import Stop, StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_for_good(number, caplog):
    caplog.set_level(logging.INFO)
    with StopSignal() as stop:
        assert stop.poll() == Stop.GO and not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert [stop.poll(), stop.poll()] == [Stop.STOP, Stop.STOP]
    assert [r.message for r in caplog.records] == [f"{number.name}: saving, then leaving"]


def test_sigusr1_asks_for_one_save(caplog):
    caplog.set_level(logging.INFO)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [stop.poll(), stop.poll()] == [Stop.SAVE, Stop.GO]
        assert not stop.requested
    assert "SIGUSR1" in caplog.text


def test_trigger_files_act_once_and_vanish(tmp_path):
    with StopSignal(tmp_path) as stop:
        (tmp_path / "SAVE").touch()
        assert [stop.poll(), stop.poll()] == [Stop.SAVE, Stop.GO]
        (tmp_path / "STOP").touch()
        assert stop.poll() == Stop.STOP and stop.requested
    assert list(tmp_path.iterdir()) == []
    assert StopSignal(tmp_path).poll() == Stop.GO  # the next run is not stopped by it


def test_a_stop_outweighs_a_save_and_any_rank_outweighs_the_others(tmp_path):
    with StopSignal(tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "STOP").touch()
        assert stop.poll() == Stop.STOP
    assert max(Stop.GO, Stop.SAVE, Stop.STOP) == Stop.STOP  # what the engine's all-reduce computes


def test_the_old_handlers_come_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with pytest.raises(RuntimeError), StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise RuntimeError
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_outside_the_main_thread_only_the_files_work(tmp_path, caplog):
    seen = []

    def work():
        with StopSignal(tmp_path) as stop:
            (tmp_path / "STOP").touch()
            seen.append(stop.poll())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [Stop.STOP]
    assert signal.getsignal(signal.SIGTERM) == before
    assert "not in the main thread" in caplog.text


LOOP = """
import time
from flex.stop import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saved", flush=True)
    {after}
"""


def loop(after: str) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(after=after)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_process_that_gets_sigterm_finishes_its_step_and_exits_clean():
    with loop(after="pass") as child:
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "saved\n"
        assert child.wait(10) == 0


def test_a_second_interrupt_leaves_at_once():
    with loop(after="time.sleep(60)") as child:
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "saved\n"
        child.send_signal(signal.SIGTERM)  # the launcher passes one on; it must not count as second
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130
        assert "press Ctrl-C again" in child.stderr.read()
