"""Programs that attack: all are contained, none passes, none survives."""

import threading
import time
from pathlib import Path

import pytest

from flex.errors import DataError
from flex.evals.execute import Runner
from flex.evals.journal import Outcome
from flex.evals.sandbox import LEVELS, Sandbox
from flex.evals.tasks import Program

MARK = "flex-hostile-survivor"
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "8 GB": "x = bytearray(8 << 30)",
    "endless loop": "while True: pass",
    "endless output": "while True: print('x' * 10000)",
    "closed stdout": "import os\nos.close(1); os.close(2); os.close(3)\nassert False",
    "network": "import socket\nsocket.create_connection(('1.1.1.1', 53), 1)",
    "home": "import os\nos.listdir('/root')\nassert os.listdir('/home')",
    "environment": "import os\nassert 'FLEX_SECRET' in os.environ",
    "every environment": "import glob, os\nseen = b''\nfor path in glob.glob('/proc/[0-9]*/environ'):\n"
    "    try: seen += open(path, 'rb').read()\n    except OSError: pass\nassert b'FLEX_SECRET' in seen",
    "parent's files": f"assert open({__file__!r}).read()",
    "write outside": "open('/usr/flex', 'w')",
    "kill the supervisor": "import os\nos.kill(1, 9)\nos.kill(os.getppid(), 9)\nassert False",
    "kill all": "import os\nos.kill(-1, 9)\nassert False",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    f"        os.execv('/usr/bin/python3', ['{MARK}', '-c', 'import time; time.sleep(99)'])\n"
    "time.sleep(0.5)\nassert False",
    "SIGTERM": "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nwhile True: time.sleep(9)",
    "exit 0": "import os\nos._exit(0)\nassert False",
    "SystemExit": "raise SystemExit(0)",
    "forged text": "import os\nfor n in range(1, 9):\n    try: os.write(n, b'passed 0' * 8)\n"
    "    except OSError: pass\nos._exit(0)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()",
    "files": "for n in range(100000): open(f'/tmp/{n}', 'w').close()",
    "symlink": "import os\nos.symlink('/etc/shadow', '/tmp/s')\nopen('/tmp/s').read()",
    "huge integer": "x = 9 ** 9 ** 9",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    "AssertionError": "import builtins\nbuiltins.AssertionError = int\nassert False",
    "excepthook": "import os, sys\nsys.excepthook = sys.__excepthook__ = lambda *a: os._exit(0)\nassert 0",
    "thread": "import os, threading\nthreading.Thread(target=lambda: os._exit(0)).start()\n"
    "while True: pass",
    "token in stdin": "import os\nos.write(3, os.read(0, 64))\nos._exit(0)",
    "frames": "import gc, os, sys\nframe, found = sys._getframe(), []\nwhile frame:\n"
    "    found += [*frame.f_locals.values(), *frame.f_code.co_consts, *gc.get_referents(frame)]\n"
    "    frame = frame.f_back\nfound += gc.get_objects()\nfor thing in found:\n"
    "    if type(thing) is bytes and len(thing) == 32: os.write(3, thing)\nos._exit(0)",
}


@pytest.fixture(scope="module", params=LEVELS)
def runner(request):
    try:
        Sandbox(level=request.param)
    except DataError as error:
        pytest.skip(str(error.what))
    with Runner("py", seconds=1, memory_bytes=256 << 20) as made:
        made._sandbox = Sandbox(level=request.param)
        yield made


@pytest.mark.parametrize("name", HOSTILE)
def test_contained(runner, name, monkeypatch):
    monkeypatch.setenv("FLEX_SECRET", "x")
    begin = time.monotonic()
    outcome = runner.run(Program("py", HOSTILE[name]))
    assert outcome.kind in ("exception", "wrong", "timeout", "limit"), outcome
    assert time.monotonic() - begin < 1 + 2


def alive() -> bool:
    """Whether the daemon runs: its mark is its argv[0], and we see the sandbox's processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(MARK.encode()):
                return True
        except OSError:
            continue
    return False


def test_none_survives(runner):
    outcome: list[Outcome] = []
    run = threading.Thread(
        target=lambda: outcome.append(runner.run(Program("py", HOSTILE["daemon"])))
    )
    run.start()
    seen = False
    while run.is_alive():
        seen = seen or alive()
        time.sleep(0.02)
    assert outcome[0].kind == "wrong"
    assert seen and not alive()


@pytest.mark.parametrize(
    "body",
    [
        "System.exit(0);",
        "Runtime.getRuntime().halt(0);",
        "for (var f : Class.forName(\"FlexLauncher\").getDeclaredFields()) { f.setAccessible(true); "
        "System.err.println(f.get(null)); } System.exit(0);",
    ],
)  # fmt: skip
def test_java_that_leaves_early_does_not_pass(body):
    source = (
        "class Problem { public static void main(String[] a) throws Exception { " + body + " } }"
    )
    try:
        runner = Runner("java", seconds=5)
    except DataError as error:
        pytest.skip(str(error.what))
    if runner.toolchain is None:
        pytest.skip("no javac")
    assert runner.run(Program("java", source)).kind == "exception"
