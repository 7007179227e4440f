"""C sources of this package, compiled on first use by the system's compiler and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
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
# A new thread costs 50 to 100 us, torch's 5 to 30: as much as some 100,000 elements take.
ELEMENTS_PER_THREAD = 250_000


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


def compile_with_dots(
    name: str, source: str, arguments: Mapping[str, Sequence[type]], what: str
) -> ctypes.CDLL | None:
    """`compile_or_warn` of a source in explicit vectors that needs bf16 dot products, and says by `supported` whether
    its compiler knew them; None also where the processor or the compiler has none."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    flags = ("-O2", "-mprefer-vector-width=512")
    known = {**arguments, "supported": ()}
    found = compile_or_warn(name, source, known, what, "PyTorch's products", flags)
    if found is None:
        return None
    found.supported.restype = INT
    return found if found.supported() else None


def in_shares(work: Callable[[int, int], None], total: int, elements: int) -> None:
    """work(begin, end) over [0, total), in equal shares for torch's number of threads.

    They are torch's own threads where its OpenMP runtime is GNU's: awake already, where threads of ours would run
    against them while they spin in wait for torch's next operation. Else new ones. Like torch's own operations, it
    hangs in a child that was forked after the first use.

    Args:
        elements: how many there are in all; a thread gets at least ELEMENTS_PER_THREAD.

    Raises: what `work` raises, once all shares have ended.
    """
    threads = torch.get_num_threads()
    shares = max(1, min(threads, total, elements // ELEMENTS_PER_THREAD))
    if shares == 1:
        work(0, total)
        return
    spans = [(total * i // shares, total * (i + 1) // shares) for i in range(shares)]
    left = set(range(shares))
    failures: list[BaseException] = []

    def attempt(index: int) -> None:
        try:
            left.discard(index)
            work(*spans[index])
        except BaseException as error:
            failures.append(error)

    openmp = _openmp()
    if openmp is None:
        _by_new_threads(attempt, shares)
    else:
        _by_team(openmp, attempt, shares, threads)
    if failures:
        raise failures[0]
    if left:  # ctypes drops what a signal's handler raises before a callback's first line
        raise KeyboardInterrupt


def _by_new_threads(attempt: Callable[[int], None], shares: int) -> None:
    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(1, shares)]
    for thread in threads:
        thread.start()
    attempt(0)
    for thread in threads:
        thread.join()


def _by_team(
    openmp: ctypes.CDLL, attempt: Callable[[int], None], shares: int, threads: int
) -> None:
    """In one parallel region of as many threads as torch's have, so that the team stays as it is."""

    def body(_: int | None) -> None:
        # a region within another one has a team of one
        for index in range(openmp.omp_get_thread_num(), shares, openmp.omp_get_num_threads()):
            attempt(index)

    openmp.GOMP_parallel(_REGION(body), None, threads, 0)


_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch runs on, by the names that GNU's has; None if it has others."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Names are searched in the library and in what it was linked to: never a second runtime.
        found = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        found.GOMP_parallel.argtypes = (_REGION, POINTER, ctypes.c_uint, ctypes.c_uint)
        found.GOMP_parallel.restype = None
        found.omp_get_thread_num, found.omp_get_num_threads  # noqa: B018
    except (OSError, AttributeError):
        return None
    return found if torch.backends.openmp.is_available() else None
