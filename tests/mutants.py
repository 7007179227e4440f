"""Copies of a module with a bug seeded into them, and C sources that are compiled anew, or cannot be."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flex.kernels import native_build


def load_copy(folder: Path, module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of `module`, written into `folder`, in which the one occurrence of `old` reads `new`."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new))
    package = module.__name__.rpartition(".")[0]
    name = f"{package}._mutant"  # a sibling's name, for the relative imports
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy  # triton looks a function's module up
    spec.loader.exec_module(copy)
    return copy


@contextmanager
def compiled_anew(cached: Any) -> Iterator[None]:
    """`cached`, a cached function that compiles a C source, starts afresh, and forgets at the end what it made."""
    cached.cache_clear()
    try:
        yield
    finally:
        cached.cache_clear()


@contextmanager
def compiled_from(
    source: str, module: ModuleType, cached: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """`cached` of `module` compiles `source` in place of the module's SOURCE, which must succeed."""
    monkeypatch.setattr(module, "SOURCE", source)
    with compiled_anew(cached):
        assert cached() is not None, "the mutant does not compile"
        yield


@contextmanager
def without_a_compiler(cached: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`cached` as in `compiled_anew`, on a machine that has no compiler."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native_build, "COMPILERS", ("no-such-compiler",))
    with compiled_anew(cached):
        yield
