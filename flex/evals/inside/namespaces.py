"""Name spaces, a file system of their own and the loss of privileges, by system calls.

Needs Linux 5.12 (mount_setattr). Every failure is an OSError that names its step: a sandbox that
was built by half is not used.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
from typing import Any

NOBODY = 65534
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER = 0x20000, 0x4000000, 0x8000000, 0x10000000
NEW_PID, NEW_NET = 0x20000000, 0x40000000
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
DETACH = 2
MOUNT_SETATTR, PIVOT_ROOT = 442, 155  # the latter by machine, see _pivot_root
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PDEATHSIG, DUMPABLE, CAPBSET_DROP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 24, 36, 38
DEVICES = ("null", "zero", "full", "random", "urandom")
PASSWD = f"root:x:0:0::/:/bin/sh\nnobody:x:{NOBODY}:{NOBODY}::/tmp:/bin/sh\n"

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: Any) -> None:
    """A function of the C library that gives 0 or sets errno."""
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{args}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), 0)


def die_with_parent() -> None:
    prctl(PDEATHSIG, signal.SIGKILL)


def separate() -> None:
    """Put the children of this process into name spaces of their own.

    As root: without a user name space, so that what only root can reach can be shown to the program
    read-only. Else, or where root may not, in a user name space.
    """
    rest = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    if os.geteuid() == 0:
        try:
            return call("unshare", rest)
        except PermissionError:
            pass
    own_user(rest)


def own_user(rest: int = 0) -> None:
    """A user name space in which we are `nobody`, with the name spaces in `rest`."""
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", NEW_USER | rest)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")


def build_root(spec: dict[str, Any]) -> None:
    """A root of our own: `spec["readable"]` read-only, a /tmp of limited size, nothing else."""
    _mount("none", "/", "", REC | PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old", 0o700)
    _pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    for path, target in spec["links"].items():
        os.symlink(target, path)
    for path in spec["readable"]:
        _show(path)
    os.makedirs("/etc", exist_ok=True)
    _write("/etc/passwd", PASSWD)
    _write("/etc/group", f"root:x:0:\nnogroup:x:{NOBODY}:\n")
    os.makedirs("/dev", exist_ok=True)
    for name in DEVICES:
        _write(f"/dev/{name}", "")
        _mount(f"/old/dev/{name}", f"/dev/{name}", "", BIND)
    for path, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1")):
        os.symlink(target, f"/dev/{path}")
    os.symlink("fd/2", "/dev/stderr")
    os.symlink("/tmp", "/dev/shm")
    os.mkdir("/tmp")
    size = f"size={spec['tmp_bytes']},nr_inodes={spec['tmp_files']},mode=1777"
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, size)
    os.mkdir("/proc")
    _mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    _set_attributes("/", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0)


def drop_privileges(processes: int) -> None:
    """Become `nobody` without capabilities, for good, with at most `processes` of its kind."""
    for capability in range(64):
        with contextlib.suppress(OSError):  # past the last one, or not ours to drop
            prctl(CAPBSET_DROP, capability)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        prctl(DUMPABLE, 1)  # else /proc/self is root's
        with contextlib.suppress(OSError):
            own_user()  # a count of processes of its own; not all systems allow it
    prctl(DUMPABLE, 1)
    with contextlib.suppress(OSError):
        _write("/proc/sys/user/max_user_namespaces", "0")  # of the user name space that we are in
    header = struct.pack("Ii", 0x20080522, 0)
    call("capset", header, struct.pack("6I", 0, 0, 0, 0, 0, 0))
    prctl(NO_NEW_PRIVS, 1)
    limit(resource.RLIMIT_NPROC, processes)


def limit(which: int, value: int) -> None:
    """Set a limit, or keep a lower one that is there."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _show(path: str) -> None:
    source = f"/old{path}"
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.exists(path):
            _write(path, "")
    _mount(source, path, "", BIND | REC)
    _set_attributes(path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, AT_RECURSIVE)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = [text.encode() for text in (source, target, kind, data)]
    call("mount", texts[0], texts[1], texts[2] or None, ctypes.c_ulong(flags), texts[3] or None)


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    wanted = struct.pack("4Q", attributes, 0, 0, 0)
    size = ctypes.c_size_t(len(wanted))
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, wanted, size)


def _pivot_root(new: str, old: str) -> None:
    number = {"x86_64": PIVOT_ROOT, "aarch64": 41, "ppc64le": 203}[os.uname().machine]
    call("syscall", number, new.encode(), old.encode())


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
