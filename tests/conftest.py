"""What every test gets: one thread, no network, its working directory put back. And fixtures."""

import os

# Before torch is imported anywhere, child processes included.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

if not Path("/dev/nvidiactl").exists():  # torch, which could tell, imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        # one reason for all, so that pytest's summary counts them
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_working_directory():
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def poison(monkeypatch):
    """Fill what `torch.empty` and its relatives return with NaN (integers: their maximum), so that
    an element which a kernel never writes cannot pass for a result by luck."""
    import torch

    def poisoned(allocate):
        def fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "meta" or tensor.dtype == torch.bool:
                return tensor
            floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            value = float("nan") if floating else torch.iinfo(tensor.dtype).max
            with torch.no_grad():
                return tensor.fill_(value)

        return fill

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
