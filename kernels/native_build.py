"""C sources of this package, compiled on first use by the system's compiler and called through ctypes."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

log = logging.getLogger("flex.kernels")

# No -ffast-math: it would drop NaN. Traps and errno are what keeps the loop from being vectorised.
FLAGS = (
    *("-x", "c", "-std=c11", "-O3", "-march=native", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
COMPILERS = ("cc", "gcc", "clang")
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
ELEMENTS_PER_THREAD = 250_000  # a thread costs 50 us to start, as much as this many elements take


def compile_c(name: str, source: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of a C source.

    Args:
        name: of the files, which live as long as the call.
        flags: beside FLAGS.

    Raises: OSError: no compiler, or its complaint. subprocess.TimeoutExpired: after 120 s.
    """
    found = shlex.split(os.environ.get("CC", "")) or [c for c in COMPILERS if shutil.which(c)][:1]
    if not found:
        raise OSError(f"none of {', '.join(COMPILERS)} is on the PATH")
    with tempfile.TemporaryDirectory(prefix="flex-") as folder:
        path, library = Path(folder, f"{name}.c"), Path(folder, f"{name}.so")
        path.write_text(source)
        command = [*found, *FLAGS, *flags, str(path), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise OSError(done.stderr.strip() or f"{found[0]} ended with {done.returncode}")
        return ctypes.CDLL(str(library))


def compile_or_warn(
    name: str,
    source: str,
    arguments: Mapping[str, Sequence[type]],
    what: str,
    instead: str,
    flags: Sequence[str] = (),
) -> ctypes.CDLL | None:
    """`compile_c`; None, and one line in the log, if the source cannot be compiled or loaded.

    Args:
        arguments: by function, the types of its arguments; a function returns nothing unless its caller says so.
        what, instead: of the line: "`what` cannot be compiled; `instead` take its place, several times slower".
    """
    try:
        library = compile_c(name, source, flags)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning(
            "%s cannot be compiled (%s); %s take its place, several times slower. A C compiler on the PATH mends it",
            what,
            (str(error).strip() or type(error).__name__).splitlines()[0],
            instead,
        )
        return None
    for function, types in arguments.items():
        found = getattr(library, function)
        found.argtypes, found.restype = types, None
    return library


def in_shares(work: Callable[[int, int], None], total: int, elements: int) -> None:
    """work(begin, end) over [0, total), in equal shares for torch's number of threads.

    Not OpenMP: a second copy of its runtime beside torch's would spin against it.

    Args:
        elements: how many there are in all; a thread gets at least ELEMENTS_PER_THREAD.

    Raises: what `work` raises, once all shares have ended.
    """
    failures: list[BaseException] = []

    def attempt(begin: int, end: int) -> None:
        try:
            work(begin, end)
        except BaseException as error:
            failures.append(error)

    shares = max(1, min(torch.get_num_threads(), total, elements // ELEMENTS_PER_THREAD))
    spans = [(total * i // shares, total * (i + 1) // shares) for i in range(shares)]
    threads = [threading.Thread(target=attempt, args=span) for span in spans[1:]]
    for thread in threads:
        thread.start()
    attempt(*spans[0])
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
