"""The export's self-test loads the base once more: only where it fits, and only when the trained one is gone."""

import gc
import logging
import weakref
from types import SimpleNamespace

import torch

from flex import session
from flex.config import ModelConfig
from flex.engine import Engine
from flex.model.base import base_bytes
from tests.tiny import tiny_model


def test_a_base_larger_than_the_free_memory_is_not_loaded(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "flex.session")
    cfg = ModelConfig(name="shape:codellama-7b")
    assert base_bytes(cfg) == 2 * 6_738_546_688
    free = SimpleNamespace(available=13_000_000_000)
    monkeypatch.setattr(session.psutil, "virtual_memory", lambda: free)
    tested = []
    monkeypatch.setattr(session, "self_test", lambda *args: tested.append(args))
    run = SimpleNamespace(cfg=SimpleNamespace(model=cfg), adapter="adapter")
    session.Session._self_test(run, torch.zeros(1, 1), torch.zeros(1), None)
    assert "self-test skipped: the whole base takes 13.5 GB of memory, 13.0 GB" in caplog.text
    assert not tested
    free.available = 14_000_000_000
    session.Session._self_test(run, torch.zeros(1, 1), torch.zeros(1), None)
    assert len(tested) == 1


def test_a_closed_engine_holds_no_model():
    model = tiny_model()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.1)
    engine = Engine(model, optimizer, parameters, 1.0)
    gone = weakref.ref(model)
    model.circle = [model]
    del model, parameters, optimizer
    gc.disable()
    try:
        engine.close()
        assert gone() is None
    finally:
        gc.enable()
