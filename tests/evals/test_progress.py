"""What is said while an evaluation works."""

import logging

import pytest

from flex.evals import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_left_are_of_this_session(clock, caplog):
    caplog.set_level(logging.INFO, "flex.evals")
    with progress.Meter("generating", 10, done=4) as meter:
        assert str(meter) == "4 of 10" and meter.rate is None
        clock[0] += 20
        meter.add(300)
        assert str(meter) == "5 of 10, 15 tokens/s, about 1:40 left" and not caplog.messages
        clock[0] += 20
        meter.add(100)
        assert caplog.messages == ["generating: 6 of 10, 10 tokens/s, about 1:20 left"]
        meter.add()
    clock[0] += 1000
    assert meter.seconds == 40 and meter.rate == 10 and meter.made == 3
    assert caplog.messages[1:] == ["generating: 7 of 10, 10 tokens/s, about 0:40 left"]


def test_nothing_to_do_says_nothing(clock, caplog):
    caplog.set_level(logging.INFO, "flex.evals")
    with progress.Meter("running", 4, done=4) as meter:
        pass
    assert caplog.messages == [] and meter.rate is None and str(meter) == "4 of 4"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.7, "1:00"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert progress.clock(seconds) == text
