"""The whole way on the real SmolLM2-135M: two processes under ZeRO-2, adapter, stock PEFT, merge."""

import json
import os
import subprocess
import sys

from flex.metrics_file import read_metrics
from tests.runs import ROOT, command, one_at_a_time

OPTIONS = (
    "--config",
    "flex/recipes/builtin-smollm2.yaml",
    "train.steps=4",
    "train.batch_size=4",
    "train.eval_every=2",
    "data.limit=40",
    "optim.lr=3e-4",
)

STOCK = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter, merged = sys.argv[1:]
base = json.load(open(adapter + "/adapter_config.json"))["base_model_name_or_path"]
ids = AutoTokenizer.from_pretrained(base)("def add(a, b):\\n    return", return_tensors="pt").input_ids

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits

base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
before = logits(base_model)
unmerged = logits(PeftModel.from_pretrained(base_model, adapter))
whole = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
assert not any(name.partition(".")[0] == "flex" for name in sys.modules)
print(json.dumps([(unmerged - before).abs().max().item(), (whole - unmerged).abs().max().item()]))
"""


def test_from_the_launcher_to_plain_transformers(tmp_path):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment.pop("OMP_NUM_THREADS")  # the trainer shares the cores out itself

    def call(*words):
        with one_at_a_time():
            done = subprocess.run(
                words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    output = call(*command(*OPTIONS, f"dir={tmp_path}", "name=run", engine="zero2"))
    assert "--- completion before training" in output and "--- completion after" in output
    assert f"adapter: {tmp_path / 'run/adapter'}" in output
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    validation = [r["validation_loss"] for r in records if "validation_loss" in r]
    assert len(validation) == 3 and validation[-1] < validation[0]
    assert 0 < records[-1]["clipped_fraction"] < 1 and records[1]["curvature_mean"] > 0
    assert records[-1]["penalty"] > 0
    assert json.loads((tmp_path / "run/finished.json").read_text())["steps"] == 4

    adapter, merged = str(tmp_path / "run/adapter"), str(tmp_path / "merged")
    call(sys.executable, "-m", "flex", "merge", "--adapter", adapter, "--out", merged)
    effect, difference = json.loads(call(sys.executable, "-c", STOCK, adapter, merged))
    assert effect > 1e-3 and difference < 1e-4
