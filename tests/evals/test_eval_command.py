"""The commands as they are typed, with benchmarks and a runner that are made up."""

import json
import sys
import types

import pytest

from flex.commands import main
from flex.errors import DataError
from flex.evals.results import load, timing_path
from flex.model.export import save_adapter
from tests.evals.made_evaluation import FakeRunner, benchmark
from tests.flex.saved import make_base, trained


@pytest.fixture
def made(monkeypatch):
    """Put in place of the modules that load data and run programs; returns what was built."""
    built = []

    def load_benchmark(name, data=None, limit=None):
        if name != "made":
            raise DataError(f"there is no benchmark {name}", "one is needed", "did you mean made?")
        return benchmark(limit or 6)

    def runner(language, workers=2, allow_unsandboxed=False):
        built.append(FakeRunner(language, level="none" if allow_unsandboxed else "fake"))
        return built[-1]

    for name, value in {
        "benchmarks": {"load_benchmark": load_benchmark},
        "execute": {"Runner": runner},
        "probe": {"unsolvable": lambda benchmark, runner: ("T/1",)},
    }.items():
        module = types.ModuleType(f"flex.evals.{name}")
        module.__dict__.update(value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("flex.train.set_up_logging", lambda: None)
    # made anew with the modules above, and again by whoever comes next
    monkeypatch.delitem(sys.modules, "flex.evals.measure_commands", raising=False)
    yield built
    sys.modules.pop("flex.evals.measure_commands", None)


EVAL = ["eval", "--model", "shape:tiny", "--benchmark", "made"]


def test_a_result_is_written_and_told(made, tmp_path, capsys):
    out = tmp_path / "r.json"
    arguments = [*EVAL, "--samples", "2", "--temperature", "1", "--top-p", "0.9", "--solvable"]
    arguments += ["--max-new-tokens", "5", "--batch-size", "4", "--seed", "3", "--limit", "4"]
    assert main([*arguments, "--out", str(out)]) == 0
    report = load(out)
    assert report.protocol["max_new_tokens"] == 5 and report.protocol["seed"] == 3
    assert (report.protocol["temperature"], report.protocol["top_p"]) == (1.0, 0.9)
    assert (report.samples, len(report.tasks), report.unsolvable) == (2, 4, ("T/1",))
    assert report.engine["batch_size"] == 4 and report.sandbox == "fake"
    text = capsys.readouterr().out
    for part in ("made, 4 tasks, 2 samples each", "pass@1, %", "compile, %", "tokens/s", str(out)):
        assert part in text, part
    assert made[0].closed and timing_path(out).exists()
    before = out.read_bytes()
    assert main([*arguments, "--out", str(out)]) == 0 and out.read_bytes() == before
    assert "pass@1, %" in capsys.readouterr().out and made[1].sources == []
    assert main([*arguments, "--seed", "4", "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "exists and differs in protocol.seed" in told and "python -m flex compare" in told


def test_greedy_is_the_default_and_the_benchmark_has_its_own_limit(made, tmp_path):
    assert main([*EVAL, "--out", str(tmp_path / "r.json"), "--allow-unsandboxed"]) == 0
    report = load(tmp_path / "r.json")
    assert (report.protocol["temperature"], report.protocol["max_new_tokens"]) == (0.0, 8)
    assert report.sandbox == "none" and report.unsolvable is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--workers", "0"], "--workers 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--samples", "3"], "3 samples with temperature 0"),
        (["--top-p", "0.9"], "top_p = 0.9 with temperature 0"),
        (["--temperature", "-1"], "temperature = -1"),
        (["--merged"], "--merged without --adapter"),
        (["--benchmark", "humanevil"], "did you mean made?"),
        (["--model", "shape:teeny"], "shape:teeny"),
        (["--adapter", "nowhere"], "nowhere has no adapter_config.json"),
        (["--out", "no/folder/r.json"], "there is no folder no/folder"),
        (["--out", "."], "is a folder"),
        (["--engine", "vllm"], "pip install vllm"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_generated(
    made, in_tmp, capsys, monkeypatch, arguments, words
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main([*EVAL, "--out", "r.json", *arguments]) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
    assert list(in_tmp.iterdir()) == []


def test_options_that_do_not_exist(capsys):
    for bad in (["--dtype", "int8"], ["--engine", "tgi"], ["--quantise", "3bit"], ["--beams", "2"]):
        with pytest.raises(SystemExit) as stop:
            main([*EVAL, "--out", "r.json", *bad])
        assert stop.value.code == 2
    assert "--beams" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept(made, in_tmp, capsys, monkeypatch):
    seen = []

    def run_many(self, programs):
        for key, program in programs:
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(key)
            yield from real(self, [(key, program)])

    real = FakeRunner.run_many
    monkeypatch.setattr(FakeRunner, "run_many", run_many)
    assert main([*EVAL, "--out", "r.json"]) == 130
    told = capsys.readouterr().err
    assert "interrupted: 6 completions, 2 of them run, are kept" in told and made[0].closed
    monkeypatch.setattr(FakeRunner, "run_many", real)
    assert main([*EVAL, "--out", "r.json"]) == 0 and load("r.json").missing == 0


def test_nll_against_another_file(made, in_tmp, capsys):
    command = ["nll", "--model", "shape:tiny", "--benchmark", "made", "--limit", "4"]
    assert main([*command, "--json", "a.json"]) == 0
    text = capsys.readouterr().out
    record = json.loads((in_tmp / "a.json").read_text())
    assert f"{record['summary'][0]['per_token']['value']:.4f}" in text and "bits per byte" in text
    assert main([*command, "--against", "a.json"]) == 0
    assert "+0.0000 [+0.0000, +0.0000]" in capsys.readouterr().out
    assert main([*command, "--data", "x", "y"]) == 2
    assert "1 benchmarks and 2 files" in capsys.readouterr().err


def test_merge_check(made, in_tmp, capsys):
    base = make_base(in_tmp / "base")
    adapter = save_adapter(trained(base), in_tmp / "adapter", str(base))
    command = ["merge-check", "--model", str(base), "--benchmark", "made", "--limit", "3"]
    command += ["--max-new-tokens", "6"]
    assert main([*command, "--adapter", str(adapter), "--json", "m.json"]) == 0
    text = capsys.readouterr().out
    record = json.loads((in_tmp / "m.json").read_text())
    assert record["agreeing"] == record["positions"] > 0 and record["diverged"] == []
    assert "merged against unmerged, float32" in text and "0 of 3" in text
    assert main(command) == 2 and "without --adapter" in capsys.readouterr().err


def test_merge_check_of_an_adapter_beside_four_bits(made, in_tmp, capsys):
    """Merged into the full-precision base; the base's own rounding is what is measured."""
    pytest.importorskip("bitsandbytes")
    base = make_base(in_tmp / "base", hidden_size=64, intermediate_size=128)
    adapter = save_adapter(trained(base), in_tmp / "adapter", str(base))
    command = ["merge-check", "--model", str(base), "--benchmark", "made", "--limit", "3"]
    command += ["--adapter", str(adapter), "--max-new-tokens", "6"]
    assert main([*command, "--json", "full.json"]) == 0
    assert main([*command, "--quantise", "4bit", "--json", "four.json"]) == 0
    full, four = (json.loads((in_tmp / f"{n}.json").read_text()) for n in ("full", "four"))
    assert full["largest"] < 1e-4 * full["scale"]
    assert 0.01 * four["scale"] < four["largest"] < four["scale"]
    told = "merged into the full base, unmerged beside the 4-bit one"
    assert told in " ".join(capsys.readouterr().out.split())
