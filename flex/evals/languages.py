"""How a program of each language is compiled, run and known to have reached its end.

A launcher of ours reads a token from standard input, runs the program, and sends the token on
descriptor 3 after the program's last statement; with exit status 0 as well, the program passes. An
early exit does not pass. A program that reads its own memory can forge a pass; in bash, whose
variables are all visible, one that looks for the token can.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flex.evals.sandbox import Stage
from flex.evals.tasks import Program

COMPILE_SECONDS = 30.0
PATH = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
TUPLES = "/usr/share/java/javatuples.jar"

HARNESS_C = r"""
#include <unistd.h>
int __real_main(int, char **, char **);
int __wrap_main(int argc, char **argv, char **env) {
    char token[64];
    ssize_t size = read(0, token, sizeof token);
    int status = __real_main(argc, argv, env);
    if (status == 0 && size > 0 && write(3, token, size) != size) return 1;
    return status;
}
"""
LAUNCHER_JS = r"""
'use strict';
const { readFileSync, writeSync } = require('fs');
const token = readFileSync(0);
try {
    require('/tmp/work/program.js');
} catch (error) {
    if (error && error.code === 'ERR_ASSERTION') writeSync(3, 'wrong');
    if (error instanceof SyntaxError) writeSync(3, 'compile');
    throw error;
}
process.on('exit', (status) => { if (status === 0) writeSync(3, token); });
"""
LAUNCHER_PL = r"""
my $token = <STDIN>;
open(my $end, '>&=', 3) or die;
my $code = do { local $/; open(my $file, '<', '/tmp/work/program.pl') or die; <$file> };
do '/tmp/work/program.pl';
if ($@) { print STDERR $@; exit 255; }
syswrite($end, $token);
"""
LAUNCHER_SH = r"""
IFS= read -r -N 32 flex_token
exec </dev/null
. /tmp/work/program.sh || exit
builtin printf %s "$flex_token" >&3
"""


@dataclass(frozen=True)
class Language:
    """`probe` prints a version line; `stages(tool, main_class)` compile and run `files` and `name`."""

    tool: str
    probe: tuple[str, ...]
    name: str
    run: Stage
    compile: tuple[Stage, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    readable: Callable[[], tuple[str, ...]] = tuple


def _limits(argv: tuple[str, ...], seconds: float, memory: int, **more: int) -> Stage:
    return Stage(argv, "", seconds, memory, env=PATH, **more)


def _compile(*argv: str, memory: int = 0) -> Stage:
    return Stage(argv, "", COMPILE_SECONDS, memory, resident=3 << 30, processes=128, env=PATH)


def _rust() -> str:
    """rustc itself, not rustup's proxy, which needs a home folder."""
    found = sorted(glob.glob(os.path.expanduser("~/.rustup/toolchains/*/bin/rustc")))
    return found[-1] if found else "/usr/bin/rustc"


def table(memory: int) -> dict[str, Language]:
    """The languages; `memory` limits each run, in bytes."""
    java = (
        "/usr/bin/java", "-ea", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto",
        f"-Xmx{memory >> 21}m", "-cp", f"/tmp/work:{TUPLES}", "FlexLauncher", "{main_class}",
    )  # fmt: skip
    rustc = _rust()
    names = ["FlexLauncher.java", *([] if os.path.exists(TUPLES) else ["Pair.java"])]
    ours = {
        name: Path(__file__).with_name("java").joinpath(name).read_text("utf-8") for name in names
    }
    return {
        "py": Language("", (), "program.py", replace(Stage(memory=memory), path="program.py")),
        "java": Language(
            "javac",
            ("java", "-version"),
            "Problem.java",
            Stage(java, "", 15.0, 0, resident=memory, processes=96, env=PATH),
            (_compile("/usr/bin/javac", "-proc:none", "-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC",
                      "-encoding", "UTF8", "-cp", TUPLES, "-d", ".", "Problem.java",
                      *names),),
            ours,
        ),
        "js": Language(
            "node", ("node", "--version"), "program.js",
            Stage(("/usr/bin/node", "launcher.js"), "", 10.0, 0, resident=memory, env=PATH),
            files={"launcher.js": LAUNCHER_JS},
        ),
        "cpp": Language(
            "g++", ("g++", "--version"), "program.cpp", _limits(("./program",), 15.0, memory),
            (_compile("/usr/bin/gcc", "-c", "harness.c"),
             _compile("/usr/bin/g++", "-std=c++17", "program.cpp", "harness.o", "-Wl,--wrap=main", "-o", "program")),
            {"harness.c": HARNESS_C},
        ),
        "rs": Language(
            rustc, (rustc, "--version"), "program.rs", _limits(("./program",), 10.0, memory),
            (_compile("/usr/bin/gcc", "-c", "harness.c"),
             _compile(rustc, "program.rs", "-C", "link-arg=harness.o", "-C", "link-arg=-Wl,--wrap=main",
                      "-o", "program")),
            {"harness.c": HARNESS_C},
            lambda: (os.path.dirname(os.path.dirname(rustc)),) if "/.rustup/" in rustc else (),
        ),
        "sh": Language("bash", ("bash", "--version"), "program.sh",
                       _limits(("/usr/bin/bash", "launcher.sh"), 15.0, memory),
                       files={"launcher.sh": LAUNCHER_SH}),
        "pl": Language("perl", ("perl", "-MTest::Deep", "-e", "print $^V"), "program.pl",
                       _limits(("/usr/bin/perl", "launcher.pl"), 15.0, memory),
                       files={"launcher.pl": LAUNCHER_PL}),
    }  # fmt: skip


def version(language: Language) -> tuple[str | None, str]:
    """The first line that the tool chain says about itself, or None and what is missing."""
    if not language.tool:
        return f"Python {platform.python_version()}", ""
    if not shutil.which(language.tool):
        return None, f"{language.tool} is not installed"
    done = subprocess.run(language.probe, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return None, f"{' '.join(language.probe)} fails: {done.stderr.strip()[:200]}"
    return (done.stdout or done.stderr).splitlines()[0], ""


def main_class(program: Program) -> str:
    return program.main_class or "Problem"
