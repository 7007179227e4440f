"""The program that judges an APPS completion, as text: it runs in the sandbox, never here.

In the manner of the authors' test script, with its known false verdicts removed: integers must be
equal (they compared them as floats, within 1e-5), lines may not change their order, and standard
input and output are files, so that fast input by os.read and open(0) works.
"""

from __future__ import annotations

CASE_SECONDS = 4  # the authors'

_HARNESS = r'''
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time

sys.set_int_max_str_digits(0)
CASES = json.loads(TESTS)
# What the authors' script imports for every solution, but for numpy.
PRELUDE = """
import sys, time, itertools, collections, math, fractions, random, heapq
from itertools import accumulate, product, permutations, combinations
from collections import Counter, OrderedDict, deque, defaultdict, ChainMap
from functools import lru_cache
from math import sqrt, sin, cos, tan, ceil, fabs, floor, gcd, exp, log, log2
from typing import List, Tuple
from heapq import *
"""
CODE = compile(SOLUTION, "<solution>", "exec")


class Late(BaseException):
    """No Exception: a solution that catches those does not catch this."""


def run(name):
    """Run the solution as a module of this name; its names."""
    names = {"__name__": name}
    exec(PRELUDE, names)
    exec(CODE, names)
    return names


def printed(text):
    """What the solution prints for this input."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as taken:
        given.write(text.encode())
        given.seek(0)
        sys.stdout.flush()
        files, streams = (os.dup(0), os.dup(1)), (sys.stdin, sys.stdout)
        os.dup2(given.fileno(), 0)
        os.dup2(taken.fileno(), 1)
        stdin, stdout = open(0, closefd=False), open(1, "w", closefd=False)
        sys.stdin, sys.stdout = stdin, stdout
        try:
            try:
                run("__main__")
            except SystemExit:
                pass
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            sys.stdout.flush()
        finally:
            sys.stdin, sys.stdout = streams
            try:
                stdout.flush()
            finally:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                    os.close(file)
        taken.seek(0)
        return taken.read().decode(errors="replace")


def same_text(found, wanted):
    found, wanted = found.split(), wanted.split()
    return len(found) == len(wanted) and all(map(same_token, found, wanted))


def same_token(found, wanted):
    if found == wanted:
        return True
    number = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
    if wanted.lstrip("+-").isdigit() or not re.fullmatch(number, wanted):
        return False
    if not re.fullmatch(number, found):
        return False
    return math.isclose(float(found), float(wanted), rel_tol=1e-5, abs_tol=1e-8)


def same_value(found, wanted):
    """JSON knows no tuples, and keys of objects are strings: both sides are compared as JSON."""
    try:
        found = json.loads(json.dumps(found))
    except (TypeError, ValueError):
        return False
    return found == wanted or (isinstance(wanted, list) and wanted[:1] == [found])


def with_int_keys(value):
    """The authors' repair of dictionaries, whose integer keys JSON wrote as strings."""
    if isinstance(value, dict) and all(re.fullmatch(r"-?\d+", key) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def text_of(value):
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def solved(given, wanted, state):
    if not CASES.get("fn_name"):
        return same_text(printed(text_of(given)), text_of(wanted))
    if not state:
        names = run("solution")
        owner = names["Solution"]() if isinstance(names.get("Solution"), type) else None
        name = CASES["fn_name"]
        state.append(getattr(owner, name) if owner is not None else names[name])
    return same_value(state[0](*map(with_int_keys, given)), wanted)


def check():
    def late(*_):
        raise Late(f"case {number}: more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    state = []
    for number, (given, wanted) in enumerate(zip(CASES["inputs"], CASES["outputs"])):
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
        try:
            right = solved(given, wanted, state)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() - start > SECONDS:  # it caught the signal
            late()
        assert right, f"case {number}: wrong output"


check()
'''


def tests_source(input_output: str) -> str:
    """What follows `SOLUTION = '...'`.

    Args:
        input_output: JSON of `inputs`, `outputs` and, for calls, `fn_name`.
    """
    return f"\nTESTS = {input_output!r}\nSECONDS = {CASE_SECONDS}\n{_HARNESS}"
