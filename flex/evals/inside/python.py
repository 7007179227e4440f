"""Runs a Python program to the end of its source and says so.

The proof of the end is a token that lies unread in standard input until the program begins. While the
program runs, it is held by the evaluation stack of one expression, never by a name, a constant or
an object that frames and the garbage collector lead to. A program that reads its own memory (ctypes,
/proc/self/mem), or sets a trace function and jumps over its tests, can still forge a pass: nothing
within one process can exclude that.
"""

import builtins
import os
import sys
import types
from typing import NoReturn

END = 3  # the descriptor of the end channel


def run_python(path: str) -> NoReturn:
    """Run the file as `__main__`, then leave the process: 0 after the last statement, else 1."""
    with open(path, "rb") as file:
        source = file.read()
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __file__=path)
    for name in ("stages", "namespaces", "python"):  # the program imports its own of these names
        sys.modules.pop(name, None)
    sys.modules["__main__"] = module
    sys.argv, sys.path[0] = [path], os.path.dirname(path)
    status = 1
    try:
        code = compile(source, path, "exec", dont_inherit=True)
        _run(code, module.__dict__)
        status = 0
    except SyntaxError as error:
        # a SyntaxError of the source itself has no traceback into the program
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            os.write(END, b"compile")
        sys.__excepthook__(type(error), error, error.__traceback__)
    except ValueError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            os.write(END, b"compile")  # a NUL in the source
        sys.__excepthook__(type(error), error, error.__traceback__)
    except SystemExit as error:
        print(f"SystemExit: {error.code} before the end of the program", file=sys.__stderr__)
    except AssertionError as error:
        os.write(END, b"wrong")
        sys.__excepthook__(type(error), error, error.__traceback__)
    except BaseException as error:
        sys.__excepthook__(type(error), error, error.__traceback__)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _run(code: types.CodeType, scope: dict[str, object]) -> None:
    # From left to right: the write, the token and the run; the first two wait on the stack meanwhile.
    os.write(END, _token() + (exec(code, scope) or b""))  # type: ignore[func-returns-value]


def _token() -> bytes:
    token = os.read(0, 64)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return token
