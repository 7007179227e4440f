"""Ranges around phases and kernels: what the table and the trace say, and that off costs nothing."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch

from flex import ranges
from flex.config import ProfileConfig
from flex.config_io import load_config
from flex.errors import ConfigError
from flex.kernels.ranges import install, named, ranged
from flex.profile_table import range_rows, range_table
from flex.ranges import Profile, Recorder, Span, check_profile
from flex.step import train_step
from tests.flex.test_step import Parts, config
from tests.runs import TINY, run, write_rows

PHASES = {"step", "data", "forward", "backward", "penalty", "optimizer", "all-reduce"}


@pytest.fixture(autouse=True)
def _nothing_is_left_installed():
    yield
    assert install(None) is None


def profile(tmp_path, tool="torch", steps="2-3"):
    return Profile(ProfileConfig(tool=tool, steps=steps), tmp_path)


def train(parts, profile, steps):
    """The loop's own order, with a stand-in for a kernel in the middle."""
    with profile:
        for i in range(steps):
            with profile.step(i + 1):
                total = parts.loader.total_steps
                train_step(parts.cfg, parts.engine, parts.loader, parts.penalty, i, total)
                with named("stand_in/part", bytes=lambda: 1000):
                    torch.ones(100).sum()
            with named("log"):
                pass


# ---- the option ----


@pytest.mark.parametrize(
    ("text", "first", "last"), [("5-8", 5, 8), ("1", 1, 1), ("3-3", 3, 3), ("9-10", 9, 10)]
)
def test_steps_are_read(text, first, last):
    cfg = load_config(None, ["profile.tool=torch", f"profile.steps={text}"]).profile
    assert (cfg.first, cfg.last) == (first, last)


@pytest.mark.parametrize(
    "text",
    ["0", "0-3", "05-8", "5-", "-5", "5..8", "5 - 8", "5,8", "a", "5-8-9", "\u0665-8", "1e1"],
)
def test_steps_that_are_no_steps(text):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"profile.steps={text}"])
    error = caught.value
    assert f"profile.steps = {text}" in error.what
    assert error.why.startswith("profile.steps: must be a step or FIRST-LAST, such as 5-8")
    assert "profile.steps" in error.fix


def test_steps_that_end_before_they_begin():
    with pytest.raises(ConfigError, match="must not end before it begins"):
        load_config(None, ["profile.steps=8-5"])


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        (["profile.tool=proton"], "profile.tool=proton, but there is no GPU", "profile.tool=torch"),
        (["profile.tool=nvtx"], "profile.tool=nvtx, but there is no NVIDIA", "profile.tool=torch"),
        (
            ["profile.tool=torch", "profile.steps=5-21"],
            "profile.steps=5-21, but the run has 20 steps",
            "within 1-20",
        ),
    ],
)
def test_what_cannot_be_profiled_is_refused(options, what, fix, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        check_profile(load_config(None, options).profile, 20)
    assert what in caught.value.what and fix in caught.value.fix and caught.value.why


def test_a_triton_without_proton_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ranges.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="this Triton has no profiler"):
        check_profile(ProfileConfig(tool="proton"), 20)


def test_without_a_tool_nothing_is_checked():
    check_profile(ProfileConfig(steps="100-200"), 1)


# ---- rows and table ----


def span(name, start, end, bytes=None, in_step=True, device=None):
    found = Span(name, 1, start, end, bytes, in_step)
    if device is not None:
        found.device_start, found.device_end = device
    return found


