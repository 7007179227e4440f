"""One warm Java compiler for all programs of an evaluation, in the sandbox (java/FlexCompiler.java).

javac takes a second to start and tens of milliseconds to compile: 158 programs are 16 s of one JVM, where
a javac each is a minute and a half of two cores.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from flex.errors import DataError
from flex.evals.sandbox import Sandbox, Stage

FOLDER = Path(__file__).with_name("java")
SECONDS = 30.0  # for one program; the first one also waits for the JVM
START_SECONDS = 60.0
DAYS = 1e6  # seconds of the JVM itself
MEMORY = 1 << 30


class JavaCompiler:
    """Compiles sources to class files; `compile` is thread-safe, one program at a time.

    Args:
        sandbox: where the JVM runs; it sees what the sandbox's programs see.
        java: path of the JDK's java.
        tuples: path of the javatuples jar; our own Pair takes its place where it is not installed.
        env: environment of the JVM.

    Attributes:
        classes: our own class files, which every program needs beside it.

    Raises:
        DataError: our own sources do not compile here: nothing could be judged.
    """

    def __init__(self, sandbox: Sandbox, java: str, tuples: str, env: Mapping[str, str]) -> None:
        self._sandbox, self._java, self._class_path, self._env = sandbox, java, tuples, env
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="flex-javac-")
        self._process: subprocess.Popen[bytes] | None = None
        pair = {} if os.path.exists(tuples) else {"Pair.java": _source("Pair.java")}
        self._own: dict[str, str] = {}
        launcher = {"FlexLauncher.java": _source("FlexLauncher.java")}
        classes, messages = self.compile(launcher | pair, START_SECONDS)
        if classes is None:
            self.close()
            raise DataError(
                f"the Java compiler does not work here: {messages.strip()[:300] or 'no answer'}",
                "every program would count as one that does not compile",
                "install a JDK of version 17 or newer, for example Debian's openjdk-17-jdk-headless",
            )
        self.classes: dict[str, bytes] = classes
        self._own = pair

    def compile(
        self, sources: Mapping[str, str], seconds: float = SECONDS
    ) -> tuple[dict[str, bytes] | None, str]:
        """Class files by name, or None, and the compiler's messages.

        A compiler that does not answer within `seconds` is ended and started anew: TimeoutError.
        """
        with self._lock:
            for _ in range(2):  # a compiler that was killed for reasons of its own is no verdict
                found = self._try(sources, seconds)
                if found is not None:
                    return found
        return None, "the compiler died twice"

    def _try(
        self, sources: Mapping[str, str], seconds: float
    ) -> tuple[dict[str, bytes] | None, str] | None:
        """What `compile` returns; None if the compiler died."""
        process = self._process or self._start()
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        found = None
        try:
            _ask(process, {**self._own, **sources})
            found = _answer(process)
        except (EOFError, BrokenPipeError):
            pass
        finally:
            timer.cancel()
            if found is None or late.is_set():
                self._stop()
        if found is None and late.is_set():
            raise TimeoutError(f"compiling took more than {seconds:g} s")
        return found

    def close(self) -> None:
        """End the JVM."""
        with self._lock:
            self._stop()
            self._folder.cleanup()

    def _start(self) -> subprocess.Popen[bytes]:
        argv = (
            *(self._java, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto"),
            *(f"-Xmx{MEMORY >> 21}m", "-Xss8m", "FlexCompiler.java", self._class_path),
        )
        stage = Stage(argv, "", DAYS, 0, resident=MEMORY, processes=96, env=self._env)
        files = {"FlexCompiler.java": _source("FlexCompiler.java").encode()}
        self._process = self._sandbox.serve(files, stage, self._folder.name)
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):  # what was not written yet
                    stream.close()


def _source(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def _ask(process: subprocess.Popen[bytes], sources: Mapping[str, str]) -> None:
    assert process.stdin is not None
    parts = [struct.pack(">i", len(sources))]
    for name, text in sources.items():
        for data in (name.encode(), text.encode()):
            parts += [struct.pack(">i", len(data)), data]
    process.stdin.write(b"".join(parts))
    process.stdin.flush()


def _answer(process: subprocess.Popen[bytes]) -> tuple[dict[str, bytes] | None, str]:
    messages = _text(process).decode("utf-8", "replace")
    count = _int(process)
    if count < 0:
        return None, messages
    classes = {}
    for _ in range(count):
        name = _text(process).decode()
        classes[name] = _text(process)
    return classes, messages


def _int(process: subprocess.Popen[bytes]) -> int:
    return int(struct.unpack(">i", _read(process, 4))[0])


def _text(process: subprocess.Popen[bytes]) -> bytes:
    return _read(process, _int(process))


def _read(process: subprocess.Popen[bytes], size: int) -> bytes:
    assert process.stdout is not None
    data = process.stdout.read(size)
    if len(data) != size:
        raise EOFError
    return data
