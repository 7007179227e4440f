"""The supervisor: starts the stages of a run, keeps their limits, reports how the last one ended.

Input, on descriptor 0: 8 bytes with the length of the spec, the spec as JSON, then the token. The
report is JSON on descriptor 1. For a server, 0 and 1 are handed to the one stage instead.
"""

import base64
import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

import namespaces
from python import END, run_python

TICK = 0.02  # seconds between looks at memory and files
KEEP = 65_536  # bytes of a stage's standard error that are kept, its last ones
PIPES = {"out": 1, "err": 2, "end": END}


def main() -> int:
    namespaces.die_with_parent()
    size = int.from_bytes(_read(0, 8), "little")
    spec = json.loads(_read(0, size))
    if os.getppid() not in (0, spec["parent"]) and not spec["contained"]:
        return 1  # it died before we could ask to die with it
    sys.dont_write_bytecode = True
    os.umask(0o022)
    if not spec["build"]:
        namespaces.prctl(namespaces.SUBREAPER, 1)
        return _supervise(spec)
    namespaces.separate()
    child = os.fork()
    if child == 0:
        try:
            namespaces.die_with_parent()
            namespaces.build_root(spec)
            os._exit(_supervise(spec))
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(0)
    os.close(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _supervise(spec: dict[str, Any]) -> int:
    namespaces.prctl(namespaces.DUMPABLE, 0)  # a stage of the same user cannot trace us
    work = spec["work"]
    os.makedirs(work, exist_ok=True)
    for name, text in spec["files"].items():
        path = os.path.join(work, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(text))
    if spec["drop"] and os.geteuid() == 0:
        os.chown(work, namespaces.NOBODY, namespaces.NOBODY)
    os.chdir(work)
    if spec["server"]:
        return _serve(spec)
    report: dict[str, Any] = {}
    for number, stage in enumerate(spec["stages"]):
        report = _run_stage(spec, stage, last=number == len(spec["stages"]) - 1)
        report["stage"] = number
        if report["why"] or report["status"] != 0:
            break
    _kill_rest(spec)
    os.write(1, json.dumps(report).encode())
    return 0


def _serve(spec: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        _become(spec, spec["stages"][0], {})
    os.close(0)
    os.close(1)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _run_stage(spec: dict[str, Any], stage: dict[str, Any], last: bool) -> dict[str, Any]:
    pipes = {name: os.pipe() for name in PIPES}
    feed, stdin = os.pipe()[::-1]
    if spec["drop"] and os.geteuid() == 0:  # /dev/stderr and the like are opened anew by name
        for descriptor in (stdin, *(pair[1] for pair in pipes.values())):
            os.fchown(descriptor, namespaces.NOBODY, namespaces.NOBODY)
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(spec, stage, {0: stdin, **{PIPES[name]: pair[1] for name, pair in pipes.items()}})
    os.close(stdin)
    readers = {}
    for name, (reader, writer) in pipes.items():
        os.close(writer)
        os.set_blocking(reader, False)
        readers[reader] = name
    if last:  # only now, so that no stage inherits it with our memory
        with contextlib.suppress(BrokenPipeError):
            os.write(feed, _read(0, 64))
    os.close(feed)
    report = _watch(spec, stage, child, readers, begin)
    for reader in readers:
        os.close(reader)
    return report


def _watch(
    spec: dict[str, Any], stage: dict[str, Any], child: int, readers: dict[int, str], begin: float
) -> dict[str, Any]:
    kept = dict.fromkeys(PIPES, b"")
    total, why, status = 0, "", None
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    for reader in readers:
        poll.register(reader, select.POLLIN)
    next_look = 0.0
    while status is None:
        for descriptor, _ in poll.poll(TICK * 1000):
            if descriptor == ended:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            else:
                total += _drain(descriptor, readers[descriptor], kept, poll)
        now = time.monotonic()
        if status is None and not why:
            if now - begin > stage["seconds"]:
                why = "timeout"
            elif total > spec["output_bytes"]:
                why = "limit: output"
            elif now > next_look:
                next_look = now + TICK
                why = _over(spec, stage, child)
            if why:
                _kill_stage(spec, child)
    seconds = time.monotonic() - begin
    for reader, name in readers.items():
        _drain(reader, name, kept, None)
    os.close(ended)
    return {
        "status": status,
        "seconds": seconds,
        "why": why,
        "end": kept["end"].decode("latin-1"),
        "err": kept["err"].decode("utf-8", "replace"),
        "out": kept["out"][-2048:].decode("utf-8", "replace"),
    }


def _drain(reader: int, name: str, kept: dict[str, bytes], poll: Any) -> int:
    try:
        data = os.read(reader, KEEP)
    except BlockingIOError:
        return 0
    if not data and poll is not None:
        poll.unregister(reader)
    kept[name] = (kept[name] + data)[-KEEP:]
    return len(data)


def _over(spec: dict[str, Any], stage: dict[str, Any], child: int) -> str:
    """Which limit all processes together are over, or ''."""
    used = sum(map(_resident, _others(spec)))
    if used > stage["resident"]:
        return "limit: memory"
    if not spec["drop"]:
        return ""
    disk = os.statvfs("/tmp")
    if disk.f_files - disk.f_ffree > spec["tmp_files"]:
        return "limit: files"
    return ""


def _others(spec: dict[str, Any]) -> list[int]:
    """All other processes of the sandbox; without name spaces those that descend from us."""
    if spec["drop"]:
        me = os.getpid()
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != me]
    found, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    todo += (children := [int(child) for child in file.read().split()])
                    found += children
    return found


def _resident(pid: int) -> int:
    """Bytes of memory of a process that no file stands for."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        lines = (line.split() for line in file)
        return 1024 * sum(int(line[1]) for line in lines if line[0] in (b"RssAnon:", b"RssShmem:"))
    return 0


def _kill_stage(spec: dict[str, Any], child: int) -> None:
    if spec["drop"] and os.getpid() == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return
    os.kill(child, signal.SIGKILL)
    _kill_rest(spec, child)


def _kill_rest(spec: dict[str, Any], child: int = 0) -> None:
    """End what a stage left behind; in a name space of its own the kernel does it when we end.

    `child`, already killed, is left for the watch to collect.
    """
    if spec["drop"]:
        return
    for _ in range(100):  # a fork bomb may need more than one sweep
        others = [pid for pid in _others(spec) if pid != child]
        if not others:
            return
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _become(spec: dict[str, Any], stage: dict[str, Any], descriptors: dict[int, int]) -> NoReturn:
    """In the child: take the descriptors, the limits and the environment, then run the stage."""
    try:
        os.setsid()
        if descriptors:
            held = {target: _high(source) for target, source in descriptors.items()}
            for target, source in held.items():
                os.dup2(source, target)
            os.closerange(END + 1, 256)
        os.environ.clear()
        os.environ.update(stage["env"])
        cores = 1 if stage["memory"] else 4  # a JVM's own threads count as well
        namespaces.limit(resource.RLIMIT_CPU, int(stage["seconds"] * cores) + 2)
        namespaces.limit(resource.RLIMIT_CORE, 0)
        namespaces.limit(resource.RLIMIT_NOFILE, 256)
        namespaces.limit(resource.RLIMIT_FSIZE, spec["tmp_bytes"])
        if spec["drop"]:
            namespaces.drop_privileges(stage["processes"])
        else:
            namespaces.prctl(namespaces.NO_NEW_PRIVS, 1)
        if stage["memory"]:
            namespaces.limit(resource.RLIMIT_AS, stage["memory"])
        if stage["argv"]:
            os.execv(stage["argv"][0], stage["argv"])
        namespaces.prctl(namespaces.DUMPABLE, 1)
        run_python(stage["path"])
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(127)


def _high(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64)


def _read(descriptor: int, size: int) -> bytes:
    parts, missing = [], size
    while missing and (part := os.read(descriptor, missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
