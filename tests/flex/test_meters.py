"""The console line, the record, metrics.jsonl and the plot."""

import io
import json
import logging
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from flex.loss_plot import plot_losses
from flex.meters import WINDOW, Meter, format_duration, format_line, peak_memory
from flex.metrics_file import MetricsFile, read_metrics, truncate_after
from flex.state import StepReport


def report(step: int = 12, **changes) -> StepReport:
    fields = {
        "loss": 1.2341,
        "lr": 9.8e-05,
        "grad_norm": 0.83,
        "tokens": 1234,
        "positions": 2000,
        "seconds": 1.0,
        "penalty": 0.12,
        "penalty_weighted": 2.4e-3,
        "penalty_share": 0.003,
        "memory_bytes": 2_100_000_000,
    }
    return StepReport(step=step, **{**fields, **changes})


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_the_line(path, capsys):
    with Meter(path, 204) as meter:
        meter.update(report(validation_loss=1.5, clipped_fraction=0.41))
    assert capsys.readouterr().out == (
        "step 12/204 | loss 1.234 | val 1.500 | penalty 0.12 (lambda*P 2.4e-03, 0.3% of grad) | "
        "lr 9.8e-05 | gnorm 0.83 | clipped 41% | 1,234 tok/s | 2.1 GB | eta 3m12s\n"
    )


def test_the_line_leaves_out_what_there_is_not(path, capsys):
    with Meter(path, 12, penalty=False) as meter:
        meter.update(report())
    line = capsys.readouterr().out
    assert (
        line
        == "step 12/12 | loss 1.234 | lr 9.8e-05 | gnorm 0.83 | 1,234 tok/s | 2.1 GB | eta 0s\n"
    )


def test_nan_is_shown_and_recorded(path, capsys):
    with Meter(path, 20) as meter:
        meter.update(report(loss=math.nan, grad_norm=math.inf, skipped=True))
    line = capsys.readouterr().out
    assert "loss nan" in line and "gnorm inf" in line and "SKIPPED" in line

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw["loss"] == "nan" and raw["grad_norm"] == "inf" and raw["skipped"] is True
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf


def test_the_record_is_flat_and_complete(path):
    with Meter(path, 100) as meter:
        record = meter.update(report(high_band={"A": 0.25, "B": 0.5}, curvature_mean=1e-7))
    assert record["high_band_A"] == 0.25 and record["high_band_B"] == 0.5
    assert "validation_loss" not in record and "high_band" not in record
    assert all(isinstance(value, (int, float)) for value in record.values())
    assert read_metrics(path) == [record]
    absent = {"high_band", "validation_loss", "clipped_fraction", "passed", "evaluated"}
    assert set(vars(report())) - absent <= set(record)


def test_rates_are_over_a_moving_window_of_steps(path):
    with Meter(path, 1000, rank=1) as meter:
        meter.update(report(1, tokens=10, positions=30, seconds=100.0))
        record = meter.update(report(2, tokens=20, positions=40, seconds=2.0))
        assert record["tokens_per_second"] == pytest.approx(30 / 102)
        assert record["positions_per_second"] == pytest.approx(70 / 102)
        assert record["eta_seconds"] == pytest.approx(998 * 51)
        for step in range(3, 3 + WINDOW):
            record = meter.update(report(step, tokens=50, positions=60, seconds=0.5))
        assert record["tokens_per_second"] == pytest.approx(100)
        assert record["positions_per_second"] == pytest.approx(120)
        assert record["eta_seconds"] == pytest.approx((1000 - 22) * 0.5)


def test_other_ranks_print_and_write_nothing(path, capsys):
    with Meter(path, 3, rank=1) as meter:
        assert meter.update(report(1))["loss"] == 1.2341
        meter.validation(0, 2.0)
    assert capsys.readouterr().out == "" and not path.exists()


