"""The strongest sandbox that this machine allows, tried before it is used.

    bwrap     bubblewrap makes the name spaces and the file system
    unshare   our own supervisor does (inside/), with the system calls behind unshare(1), mount(8), setpriv(1)
    none      limits only; chosen only by a user who asks for it

In the first two: no network, a read-only system without home folders and without this repository, a
/tmp of its own, an empty environment, user `nobody`, no capabilities, processes of its own that all
die at the end. `inside/` keeps the limits.
"""

from __future__ import annotations

import base64
import glob
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flex.errors import DataError

log = logging.getLogger("flex.evals")

INSIDE = Path(__file__).with_name("inside")
LEVELS = ("bwrap", "unshare")
NONE = "none (asked for)"
TMP_BYTES = 128 << 20
TMP_FILES = 8192
OUTPUT_BYTES = 8 << 20  # what a program may print; 64 KiB of it are kept
GRACE = 1.5  # seconds after a run's limits until the supervisor itself is ended
ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/java*", "/etc/perl", "/etc/localtime")
CAPABILITIES = ("SETUID", "SETGID", "SETPCAP", "CHOWN", "KILL")  # for the way down to nobody


@dataclass(frozen=True)
class Stage:
    """One process of a run: a command, or with `argv` empty the Python program `path`.

    Attributes:
        seconds: limit of its wall time.
        memory: limit of its address space in bytes; 0 is none (JVM and node reserve far more than they use).
        resident: limit in bytes of what all processes hold together.
        processes: how many there may be, threads included.
    """

    argv: tuple[str, ...] = ()
    path: str = ""
    seconds: float = 10.0
    memory: int = 0
    resident: int = 1 << 30
    processes: int = 64
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """How a run ended: the number of its last stage, its exit status (negative: a signal), its time,
    `why` it was ended ("", "timeout" or "limit: ..."), and whether it reached its `end`.

    `said` is what the end channel held instead of the token.
    """

    stage: int
    status: int
    seconds: float
    why: str
    ended: bool
    said: str
    err: str
    out: str


