"""Loading into ZeRO-3's partitions: two processes, each of which reads its own part of every weight."""

import os
import subprocess
import sys

from tests.runs import ROOT, TINY, free_port, one_at_a_time, run, write_rows
from tests.tiny import tiny_model

SCRIPT = """
import sys
import deepspeed
import torch
from safetensors.torch import load_file
from pathlib import Path
from flex.config import ModelConfig
from flex.model.base import load_model
from flex.model.tensors import FileTensor

deepspeed.init_distributed(dist_backend="gloo", verbose=False)
rank, folder = deepspeed.comm.get_rank(), Path(sys.argv[1])
read = FileTensor.read_into
amounts = []
FileTensor.read_into = lambda self, flat, start=0: (amounts.append(len(flat)), read(self, flat, start))
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
}
model = load_model(ModelConfig(name=str(folder), dtype="bfloat16"), ds_config=config)
saved = {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}
assert sum(amounts) <= sum(t.numel() for t in saved.values()) // 2 + len(saved), "read too much"
parameters = dict(model.named_parameters())
assert parameters.keys() == saved.keys()
for name, p in parameters.items():
    whole = saved[name].bfloat16().view(-1)
    size = -(-len(whole) // 2)
    mine = whole[rank * size : (rank + 1) * size]
    assert p.numel() == 0 and not p.requires_grad, name
    assert p.ds_tensor.dtype == torch.bfloat16 and len(p.ds_tensor) == size
    assert torch.equal(p.ds_tensor[: len(mine)], mine), name
    assert tuple(p.ds_shape) == tuple(saved[name].shape)
with deepspeed.zero.GatheredParameters(list(parameters.values())):
    for name, p in parameters.items():
        assert torch.equal(p, saved[name].bfloat16()), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
frequencies = type(model.model.rotary_emb)(model.config).inv_freq
assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
print("as the file says")
"""


def test_two_processes_hold_the_halves_of_the_file(tmp_path):
    # 129 x 33: an odd number of elements, so that the last part is padded
    fields = {"hidden_size": 33, "vocab_size": 129, "head_dim": 8, "tie_word_embeddings": True}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    tiny_model(**fields, **heads).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    with one_at_a_time():
        started = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(tmp_path / "m")],
                cwd=ROOT,
                env={
                    **os.environ,
                    **where,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_SIZE": "2",
                    "DS_ACCELERATOR": "cpu",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for process in started:
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0 and "as the file says" in out, err


def test_a_sample_is_printed_before_the_first_step(tmp_path):
    """It calls the model inside the engine, while every weight is in parts."""
    options = [o for o in TINY if not o.startswith("train.sample_prompt")]
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    options += [f"data.path={rows}", f"dir={tmp_path}", "train.steps=1", "train.batch_size=4"]
    done = run(*options, engine="zero3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before" in done.stdout and "after" in done.stdout
