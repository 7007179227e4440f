"""`doctor --kernels`: every public function is held to its budget; a wrong one is named and fails."""

import pytest
import torch

from flex import commands, kernel_check, kernel_lora_trial, kernel_report, kernel_trials
from flex.kernel_operands import Sizes
from flex.kernels.budget import budget_used

TINY = Sizes(tokens=5, inputs=32, outputs=48, rank=4, adapters=1)
FUNCTIONS = {
    *("lora_linear", "spectral_penalty", "sophia_update"),
    *("gradient_norm", "curvature_update", "penalised_update"),
}


def check():
    """Findings by (function, case, dtype) without torch.compile."""
    found = kernel_check.check(torch.device("cpu"), TINY, compile_seconds=0)
    return {(f.trial.function, f.trial.case, f.trial.dtype): f for f in found}


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(kernel_check, "ROUNDS", 1)


def test_every_function_is_within_its_budget_in_both_dtypes():
    found = check()
    assert {(name, dtype) for name, _, dtype in found} == {
        (name, dtype) for name in FUNCTIONS for dtype in (torch.float32, torch.bfloat16)
    }
    for key, finding in found.items():
        assert not finding.failed, (key, finding.used, finding.worst)
        assert finding.ours > 0 and finding.eager > 0, key
        assert finding.trial.impl == "torch", key


WRITTEN = {  # what a function writes, from its arguments
    "lora_linear": None,
    "spectral_penalty_into": lambda params, grads, *_: grads,
    "sophia_update": lambda params, *_: params,
    "gradient_norm": None,
    "curvature_update": lambda curvatures, *_: curvatures,
    "penalised_update": lambda groups, *_: groups[0].params,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_wrong_kernel_is_named_and_the_status_is_1(name, monkeypatch, capsys):
    """10 % off in what it returns, or in the last matrix that it writes."""
    module = kernel_lora_trial if name == "lora_linear" else kernel_trials
    right, written = getattr(module, name), WRITTEN[name]

    def wrong(*args, **options):
        found = right(*args, **options)
        if written is None:
            return found * 1.1
        written(*args)[-1].mul_(1.1)
        return found

    monkeypatch.setattr(module, name, wrong)
    assert kernel_check.main(TINY, compile_seconds=0) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAILED: " in line]
    cases = 2 if name == "spectral_penalty_into" else 1
    assert len(lines) == 2 * cases, lines  # fp32 and bf16
    assert all(line.startswith(name.removesuffix("_into")) for line in lines), lines


def test_a_function_that_raises_is_a_finding(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no such thing\nsecond line")

    monkeypatch.setattr(kernel_trials, "gradient_norm", broken)
    assert kernel_check.main(TINY, compile_seconds=0) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: RuntimeError: no such thing") == 2
    assert "14 checks, 2 FAILED" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there a GPU is measured")
def test_what_is_not_measured_is_said(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernel_check.main(TINY, compile_seconds=60) == 0
    out = capsys.readouterr().out
    assert "torch.compile, not measured: no compiler: lora_linear" in out
    assert "not measured on a GPU" in out
    assert "14 checks, 0 FAILED" in out


@pytest.mark.parametrize(("check", "report", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is compiled for others")
def test_doctor_prints_both_and_fails_by_either(check, report, status, monkeypatch, capsys):
    monkeypatch.setattr(kernel_check, "main", lambda: print("checked") or check)
    monkeypatch.setattr(kernel_report, "main", lambda argv: print("compiled") or report)
    assert commands.main(["doctor", "--kernels"]) == status
    out = capsys.readouterr().out
    assert out.index("checked") < out.index("compiled")


@pytest.mark.parametrize(
    ("actual", "eager", "used"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.1], [1.0, 2.1], 0.5),  # as wrong as eager is half of the budget
        ([1.0, 1.7], [1.0, 2.1], 1.5),
        ([1.0, float("nan")], [1.0, 2.1], float("inf")),
    ],
)
def test_budget_used(actual, eager, used):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = budget_used(torch.tensor(actual), torch.tensor(eager), exact)
    assert found == pytest.approx(used, rel=1e-4)


def test_results_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1,\) is not \(2,\)"):
        budget_used(torch.ones(1), torch.ones(2), torch.ones(2, dtype=torch.float64))
