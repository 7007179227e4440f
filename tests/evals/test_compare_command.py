"""`python -m flex compare` as it is typed: what it prints, writes and refuses."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from flex.errors import ConfigError, DataError
from flex.evals.tables import compare_command, print_report
from tests.evals.made_reports import changed, judged, made, paired, runs, saved


def test_the_command(tmp_path, capsys):
    first, second = paired(44, 15, 29, 70)
    a, b = saved(tmp_path, "a", first.report), saved(tmp_path, "b", second.report)
    out = tmp_path / "c.json"
    assert compare_command([a, b], json_out=str(out)) == 0
    text = capsys.readouterr().out
    for part in (
        *(
            "humaneval, 158 tasks, 1 sample each, pass@1",
            "8.9 [+0.6, +17.1]",
            "gained 29 tasks: T/59",
        ),
        *("and 14 more (--json has all)", "A difference was shown", "44 of 158 completions differ"),
        *('differs: model.adapter: "a" / "b"', "a.json", "37.3 [30.2, 45.1]"),
    ):
        assert part in text, part
    written = json.loads(out.read_text())
    assert written["format"] == "flex-compare-1"
    (entry,) = written["comparisons"]
    assert (entry["shown"], len(entry["gained"]), entry["words"]) == (
        True,
        29,
        text.splitlines()[-1],
    )
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_the_command_over_benchmarks(tmp_path, capsys):
    files = {}
    for name in ("humaneval", "mbpp"):
        for side, report in zip("ab", paired(10, 0, 9, 20), strict=True):
            named = changed(report.report, "benchmark", name=name)
            files[name, side] = saved(tmp_path, f"{name}-{side}", named)
    pairs = [[files[name, "a"], files[name, "b"]] for name in ("humaneval", "mbpp")]
    assert compare_command(pairs=pairs) == 0
    text = capsys.readouterr().out
    assert text.count("A difference was shown") == 2
    assert text.count("after Holm's correction for 2 comparisons") == 2
    with pytest.raises(DataError, match=r"benchmark\.name"):
        compare_command([files["humaneval", "a"], files["mbpp", "a"]])


def test_the_command_over_groups(tmp_path, capsys):
    groups = []
    for name, systems in (runs("base", [10, 12, 11, 13]), runs("flex", [20, 24, 22, 26])):
        paths = [saved(tmp_path, f"{name}{i}", s.report) for i, s in enumerate(systems)]
        groups.append([name, *paths])
    out = tmp_path / "g.json"
    assert compare_command(groups=groups, json_out=str(out)) == 0
    text = capsys.readouterr().out
    assert "difference +23.0 [" in text
    assert "20.0 24.0 22.0 26.0" in text
    assert json.loads(out.read_text())["comparisons"][0]["first"]["name"] == "base"
    for bad, words_ in (
        (groups[:1], "one --group"),
        ([groups[0][1:], groups[1]], "a file in place of the name"),
        ([groups[0], ["base", *groups[1][1:]]], "--group names: base, base"),
        ([groups[0], ["flex", *groups[0][1:]]], "is the same file as"),
    ):
        with pytest.raises(ConfigError, match=words_):
            compare_command(groups=bad)
    with pytest.raises(DataError, match="'flex' has 0 result"):
        compare_command(groups=[groups[0], ["flex"]])


def test_the_command_refuses(tmp_path):
    a = saved(tmp_path, "a", made([1, 0]))
    (tmp_path / "link.json").symlink_to(a)
    for arguments, words_ in (
        ({}, "three forms"),
        ({"paths": [a], "pairs": [[a, a]]}, "three forms"),
        ({"paths": [a]}, "one file"),
        ({"paths": [a, str(tmp_path / "link.json")]}, "is the same file as"),
        ({"pairs": [[a]]}, "--pair takes two files"),
    ):
        with pytest.raises(ConfigError, match=words_):
            compare_command(**arguments)
    b = saved(tmp_path, "b", made([1, 1]))
    with pytest.raises(DataError, match="cannot be written"):
        compare_command([a, b], json_out=str(tmp_path / "none" / "c.json"))


def test_one_report(capsys):
    report = judged(replace(made([3, 0, 12], 12), unsolvable=("T/1",)), 1, "compile")
    print_report(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["humaneval,", "3", "tasks,", "12", "samples", "each"]
    shown = {" ".join(line[:-1]): line[-1] for line in lines[1:-1]}
    assert shown["compile, %"] == "97.2"
    assert (shown["passed"], shown["wrong"], shown["compile"]) == ("15", "20", "1")
    assert [line[1] for line in lines if line[:1] == ["pass@1,"]] == ["%"]
    assert ["pass@10", "of", "solvable", "tasks,", "%"] in [line[:5] for line in lines]
    assert lines[-1][:6] == ["2", "of", "3", "tasks", "can", "be"]
    print_report(judged(made([1, 0]), 0, "missing"))
    text = capsys.readouterr().out
    assert "no score: samples were not run" in text
    assert "pass@" not in text


def test_markup_in_names_is_text(tmp_path, capsys):
    first, second = made([1, 0]), made([0, 1])
    odd = [
        replace(
            r, tasks=tuple(replace(t, task_id=f"[red]{t.task_id}[/red]:smile:") for t in r.tasks)
        )
        for r in (first, second)
    ]
    compare_command([saved(tmp_path, "[bold]a", odd[0]), saved(tmp_path, "b", odd[1])])
    text = capsys.readouterr().out
    assert "[red]T/0[/red]:smile:" in text
    assert "[bold]a" in text


def test_comparing_needs_no_torch(tmp_path):
    a, b = saved(tmp_path, "a", made([1, 0])), saved(tmp_path, "b", made([1, 1]))
    code = """
import sys
from flex.evals.tables import compare_command
compare_command(sys.argv[1:])
print(sorted({"torch", "transformers", "scipy"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code, a, b], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