class Sandbox:
    """Runs stages in isolation.

    Args:
        allow_unsandboxed: run with limits only where nothing isolates.
        readable: further absolute paths that programs see read-only.
        level: use this one of LEVELS only; None is the strongest.

    Raises:
        DataError: nothing isolates here, and `allow_unsandboxed` is False.
    """

    def __init__(
        self,
        allow_unsandboxed: bool = False,
        readable: Sequence[str] = (),
        level: str | None = None,
    ) -> None:
        base = [sys.base_prefix] if not sys.base_prefix.startswith("/usr") else []
        top = [
            path for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64") if os.path.exists(path)
        ]
        etc = [path for pattern in ETC for path in sorted(glob.glob(pattern))]
        self.links = {path: os.readlink(path) for path in top if os.path.islink(path)}
        real = [path for path in top if path not in self.links]
        self.readable = list(dict.fromkeys(["/usr", *real, *etc, *base, *readable]))
        tried = []
        for self.level in (level,) if level else LEVELS:
            if problem := self._problem():
                tried.append(f"{self.level}: {problem}")
            else:
                return
        self.level = NONE
        if not allow_unsandboxed:
            raise DataError(
                f"no sandbox works here ({'; '.join(tried)})",
                "a model's programs may delete, read or send what they can reach",
                "install bubblewrap or allow user name spaces; or pass --allow-unsandboxed in a throw-away machine",
            )

    def run(self, files: Mapping[str, bytes], stages: Sequence[Stage]) -> Report:
        """Run the stages one after another, until one fails, in a folder with `files`.

        Thread-safe. A supervisor that gives no report is tried once more, then the run has failed.
        """
        report = self._run(files, stages)
        if report is None:  # what runs inside cannot do that: the machine was short of something
            log.warning("the sandbox gave no report; once more")
            report = self._run(files, stages)
        if report is None:
            log.warning("the sandbox gave no report again; the program counts as failed")
            return Report(-1, 1, 0.0, "", False, "", "the sandbox gave no report", "")
        return report

    def _run(self, files: Mapping[str, bytes], stages: Sequence[Stage]) -> Report | None:
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="flex-run-") as folder:
            work = folder if self.level == NONE else "/tmp/work"
            process = self._start(self._spec(files, stages, work))
            seconds = sum(stage.seconds for stage in stages) + GRACE
            late = False
            try:
                out, err = process.communicate(token.encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                out, err, late = b"", b"", True
            finally:
                process.kill()
                process.wait()
        try:
            report = json.loads(out)
        except ValueError:
            if late:
                return Report(-1, 1, seconds, "timeout", False, "", "", "")
            log.debug("the sandbox: %s", err[-2000:].decode("utf-8", "replace"))
            return None
        said = report.pop("end")
        return Report(ended=token in said, said=said.replace(token, ""), **report)

    def serve(
        self, files: Mapping[str, bytes], stage: Stage, folder: str
    ) -> subprocess.Popen[bytes]:
        """Start one stage that answers on its standard output what it is asked on its input.

        Of the limits, only those of one process are kept. `folder` is where it works without a sandbox.
        """
        work = folder if self.level == NONE else "/tmp/work"
        spec = {**self._spec(files, [stage], work), "server": True}
        return self._start(spec, subprocess.DEVNULL)

    def _spec(
        self, files: Mapping[str, bytes], stages: Sequence[Stage], work: str
    ) -> dict[str, Any]:
        return {
            "parent": os.getpid(),
            "build": self.level == "unshare",
            "contained": self.level == "bwrap",
            "drop": self.level != NONE,
            "server": False,
            "links": self.links,
            "readable": self.readable,
            "tmp_bytes": TMP_BYTES,
            "tmp_files": TMP_FILES,
            "output_bytes": OUTPUT_BYTES,
            "work": work,
            "files": {name: base64.b64encode(data).decode() for name, data in files.items()},
            "stages": [asdict(stage) for stage in stages],
        }

    def _start(
        self, spec: dict[str, Any], stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        inside = "/inside" if self.level == "bwrap" else str(INSIDE)
        python = [os.path.realpath(sys.executable), "-S", "-s", inside]
        process = subprocess.Popen(
            [*self._bwrap(), *python],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        data = json.dumps(spec).encode()
        assert process.stdin is not None
        try:
            process.stdin.write(len(data).to_bytes(8, "little") + data)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # communicate then gives its standard error
        return process

    def _bwrap(self) -> list[str]:
        if self.level != "bwrap":
            return []
        binds = [part for path in self.readable for part in ("--ro-bind", path, path)]
        above = {str(up) for path in self.readable for up in Path(path).parents} - {"/"}
        folders = [part for path in sorted(above) for part in ("--perms", "0755", "--dir", path)]
        links = [part for path, to in self.links.items() for part in ("--symlink", to, path)]
        if os.geteuid() == 0:
            user = [part for name in CAPABILITIES for part in ("--cap-add", f"CAP_{name}")]
            user = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", *user]
        else:
            user = ["--unshare-all", "--uid", "65534", "--gid", "65534"]
        return [
            *("bwrap", "--cap-drop", "ALL", *user, "--die-with-parent", "--new-session"),
            *("--as-pid-1", *folders, *binds, *links, "--ro-bind", str(INSIDE), "/inside"),
            *("--dev", "/dev", "--proc", "/proc", "--perms", "1777"),
            *(
                "--size",
                str(TMP_BYTES),
                "--tmpfs",
                "/tmp",
                "--remount-ro",
                "/dev",
                "--remount-ro",
                "/",
            ),
        ]

    def _problem(self) -> str:
        """Why this level does not work, or ''."""
        if self.level == "bwrap" and not shutil.which("bwrap"):
            return "not installed"
        try:
            report = self.run({}, [Stage(("/bin/true",))])
        except OSError as error:
            return str(error)
        return report.err.strip().replace("\n", " ")[-300:] if report.status else ""
