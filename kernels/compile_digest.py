"""A digest of all that a binary of the compile matrix depends on; made without compiling.

Equal digests and an equal release of Triton give equal binaries. So what was recorded of a binary
stands until its digest changes. Triton's own cache key serves worse: it holds line numbers, so a
line added above a kernel would change it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from . import compiled, disassembly
from .runtime import Shipped


def digest(config: Shipped, target: str) -> str:
    """16 hexadecimal digits over the sources, the constants and the options of one binary.

    Covered: the text of the Triton function and of every one that it reaches, the values of the
    globals that they read, the configuration, and the code that compiles and reads the binary. Not
    covered: Triton itself, whose release is recorded beside the digests.

    Raises:
        TypeError: a Triton function reads a global whose text is not the same in every process.
    """
    parts = {
        "name": config.name,
        "target": target,
        "signature": dict(config.signature),
        "constants": {name: _plain(name, value) for name, value in config.constants.items()},
        "options": [config.num_warps, config.num_stages, list(config.divisible)],
        "sources": sorted(set(_sources(config.fn, set()))),
        "reader": [inspect.getsource(part) for part in READER],
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


READER: tuple[Any, ...] = (
    compiled.compile_shipped,
    compiled._attributes,
    compiled._read_cubin,
    compiled._read_amdgcn,
    compiled._counts,
    compiled._run,
    disassembly,
)


def _sources(fn: Any, seen: set[str]) -> Iterator[str]:
    """Text of a Triton function, of those that it reaches, and "name = value" of its globals."""
    python: Callable[..., Any] = fn.fn
    place = f"{python.__module__}.{python.__qualname__}"
    if place in seen:
        return
    seen.add(place)
    source = textwrap.dedent(inspect.getsource(python))
    yield f"{place}\n{source}"
    for name, value in _globals(source, python.__globals__):
        if callable(getattr(value, "fn", None)):
            if not value.fn.__module__.startswith("triton."):
                yield from _sources(value, seen)
        elif not (inspect.ismodule(value) or inspect.isroutine(value) or isinstance(value, type)):
            yield f"{place}: {name} = {_plain(name, value)}"


def _globals(source: str, names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The globals that a source names, also as attributes of a module that it names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in names:
            yield node.id, names[node.id]
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and inspect.ismodule(module := names.get(node.value.id))
            and hasattr(module, node.attr)
            and not module.__name__.startswith(("triton", "torch"))
        ):
            yield f"{node.value.id}.{node.attr}", getattr(module, node.attr)


def _plain(name: str, value: Any) -> str:
    value = getattr(value, "value", value)  # of a tl.constexpr
    text = str(value)
    if " at 0x" in text or isinstance(value, (set, frozenset)):
        raise TypeError(f"{name} is {text}; a digest needs a value that every process prints alike")
    return f"{type(value).__name__} {text}"
