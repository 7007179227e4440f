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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
    """How programs of a language are judged.

    Attributes:
        tools: what must be installed; the first one says its version when called with `probe`.
        name: file of the program.
        run, compile: stages; a command without a slash is a tool.
        files: further files beside the program.
        trial: a program that passes wherever the tools work.
        java: compiled by java_compiler.py in place of a stage.
    """

    tools: tuple[str, ...]
    probe: tuple[str, ...]
    name: str
    run: Stage
    compile: tuple[Stage, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    trial: str = ""
    java: bool = False


@dataclass(frozen=True)
class Toolchain:
    """Where the tools are, what a sandbox must show for them, their version line; or what is `missing`."""

    tools: Mapping[str, str] = field(default_factory=dict)
    readable: tuple[str, ...] = ()
    version: str | None = None
    missing: str = ""

    def locate(self, stage: Stage) -> Stage:
        """The stage with the path of its tool."""
        if not stage.argv:
            return stage
        return replace(stage, argv=(self.tools.get(stage.argv[0], stage.argv[0]), *stage.argv[1:]))


def _limits(argv: tuple[str, ...], seconds: float, memory: int) -> Stage:
    return Stage(argv, "", seconds, memory, env=PATH)


def _compile(*argv: str) -> Stage:
    return Stage(argv, "", COMPILE_SECONDS, resident=3 << 30, processes=128, env=PATH)


def table(memory: int) -> dict[str, Language]:
    """The languages; `memory` limits each run, in bytes."""
    java = (
        *("java", "-ea", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto"),
        *(f"-Xmx{memory >> 21}m", "-cp", f"/tmp/work:{TUPLES}", "FlexLauncher", "{main_class}"),
    )
    return {
        "py": Language((), (), "program.py", replace(Stage(memory=memory), path="program.py")),
        "java": Language(
            ("java", "javac"), ("-version",), "",
            Stage(java, "", 15.0, 0, resident=memory, processes=96, env=PATH), java=True,
            trial="class Problem { public static void main(String[] a) { } }",
        ),
        "js": Language(
            ("node",), ("--version",), "program.js",
            Stage(("node", "launcher.js"), "", 10.0, 0, resident=memory, env=PATH),
            files={"launcher.js": LAUNCHER_JS},
        ),
        "cpp": Language(
            ("g++", "gcc"), ("--version",), "program.cpp", _limits(("./program",), 15.0, memory),
            (_compile("gcc", "-c", "harness.c"),
             _compile("g++", "-std=c++17", "program.cpp", "harness.o", "-Wl,--wrap=main", "-o", "program")),
            {"harness.c": HARNESS_C}, "int main() { return 0; }",
        ),
        "rs": Language(
            ("rustc", "gcc"), ("--version",), "program.rs", _limits(("./program",), 10.0, memory),
            (_compile("gcc", "-c", "harness.c"),
             _compile("rustc", "program.rs", "-C", "link-arg=harness.o", "-C", "link-arg=-Wl,--wrap=main",
                      "-o", "program")),
            {"harness.c": HARNESS_C}, "fn main() { }",
        ),
        "sh": Language(("bash",), ("--version",), "program.sh",
                       _limits(("bash", "launcher.sh"), 15.0, memory),
                       files={"launcher.sh": LAUNCHER_SH}),
        "pl": Language(("perl",), ("-MTest::Deep", "-e", "print $^V"), "program.pl",
                       _limits(("perl", "launcher.pl"), 15.0, memory),
                       files={"launcher.pl": LAUNCHER_PL}),
    }  # fmt: skip


def toolchain(language: Language) -> Toolchain:
    """Find the tools of a language; what is missing is said, never guessed."""
    if not language.tools:
        return Toolchain(version=f"Python {platform.python_version()}")
    tools, readable = {}, []
    for name in language.tools:
        path = _rustc() if name == "rustc" else shutil.which(name)
        if path is None:
            return Toolchain(missing=f"{name} is not installed")
        tools[name] = os.path.realpath(path)
        folder = os.path.dirname(os.path.dirname(tools[name]))
        if folder in ("/", os.path.expanduser("~")):
            why = f"{tools[name]}: programs would see all of {folder}"
            return Toolchain(missing=f"{why}; install {name} in a folder of its own")
        if not folder.startswith("/usr"):
            readable.append(folder)
    command = [tools[language.tools[0]], *language.probe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return Toolchain(missing=f"{' '.join(command)} fails: {done.stderr.strip()[:200]}")
    line = (done.stdout or done.stderr).splitlines()[0]
    return Toolchain(tools, tuple(readable), line)


def _rustc() -> str | None:
    """rustc itself, not rustup's proxy, which needs a home folder."""
    found = sorted(glob.glob(os.path.expanduser("~/.rustup/toolchains/*/bin/rustc")))
    return found[-1] if found else shutil.which("rustc")


def main_class(program: Program) -> str:
    return program.main_class or "Problem"