def test_the_rows_add_up_calls_time_bytes_and_shares():
    spans = [
        span("k/slow", 0.1, 0.3, bytes=400),
        span("forward", 0.0, 0.5),
        span("k/fast", 0.6, 0.7, bytes=10),
        span("step", 0.0, 1.0),
        span("validation", 1.0, 3.0, in_step=False),
        span("k/slow", 3.1, 3.2, bytes=200),
        span("k/fast", 3.3, 3.35),
        span("forward", 3.0, 3.4),
        span("step", 3.0, 4.0),
    ]
    rows = {row.name: row for row in range_rows(spans, bandwidth=4000.0)}
    assert list(rows)[-2:] == ["k/slow", "k/fast"]  # kernels last, the longest first
    assert set(list(rows)[:3]) == {"forward", "step", "validation"}
    assert (rows["forward"].calls, rows["step"].calls) == (2, 2)
    assert rows["forward"].seconds == pytest.approx(0.9)
    assert rows["forward"].share == pytest.approx(0.45)
    assert rows["step"].share == 1.0 and rows["validation"].share is None
    assert rows["k/slow"].bytes == 600
    assert rows["k/slow"].floor == pytest.approx(600 / 4000 / 0.3)
    assert rows["k/fast"].bytes is None and rows["k/fast"].floor is None  # one call did not say
    assert all(row.floor is None for row in range_rows(spans))


def test_the_gpus_clock_counts_where_there_is_one():
    found = span("k/x", 0.0, 0.001, device=(5.0, 5.25))
    assert found.seconds == 0.25
    assert span("k/x", 0.0, 0.001).seconds == 0.001


def test_the_table_has_bytes_only_where_they_are_known():
    spans = [span("step", 0, 1), span("k/a", 0.0, 0.5, bytes=2_000_000)]
    plain, full = range_table("t", spans), range_table("t", spans, 1e9)
    assert [c.header for c in plain.columns] == [
        "range",
        "calls",
        "total ms",
        "ms/call",
        "of the step",
    ]
    assert [c.header for c in full.columns][5:] == ["MB/call", "of the floor"]
    assert list(full.columns[5].cells) == ["", "2.000"]
    assert list(full.columns[6].cells) == ["", "0.4%"]
    assert list(full.columns[4].cells) == ["100.0%", "50.0%"]
    assert "1.0 GB/s" in str(full.caption)


