"""Recipes are valid and say what they are for; DeepSpeed files hold engine settings only."""

import json
from pathlib import Path

import pytest

from flex.config_io import load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "flex/recipes").glob("*.yaml"))
ENGINES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_named_after_its_file(path):
    config = load_config(str(path))
    assert config.name == path.stem
    assert path.read_text().startswith("# ")


def test_the_recipes_are_those_the_documentation_names():
    names = {path.stem for path in RECIPES}
    assert {"builtin-smollm2", "mbpp-smollm2", "codellama-7b-mbpp"} <= names
    assert len([name for name in names if name.startswith("round")]) == 5


@pytest.mark.parametrize("name", ["round1-mbpp-lora", "round3-codesearchnet-lora"])
def test_the_plain_lora_rounds_are_as_published(name):
    config = load_config(str(ROOT / f"flex/recipes/{name}.yaml"))
    optim, lora = config.optim, config.lora
    assert not config.penalty.active
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == (
        *("adamw", 2e-4, (0.9, 0.999), 0.01),
    )
    assert (lora.r, lora.alpha, lora.dropout) == (8, 16.0, 0.05)
    assert optim.lr * optim.min_lr_ratio == pytest.approx(1e-5)  # where the cosine ends
    assert (config.train.batch_size, config.train.epochs, config.data.loss_on) == (4, 3, "full")


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_a_deepspeed_file_holds_engine_settings_only(path):
    settings = json.loads(path.read_text())
    assert settings["managed_gradient_accumulation"] is False
    assert settings["zero_allow_untested_optimizer"] is True
    assert settings["zero_force_ds_cpu_optimizer"] is False
    decided_by_the_run = {
        *("optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps"),
        *("train_batch_size", "bf16", "fp16"),
    }
    assert decided_by_the_run & settings.keys() == set()
    zero = settings["zero_optimization"]
    assert path.stem.removeprefix("zero").split("_")[0] == str(zero["stage"])
    in_host_memory = path.stem.endswith(("offload", "offload_param", "nvme"))
    assert ("offload_optimizer" in zero) == in_host_memory
    assert ("offload_param" in zero) == path.stem.endswith(("offload_param", "nvme"))
    if zero["stage"] == 3:  # adapters stay whole: the penalty needs whole matrices
        assert zero["stage3_param_persistence_threshold"] >= 1_000_000


def test_all_deepspeed_files_are_there_and_in_their_readme():
    names = {path.stem for path in ENGINES}
    assert names == {
        *("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"),
        *("zero3_hpz", "zero3_offload_param", "zero3_nvme"),
    }
    readme = (ROOT / "ds_configs/README.md").read_text("utf-8")
    assert all(f"| `{name}.json` |" in readme for name in names)
