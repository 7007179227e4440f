"""The command line: exit codes, errors in three parts, what `config show` and `doctor` print."""

import subprocess
import sys
import types

import pytest

from flex import commands
from flex.config import RunConfig
from flex.errors import DataError
from flex.options import OPTIONS


@pytest.fixture
def fake(monkeypatch):
    """Put a module in place of one that a command imports when it runs."""

    def put(name: str, **members) -> None:
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.fixture
def config_file(tmp_path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 7\n")
    return str(file)


def test_config_show_prints_every_option_with_its_origin(capsys, config_file):
    assert commands.main(["config", "show", "--config", config_file, "optim.lr=1e-4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(OPTIONS)
    assert "seed = 7  [file]  of the data order" in "\n".join(lines)
    assert "optim.lr = 0.0001  [override]" in "\n".join(lines)
    assert "lora.targets = [gate_proj, up_proj, down_proj]  [default]" in "\n".join(lines)


def test_a_user_error_has_three_parts_on_stderr_and_exit_code_2(capsys):
    assert commands.main(["config", "show", "lr=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    what, why, fix = err.splitlines()
    assert what == "error: there is no option `lr` (on the command line)"
    assert why.startswith("  why: ") and fix.startswith("  fix: did you mean `optim.lr`?")


def test_brackets_in_a_message_are_not_taken_for_styles(capsys):
    commands.show_error(DataError("row [bold]x[/bold] is [lora]", "because [/]", "type [a]"))
    assert "row [bold]x[/bold] is [lora]" in capsys.readouterr().err


def test_train_passes_the_configuration_and_returns_the_exit_code(fake, config_file):
    seen = []
    fake("flex.train", start=lambda *given: seen.append(given) or 3)
    # overrides may stand before and after --config
    assert commands.main(["train", "lora.r=4", "--config", config_file, "optim.lr=3e-4"]) == 3
    ((config, dry_run, world),) = seen
    assert (dry_run, world) == (False, None)
    assert isinstance(config, RunConfig)
    assert (config.seed, config.lora.r, config.optim.lr) == (7, 4, 3e-4)


def test_a_dry_run_is_told_the_number_of_processes(fake, config_file):
    seen = []
    fake("flex.train", start=lambda *given: seen.append(given[1:]) or 0)
    command = ["train", "--dry-run", "--config", config_file, "--world", "8", "lora.r=4"]
    assert commands.main(command) == 0
    assert seen == [(True, 8)]


def test_a_flex_error_of_a_run_is_told_and_other_errors_keep_their_traceback(
    fake, capsys, config_file
):
    def fail(error):
        def start(*given):
            raise error

        return start

    fake("flex.train", start=fail(DataError("row 3 is empty", "no token bears loss", "drop it")))
    assert commands.main(["train", "--config", config_file]) == 2
    assert capsys.readouterr().err == (
        "error: row 3 is empty\n  why: no token bears loss\n  fix: drop it\n"
    )
    fake("flex.train", start=fail(KeyboardInterrupt()))
    assert commands.main(["train", "--config", config_file]) == 130
    fake("flex.train", start=fail(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        commands.main(["train", "--config", config_file])


def test_merge_data_show_and_demo_call_their_functions(fake, config_file):
    calls = []
    fake("flex.model.export", merge=lambda *args, **kw: calls.append((args, kw)))
    fake("flex.data.show", show=lambda config, n: calls.append((config.seed, n)))
    fake("flex.demo", main=lambda: calls.append("demo") or 0)
    assert commands.main(["merge", "--adapter", "a", "--out", "b"]) == 0
    assert commands.main(["merge", "--adapter", "a", "--out", "b", "--base", "c"]) == 0
    assert commands.main(["data", "show", "--config", config_file, "--n", "5", "seed=2"]) == 0
    assert commands.main(["demo"]) == 0
    assert calls == [(("a", "b"), {"base": None}), (("a", "b"), {"base": "c"}), (2, 5), "demo"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["config"],
        ["doctor", "seed=1"],
        ["config", "show", "--confg", "x"],
        ["merge", "--adapter", "a"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_doctor_reports_versions_and_device(capsys):
    assert commands.main(["doctor"]) == 0
    lines = {line[:16].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}
    import torch

    assert lines["torch"] == torch.__version__
    assert {"flex", "python", "deepspeed", "javac", "processors"} <= lines.keys()
    assert ("cuda:0" in lines) == torch.cuda.is_available()


def test_the_module_runs_and_does_not_load_torch(in_tmp, repository):
    code = (
        "import sys; sys.argv = ['flex', 'config', 'show']\n"
        "from flex.commands import main\n"
        "assert main() == 0 and 'torch' not in sys.modules"
    )
    for arguments in (["-c", code], ["-m", "flex", "config", "show"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            env={"PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "train.batch_size = 16" in done.stdout
