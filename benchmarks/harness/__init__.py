"""The benchmark harness. A benchmark is a pytest test that takes the fixture `bench` (a `Bench`).

In one process, callables timed in turns (pytest-benchmark keeps our side's times):

    from benchmarks.harness import Bench, Gate, Missing, Work

    def test_double(bench: Bench):
        x = torch.randn(1024 if bench.tiny else 2**24, device=bench.device)
        bench.compare(
            "double",
            ours=lambda: x + x,
            peers={"product": lambda: 2 * x, "other": Missing("not installed")},
            gate=lambda: Gate("largest difference", float((x + x - 2 * x).abs().max()), 0.0),
            work=Work(bytes=2 * x.nbytes),
            shape=str(x.numel()),
            dtype="fp32",
            aims={"product": 1.0},
        )

Measured elsewhere (whole runs in processes of their own), samples in any unit of `Figure`, paired by their place
(the n-th sample of each variant was taken in the same turn):

    bench.record(
        "step, MBPP, smollm2-135m",
        samples={"ours": [1.21, 1.20], "PEFT + Trainer": [3.9, 4.1], "TRL": Missing()},
        gate=Gate("losses differ by at most", 0.01, 0.02),
        unit="s", shape="16 examples", dtype="bf16",
        aims={"PEFT + Trainer": 1 / 3}, memory={"ours": 1.5e9}, settings={"ours": "AdamW, r 8"},
    )

Both return the Figures. A gate that is red, or that raises AssertionError, writes rows "red gate" without any number
and fails the test (RedGate). Floors come from ceilings measured in the same session; the table, one CSV, its plots
and the machine's card are written at the end. `bench.device` is "cpu" where a GPU is asked for and there is none:
`bench.tiny` is then set, `bench.impl` is "triton" (its interpreter), gates run, rows say "not measured: no GPU".
"""

from benchmarks.harness.figure import (
    MEASURED,
    OURS,
    SCHEMA,
    Figure,
    Gate,
    Missing,
    SchemaError,
    Work,
    as_csv,
    read_csv,
)
from benchmarks.harness.fixture import Bench, RedGate

__all__ = [
    "MEASURED",
    "OURS",
    "SCHEMA",
    "Bench",
    "Figure",
    "Gate",
    "Missing",
    "RedGate",
    "SchemaError",
    "Work",
    "as_csv",
    "read_csv",
]
