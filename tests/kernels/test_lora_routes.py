"""The choice of a route: by measurement, once, remembered; a bad file costs no run."""

import logging

import pytest
import torch

from flex.kernels.lora_linear import routes
from flex.kernels.runtime import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEX_ROUTES", str(tmp_path / "cache/routes.json"))
    monkeypatch.setattr(routes, "_known", {})


def choose(rows=20, times=(3.0, 2.0)):
    """(route chosen, number of measurements)."""
    left = list(times)

    def clock(call):
        call()  # it must run
        return left.pop(0)

    x, w = torch.randn(rows, 16), torch.randn(24, 16)
    a, b = torch.randn(4, 16), torch.randn(24, 4)
    return routes.fastest(x, w, a, b, 1.0, 0.1, 7, clock), len(times) - len(left)


def test_the_faster_route_is_taken_and_remembered(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "flex.kernels"):
        assert choose() == ("fused", 2)
    assert "fused (skinny 3.000 ms, fused 2.000 ms)" in caplog.text
    assert choose() == ("fused", 0)
    assert choose(rows=17) == ("fused", 0)  # the same power of two
    assert choose(rows=33, times=(1.0, 2.0)) == ("skinny", 2)
    monkeypatch.setattr(routes, "_known", {})  # as in a new process
    assert choose() == ("fused", 0)
    assert len(routes.table().splitlines()) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"k": 1}', '{"k": {"skinny": 1}}'])
def test_a_damaged_file_costs_a_measurement(text, caplog):
    path = routes.cache_file()
    path.parent.mkdir()
    path.write_text(text)
    assert choose() == ("fused", 2)
    assert text.startswith('{"k": {') or "routes are measured anew" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEX_ROUTES", str(tmp_path / "file/routes.json"))
    assert choose() == ("fused", 2)
    assert "cannot be written" in caplog.text


def test_nothing_measured_says_so():
    assert routes.table() == "no route has been measured"
