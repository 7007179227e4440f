"""`--dry-run`: the run's own errors, nothing written, and what cannot be looked at is said."""

import fcntl
import json

import pytest

from flex import dry_run
from flex.config import RunConfig
from flex.config_io import load_config
from flex.ds_sections import check_zero_section
from flex.errors import CheckpointError, ConfigError, DataError, ModelError
from flex.train import check_settings, start
from tests.runs import ROOT, TINY, write_rows


@pytest.fixture
def given(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "runs").mkdir()

    def config(*more):
        options = (*TINY, f"data.path={rows}", f"dir={tmp_path / 'runs'}", "name=run", *more)
        last = {option.partition("=")[0]: option for option in options}
        return load_config(None, list(last.values()))

    return config


def ds(name):
    return f"deepspeed={ROOT / 'ds_configs' / name}.json"


def test_a_good_run_passes_and_leaves_no_trace(given, tmp_path, capsys):
    assert dry_run.rehearse(given("train.steps=5", "train.batch_size=8", ds("zero3")), 4) == 0
    out = capsys.readouterr().out
    assert "4 processes" in out and "5 of 8 examples (4 x 1 micro-batches)" in out
    assert "6 on gate_proj, up_proj, down_proj: 0.0 M parameters, r 4" in out
    assert "not checked  weights" in out and "would be new" in out
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_largest_micro_batch_is_the_largest(given, capsys):
    from flex.data.loader import StepLoader, load_data
    from flex.model.base import load_tokenizer

    cfg = given("train.steps=7", "train.batch_size=8", "train.accumulation=2")
    tokenizer = load_tokenizer(cfg.model)
    data = load_data(cfg, tokenizer)
    sizes = [
        (batch.input_ids.numel(), step + 1)
        for step in range(7)
        for rank in range(2)
        for batch in StepLoader(data.train, cfg, rank, 2, 258).micro_batches(step)
    ]
    loader = StepLoader(data.train, cfg, 0, 2, 258)
    assert loader.largest_micro_batch(7)[0] == max(sizes)[0]
    assert loader.largest_micro_batch(7) in sizes


@pytest.mark.parametrize(
    ("more", "world", "error", "what"),
    [
        (("lora.targets=[gate_prog]",), 1, ModelError, "names no module"),
        (("data.path=/nowhere.jsonl",), 1, DataError, "nowhere"),
        (("model.name=shape:huge",), 1, ModelError, "there is no shape:huge"),
        (("train.batch_size=2", ds("zero2")), 4, ConfigError, "less than 4 processes"),
        ((), 2, ConfigError, "no ds_config is given"),
        ((ds("zero1"), "optim.name=adamw8bit"), 2, ConfigError, "adamw8bit with ZeRO"),
        (("profile.tool=torch", "profile.steps=90", "train.steps=9"), 1, ConfigError, "profile"),
        ((ds("zero9"),), 2, ConfigError, "zero9"),
    ],
)
def test_what_is_wrong_is_told_as_the_run_would(given, tmp_path, more, world, error, what):
    with pytest.raises(error, match=what):
        dry_run.rehearse(given(*more), world)
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_adapter_larger_than_the_persistence_threshold(given, tmp_path):
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    file = tmp_path / "own.json"
    file.write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match="persistence_threshold is 100, the largest adapter has 512"
    ):
        dry_run.rehearse(given(f"deepspeed={file}"), 2)


def test_no_network_is_not_an_error_but_a_wrong_name_is(given, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert dry_run.rehearse(given("model.name=nobody/nothing")) == 0
    out = capsys.readouterr().out
    for what in ("tokenizer", "data", "architecture"):
        assert f"not checked  {what}" in out
    try:
        raise ModelError("cannot load x", "", "") from OSError("is not a valid identifier")
    except ModelError as error:
        assert not dry_run.offline(error)


class TestRunFolder:
    def folder(self, tmp_path, cfg):
        from flex.run_folder import open_run

        with open_run(cfg, 0, "data") as run:
            run.metrics.write_text("{}\n")
        return run.path

    def test_other_options_are_refused(self, given, tmp_path):
        self.folder(tmp_path, given())
        with pytest.raises(ConfigError, match="optim.lr"):
            dry_run.inspect_run(given("optim.lr=0.5"), "data")
        with pytest.raises(ConfigError, match="other data"):
            dry_run.inspect_run(given(), "other")
        assert "would start at step 0" in dry_run.inspect_run(given(), "data")
        assert "would start at step 0" in dry_run.inspect_run(given(), None)

    def test_a_folder_in_use_is_refused(self, given, tmp_path):
        path = self.folder(tmp_path, given())
        with open(path / ".lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(ConfigError, match="in use"):
                dry_run.inspect_run(given(), "data")
        dry_run.inspect_run(given(), "data")

    def test_checkpoints_are_looked_at_and_not_moved(self, given, tmp_path):
        path = self.folder(tmp_path, given())
        broken = path / "checkpoints/step-000002"
        broken.mkdir(parents=True)
        with pytest.raises(CheckpointError, match="all 1 checkpoints"):
            dry_run.inspect_run(given(), "data")
        assert broken.exists()

    def test_a_folder_that_is_a_file(self, given, tmp_path):
        (tmp_path / "runs/run").write_text("")
        with pytest.raises(ConfigError, match="cannot be used"):
            dry_run.inspect_run(given(), "data")


def test_missing_shards_of_a_local_model(tmp_path):
    with pytest.raises(ModelError, match="lacks safetensors files"):
        dry_run._check_files(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert dry_run._check_files(tmp_path) == 1
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lacks b.safetensors"):
        dry_run._check_files(tmp_path)


def test_world_needs_the_dry_run():
    with pytest.raises(ConfigError, match="--world without --dry-run"):
        start(RunConfig(), False, 2)


class TestZeroSections:
    def check(self, world=8, **zero):
        check_zero_section("x.json", {"zero_optimization": {"stage": 3, **zero}}, world)

    def test_hpz_groups_come_out_even(self):
        self.check(zero_hpz_partition_size=8, world=16)
        with pytest.raises(ConfigError, match="is 8, the run has 12 processes"):
            self.check(zero_hpz_partition_size=8, world=12)

    def test_nvme(self, tmp_path, monkeypatch):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        def offload(path):
            return {"offload_param": {"device": "nvme", "nvme_path": path}}

        with pytest.raises(ConfigError, match="nvme_path is not set"):
            check_settings(load_config(None, [ds("zero3_nvme")]), 8)
        with pytest.raises(ConfigError, match="no folder that can be written"):
            self.check(**offload(str(tmp_path / "none")))
        monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
        with pytest.raises(ConfigError, match="async_io cannot be built"):
            self.check(**offload(str(tmp_path)))
        monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
        self.check(**offload(str(tmp_path)))
        with pytest.raises(ConfigError, match="offload_optimizer.device is nvme"):
            self.check(offload_optimizer={"device": "nvme", "nvme_path": str(tmp_path)})

    def test_quantised_weights_need_a_gpu(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(ConfigError, match="sets zero_quantized_weights"):
            self.check(zero_quantized_weights=True)

    def test_what_deepspeed_refuses(self):
        with pytest.raises(ConfigError, match="DeepSpeed refuses zero_optimization: stage"):
            check_zero_section("x.json", {"zero_optimization": {"stage": 7}}, 1)

    @pytest.mark.parametrize(
        "file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem
    )
    def test_ours_pass(self, file):
        if file.stem != "zero3_nvme":
            check_settings(load_config(None, [f"deepspeed={file}"]), 16)
