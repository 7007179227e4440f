"""FLeX trains at least twice as fast as PEFT + the Hugging Face Trainer; see train_throughput.py."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import train_throughput as throughput


@pytest.mark.slow
def test_twice_the_tokens_per_second_of_peft_and_trainer(request, capsys):
    mbpp = request.config.getoption("--mbpp")
    if mbpp is None:
        pytest.skip("give --mbpp FILE")
    results = request.config.getoption("--results")
    found = []
    with capsys.disabled():
        print(f"\n{throughput.HEADER}", flush=True)
        for measurement in throughput.contest(mbpp.resolve(), request.config.getoption("--steps")):
            found.append(measurement)
            print(throughput.table_row(measurement), flush=True)
        print(f"ratio of the fastest: {throughput.ratio(found):.2f}")
    if results:
        record = {"ratio": throughput.ratio(found), "runs": [asdict(m) for m in found]}
        (results / "train_throughput.json").write_text(json.dumps(record, indent=2) + "\n")
    assert throughput.ratio(found) >= 2.0
