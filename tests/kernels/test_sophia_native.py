"""The C update of fp32 tensors on a CPU: against fp64, in pieces, without a compiler, with seeded bugs."""

import logging
import os

import pytest
import torch

from flex.kernels import native_build
from flex.kernels.sophia_update import native, sophia_update, torch_step
from flex.kernels.sophia_update.reference import sophia_reference
from flex.kernels.sophia_update.scalars import Scalars
from tests.mutants import load_copy

SHAPES = [(1,), (0,), (7, 13), (2, 3, 5), (64, 33), ((1 << 20) + 3,), (1,)]
OPTIONS = {
    **{"lr": 0.01, "beta1": 0.9, "gamma": 0.05, "eps": 1e-3, "weight_decay": 0.1},
    **{"m_scale": 1.7, "h_scale": 3.0, "h_offset": 0.2},
}
FACTOR = 0.3


def tensors() -> tuple[list[torch.Tensor], ...]:
    """p, m, h, g; some h negative, so that the floor of gamma h is reached."""
    generator = torch.Generator().manual_seed(0)

    def made() -> list[torch.Tensor]:
        return [torch.randn(s, generator=generator) for s in SHAPES]

    return made(), made(), [3 * h for h in made()], made()


def run(module, p, m, h, g, factor: float = FACTOR) -> torch.Tensor:
    step = module.native_step()
    assert step is not None
    return module.native_update(step, p, m, h, g, Scalars(**OPTIONS).row(), factor)


def check(module) -> None:
    """Every coordinate of p and m within 4 eps of fp64 at the tensor's size; the count exact."""
    p, m, h, g = tensors()
    wanted = [
        sophia_reference(p_i.double(), m_i.double(), h_i.double(), g_i.double() * FACTOR, **OPTIONS)
        for p_i, m_i, h_i, g_i in zip(p, m, h, g, strict=True)
    ]
    count = run(module, p, m, h, g)
    # A ratio within rounding of 1 may fall on either side: one in about 1e6.
    assert abs(int(count) - sum(int(c) for _, _, c in wanted)) <= 2
    for got_p, got_m, (want_p, want_m, _) in zip(p, m, wanted, strict=True):
        for got, want in ((got_p, want_p), (got_m, want_m)):
            if got.numel():
                bound = 4 * torch.finfo(torch.float32).eps * want.abs().max().clamp_min(1)
                assert (got.double() - want).abs().max() <= bound


def test_matches_fp64():
    check(native)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    expected = tensors()
    count = run(native, *expected)
    monkeypatch.setattr(native_build, "ELEMENTS_PER_THREAD", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = tensors()
    assert run(native, *found) == count
    for a, b in zip(expected, found, strict=True):
        assert all(map(torch.equal, a, b))


def test_matrices_and_one_flat_vector_agree_bit_for_bit():
    lists = tensors()
    flat = [[torch.cat([t.reshape(-1) for t in x])] for x in lists]
    assert run(native, *lists) == run(native, *flat)
    assert torch.equal(flat[0][0], torch.cat([t.reshape(-1) for t in lists[0]]))


@pytest.mark.parametrize("where", [1, 2, 3])  # m, h, g
def test_nan_is_not_hidden(where):
    lists = tensors()
    lists[where][4][5, 6] = float("nan")
    run(native, *lists)
    assert lists[0][4].isnan().sum() == 1
    assert lists[0][4][5, 6].isnan()


def test_the_public_function_takes_it_for_fp32_alone(monkeypatch):
    def refuse(*_):
        raise AssertionError("list operations")

    monkeypatch.setattr(torch_step, "_foreach", refuse)
    sophia_update(*tensors(), **OPTIONS)
    with pytest.raises(AssertionError, match="list operations"):
        sophia_update(*([t.double() for t in x] for x in tensors()), **OPTIONS)


def test_strided_tensors_take_the_list_operations():
    p, m, h, g = tensors()
    expected = [t.clone() for t in p]
    sophia_update(expected, [t.clone() for t in m], h, g, **OPTIONS)
    wide = torch.empty(64, 66)[:, ::2]
    g[4] = wide.copy_(g[4])
    sophia_update(p, m, h, g, **OPTIONS)
    torch.testing.assert_close(p[4], expected[4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("broken", ["no compiler", "a compiler that fails", "a bad name"])
def test_without_a_compiler_list_operations_take_its_place(broken, monkeypatch, tmp_path, caplog):
    native.native_step.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    if broken == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif broken == "a bad name":
        monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    else:
        fake = tmp_path / "cc"
        fake.write_text("#!/bin/sh\necho boom >&2\nexit 3\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    try:
        with caplog.at_level(logging.WARNING, "flex.kernels"):
            p, m, h, g = tensors()
            sophia_update(p, m, h, g, **OPTIONS)
            sophia_update(p, m, h, g, **OPTIONS)
        assert caplog.text.count("list operations take its place") == 1
        reason = {"no compiler": "PATH", "a compiler that fails": "boom", "a bad name": "no-such"}
        assert reason[broken] in caplog.text
    finally:
        native.native_step.cache_clear()


BUGS = {
    "gradient not scaled": ("g[i] * factor", "g[i]"),
    "momentum not stored": ("m[i] = momentum;", ""),
    "old momentum used": ("= momentum * m_scale", "= m[i] * m_scale"),
    "bias correction left out": ("momentum * m_scale", "momentum"),
    "penalty's curvature left out": ("h[i] * h_factor + h_offset", "h[i] * h_factor"),
    "no floor": ("floor = floor < eps ? eps : floor;", ""),
    "eps added": ("floor = floor < eps ? eps : floor;", "floor += eps;"),
    "clipped on one side": ("ratio = ratio < -1.0f ? -1.0f : ratio;", ""),
    "count one-sided": ("__builtin_fabsf(ratio) > 1.0f", "ratio > 1.0f"),
    "decay inside the clip": ("(lr * ratio + lr_decay * p[i])", "lr * ratio"),
    "block's end missed": ("i += BLOCK)", "i += BLOCK + 1)"),
    "last coordinate missed": ("i < size; i++", "i < size - 1; i++"),
    "shares overlap": ("begin > 0 ? begin : 0", "0"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_killed(bug, tmp_path, monkeypatch):
    copy = load_copy(tmp_path, native, *BUGS[bug])
    with pytest.raises(AssertionError):
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
            check(copy)


def test_an_unchanged_copy_passes(tmp_path):
    check(load_copy(tmp_path, native, "enum { BLOCK = 1 << 20 };", "enum { BLOCK = 1 << 10 };"))
