"""Base models and trained adapters on disk."""

import pytest

from flex.model.export import save_adapter
from tests.flex.saved import MODELS, make_base, trained


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of base models, by name; no test writes to them."""
    root = tmp_path_factory.mktemp("bases")
    return {name: make_base(root / name, **fields) for name, (fields, _) in MODELS.items()}


@pytest.fixture
def base(bases):
    return bases["tied"]


@pytest.fixture
def model(base):
    return trained(base)


@pytest.fixture
def adapter(model, base, tmp_path):
    return save_adapter(model, tmp_path / "run" / "adapter", str(base))