def test_every_step_is_recorded_and_due_ones_are_printed(path, capsys):
    with Meter(path, 12, log_every=5) as meter:
        meter.validation(0, 2.5)
        for step in range(1, 13):
            extra = {3: {"validation_loss": 1.0}, 7: {"skipped": True}}.get(step, {})
            meter.update(report(step, **extra))
    printed = [line.split("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == [f"step {s}" for s in (0, 3, 5, 7, 10, 12)]
    assert [r["step"] for r in read_metrics(path)] == list(range(13))


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (math.nan, "nan"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_memory_is_the_high_water_mark_in_bytes():
    status = Path("/proc/self/status").read_text()
    kib = int(status.split("VmHWM:")[1].split()[0])
    assert peak_memory("cpu") == pytest.approx(kib * 1024, rel=0.05)


# ---- metrics.jsonl ---------------------------------------------------------------------------


def test_each_step_is_there_once_after_a_resume(path, caplog):
    caplog.set_level(logging.INFO)
    with Meter(path, 10) as meter:
        for step in range(1, 8):
            meter.update(report(step, loss=1.0))
    with open(path, "a") as stream:
        stream.write('{"step": 8, "lo')  # killed in the middle of a line
    with Meter(path, 10, resumed=5) as meter:
        for step in range(6, 11):
            meter.update(report(step, loss=2.0))
    records = read_metrics(path)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["loss"] for r in records] == [1.0] * 5 + [2.0] * 5
    assert "cut 2 records" in caplog.text and "1 unreadable" in caplog.text


def test_a_fresh_start_cuts_everything_even_the_first_validation(path):
    for _ in range(2):
        with Meter(path, 10) as meter:
            meter.validation(0, 2.0)
    assert [r["step"] for r in read_metrics(path)] == [0]


def test_a_cut_keeps_the_other_lines_byte_for_byte_and_is_atomic(path, monkeypatch):
    with Meter(path, 10) as meter:
        for step in range(1, 6):
            meter.update(report(step, loss=1 / 3 * step, grad_norm=math.nan))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("killed here")))
        with pytest.raises(OSError):
            truncate_after(path, 3)
    assert path.read_bytes() == before
    assert truncate_after(path, 3) == 2
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
    assert truncate_after(path, 3) == 0
    assert truncate_after(path.with_name("absent"), 3) == 0


class SmallDisk(io.RawIOBase):
    """Room for one record and a half; later there is room again."""

    name = "metrics.jsonl"

    def __init__(self):
        self.data, self.room = b"", 20

    def write(self, data):
        taken = bytes(data[: self.room])
        self.data += taken
        self.room -= len(taken)
        if not taken:
            raise OSError(28, "No space left on device")
        return len(taken)


def test_a_full_disk_loses_records_not_the_run(path, caplog):
    file, disk = MetricsFile(path), SmallDisk()
    file._stream.close()
    file._stream = disk
    for step in range(1, 5):
        file.append({"step": step})
    disk.room = 1000
    file.append({"step": 5})
    file.close()
    path.write_bytes(disk.data)
    assert [r["step"] for r in read_metrics(path)] == [1, 5]
    assert [r.message for r in caplog.records[:2]] == [
        "metrics.jsonl: a record was lost: the line was only partly written; training goes on",
        "metrics.jsonl: 3 records were lost",
    ]


# ---- terminal and plot -----------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from flex.meters import Meter
from flex.state import StepReport
with Meter(Path(sys.argv[1]), 3) as meter:
    for step in (1, 2, 3):
        meter.update(StepReport(step, 1.5, 1e-4, 0.8, tokens=10, positions=20, seconds=0.1))
"""


def test_on_a_terminal_the_bar_is_on_stderr_and_the_lines_stay_in_the_pipe(path):
    main, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        stdout=subprocess.PIPE,
        stderr=terminal,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        timeout=60,
    )
    os.close(terminal)
    bar = os.read(main, 65536).decode()
    os.close(main)
    assert done.returncode == 0, bar
    assert [line.split(" |")[0] for line in done.stdout.decode().splitlines()] == [
        f"step {s}/3" for s in (1, 2, 3)
    ]
    assert "3/3" in bar and "loss" not in bar


def test_the_plot_is_a_png_of_all_three_curves(path, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    real = Axes.plot

    def plot(self, x, y, *args, **kwargs):
        drawn[kwargs["label"]] = (list(x), list(y))
        return real(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", plot)
    with Meter(path, 3) as meter:
        meter.validation(0, 3.0)
        meter.update(report(1, loss=2.0))
        meter.update(report(2, loss=math.nan, penalty_weighted=0.5, validation_loss=2.5))
    image = tmp_path / "loss.png"
    assert plot_losses(path, image)
    assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 5000
    assert drawn["validation loss"] == ([0, 2], [3.0, 2.5])
    assert drawn["training loss"][0] == [1, 2] and drawn["training loss"][1][0] == 2.0
    assert drawn["lambda * penalty"] == ([1, 2], [2.4e-3, 0.5])


def test_without_a_step_there_is_no_plot(path, tmp_path):
    assert not plot_losses(path, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_format_line_shows_a_refreshed_curvature(path):
    with Meter(path, 20, rank=1) as meter:
        record = meter.update(report(curvature_mean=3.1e-07, refreshed=True))
    assert "| h 3.1e-07 |" in format_line(record, 20)