# ---- a tiny run ----


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Steps 2 and 3 of five, each of two micro-batches, under torch.profiler."""
    folder = tmp_path_factory.mktemp("run")
    parts = Parts(config(train={"accumulation": 2}))
    with pytest.MonkeyPatch.context() as patch:
        kept = {}
        original = Recorder.spans
        patch.setattr(Recorder, "spans", lambda self: kept.setdefault(self, original(self)))
        train(parts, profile(folder), 5)
    spans = next(s for s in kept.values() if len(s) > 1)
    return folder / "profile", spans


def test_every_phase_of_the_chosen_steps_is_counted(profiled):
    _, spans = profiled
    calls = Counter(s.name for s in spans)
    phases = {name: count for name, count in calls.items() if "/" not in name}
    # the loop's line after step 3 comes when the tool has stopped
    assert phases == dict.fromkeys(PHASES, 2) | {"forward": 4, "backward": 4, "log": 1}
    assert calls["stand_in/part"] == 2
    for part in ("forward", "backward"):  # of 6 adapted layers
        assert calls[f"lora_linear/{part}"] == 2 * 2 * 6


def test_times_nest(profiled):
    _, spans = profiled
    steps = [s for s in spans if s.name == "step"]
    inside = [s for s in spans if s.name in PHASES - {"step"}]
    for s in inside:
        assert s.in_step and any(t.start <= s.start <= s.end <= t.end for t in steps)
    total = sum(t.seconds for t in steps)
    assert 0.5 * total < sum(s.seconds for s in inside) <= total  # the phases are most of a step
    assert [s.in_step for s in spans if s.name == "log"] == [False]


def test_the_trace_holds_all_ranges(profiled):
    folder, spans = profiled
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    marks = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    for name, count in Counter(s.name for s in spans).items():
        assert marks[name] == count, name
    assert any(e["name"] == "_LoraLinear" or "aten::" in e["name"] for e in events)


def test_the_table_is_on_disk(profiled):
    folder, _ = profiled
    text = (folder / "table.txt").read_text()
    assert text.startswith("steps 2-3 under profile.tool=torch\n")
    for name in (*PHASES, "stand_in/part", "aten::"):
        assert f"\n{name}" in text, name
    (line,) = (line for line in text.splitlines() if line.startswith("stand_in/part"))
    assert line.split()[1] == "2" and "0.001" in line.split()  # calls, MB a call
    assert "of the floor" in text and "GB/s" in text


def test_sophias_refresh_is_a_phase(tmp_path):
    train(Parts(config("sophia")), profile(tmp_path, steps="1-2"), 2)
    text = (tmp_path / "profile/table.txt").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("refresh"))
    assert line.split()[1] == "1"  # one refresh before the first update, the next is ten later


def test_off_calls_no_profiler_and_makes_no_object(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a range was made")

    monkeypatch.setattr(torch.profiler, "record_function", never)
    monkeypatch.setattr(ranges, "Recorder", never)
    train(Parts(config()), profile(tmp_path, tool="none", steps="1-2"), 2)
    train(Parts(config()), Profile(ProfileConfig(tool="torch"), tmp_path, active=False), 6)
    assert named("a", bytes=never) is named("b", bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_off_is_cheap():
    start = time.perf_counter()
    for _ in range(100_000):
        with named("x"):
            pass
    assert time.perf_counter() - start < 0.5  # 5 us each; it takes a tenth of that


# ---- ends that are not the planned one ----


def test_a_run_that_stops_early_shows_what_it_has(tmp_path):
    train(Parts(config()), profile(tmp_path, steps="2-9"), 3)
    assert (tmp_path / "profile/table.txt").read_text().startswith("steps 2-3 under")
    assert (tmp_path / "profile/trace.json").exists()


def test_an_error_in_a_step_is_not_hidden_and_turns_ranges_off(tmp_path):
    with (
        pytest.raises(KeyError, match="mine"),
        profile(tmp_path, steps="1-2") as running,
        running.step(1),
    ):
        raise KeyError("mine")
    assert named("a") is named("b")
    assert not (tmp_path / "profile/table.txt").exists()


def test_steps_that_lie_behind_are_said_to(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "flex.profile")
    with profile(tmp_path, steps="2-3") as running:
        for number in (7, 8):
            with running.step(number):
                pass
    assert caplog.text.count("profile.steps=2-3 lie behind step 6") == 1
    assert list(tmp_path.iterdir()) == []


# ---- tools that need a GPU: what they are told ----


def test_nvtx_ranges_are_pushed_and_popped(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("pop"))
    before = install(Recorder(ranges._Nvtx().mark, cuda=False))
    try:
        with named("a"), named("b/{}", bytes=3):
            pass
    finally:
        install(before)
    assert seen == ["a", "b/{}", "pop", "pop"]


def test_proton_gets_scopes_with_bytes(monkeypatch):
    profiler = pytest.importorskip("triton.profiler")
    seen = []
    monkeypatch.setattr(
        profiler.scope, "_enter_scope", lambda self: seen.append((self.name, self.metrics))
    )
    monkeypatch.setattr(profiler.scope, "_exit_scope", lambda self: seen.append(self.name))
    before = install(Recorder(ranges._Proton().mark, cuda=False))
    try:
        with named("a"), named("b/c", bytes=3):
            pass
    finally:
        install(before)
    assert seen == [("a", {}), ("b/c", {"bytes": 3}), "b/c", "a"]


def test_a_tool_without_a_trace_of_its_own_gets_ours(tmp_path, monkeypatch):
    class Silent(ranges._Tool):
        def mark(self, name, bytes):
            return ranges.nullcontext()

    monkeypatch.setitem(ranges._TOOLS, "nvtx", Silent)
    train(Parts(config()), profile(tmp_path, tool="nvtx", steps="1-2"), 2)
    events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    complete = [e for e in events if e["ph"] == "X"]
    assert {e["name"] for e in complete} >= PHASES | {"log", "stand_in/part"}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 and e["pid"] == 0 for e in complete)
    assert "operator" not in (tmp_path / "profile/table.txt").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["torch", "proton", "nvtx"])
def test_on_a_gpu_the_devices_time_is_shown(tool, tmp_path):
    x = torch.randn(4096, 4096, device="cuda")
    with profile(tmp_path, tool=tool, steps="1-2") as running:
        for number in (1, 2):
            with running.step(number), named("product/all", bytes=3 * 4 * x.numel()):
                x @ x
    (row,) = (
        line
        for line in (tmp_path / "profile/table.txt").read_text().splitlines()
        if line.startswith("product/all")
    )
    assert float(row.split()[2]) > 0.1  # ms: 137 GFLOP twice; a launch alone takes 0.01
    assert (tmp_path / "profile/trace.json").exists()


# ---- the kernels' side ----


def test_ranges_of_other_threads_are_kept_apart():
    recorder = Recorder(lambda name, bytes: ranges.nullcontext(), cuda=False)
    before = install(recorder)
    try:
        with named("step"):
            other = threading.Thread(target=work)
            other.start()
            other.join()
        work()
    finally:
        install(before)
    first, step, last = recorder.spans()
    assert (first.name, step.name, last.name) == ("k/x", "step", "k/x")
    assert first.thread != step.thread == last.thread
    assert first.in_step and not last.in_step


def work():
    with named("k/x"):
        time.sleep(0.001)


def test_the_decorator_asks_for_bytes_only_when_on():
    asked = []

    @ranged("k/double", bytes=lambda x, times=2: asked.append(x) or 8 * x)
    def double(x, times=2):
        """Twice."""
        return x * times

    assert double(3) == 6 and asked == [] and double.__doc__ == "Twice."
    recorder = Recorder(lambda name, bytes: ranges.nullcontext(), cuda=False)
    before = install(recorder)
    try:
        assert double(3, times=3) == 9
        with pytest.raises(TypeError):
            double(None)
    finally:
        install(before)
    (found,) = recorder.spans()
    assert (found.name, found.bytes, asked) == ("k/double", 24, [3, None])


# ---- whole runs ----


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 12)
    shared = ("train.steps=4", "train.batch_size=2", "optim.name=adamw", "train.save_every=2")
    return (*TINY, f"data.path={rows}", *shared)


def test_a_profiled_run_learns_the_same(tmp_path):
    values = []
    for tool in ("none", "torch"):
        parts = Parts(config())
        train(parts, profile(tmp_path, tool=tool), 4)
        values.append(parts.values())
    assert all(torch.equal(p, values[1][name]) for name, p in values[0].items())


def test_a_profiled_run_leaves_its_files_and_says_where(options, tmp_path):
    profiled = ("profile.tool=torch", "profile.steps=2-3", "name=a")
    done = run(*options, f"dir={tmp_path}", *profiled)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "a/profile/table.txt").read_text()
    assert {line.split()[0] for line in table.splitlines() if line.strip()} >= PHASES | {"save"}
    assert "steps 2-3 under profile.tool=torch" in done.stdout
    assert str(tmp_path / "a/profile/trace.json") in done.stderr  # the log says where it is


def test_a_run_that_cannot_be_profiled_does_not_begin(options, tmp_path):
    done = run(*options, f"dir={tmp_path}", "profile.tool=torch", "profile.steps=3-5")
    assert done.returncode == 2
    assert "profile.steps=3-5, but the run has 4 steps" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_knows_the_sections_without_torch():
    code = (
        "import sys; from flex.config_io import load_config; "
        "assert load_config(None, ['kernels.impl=torch', 'profile.tool=nvtx']).kernels.impl == 'torch'; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
