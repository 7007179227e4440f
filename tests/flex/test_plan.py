"""The plan against closed forms written here, and against what autograd keeps and torch counts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from flex import loss, loss_head, plan_cost, plan_memory
from flex.chips import CHIPS, has_bf16_dot_products
from flex.commands import main
from flex.config import RunConfig
from flex.config_io import load_config
from flex.errors import ConfigError, ModelError
from flex.kernels import products
from flex.kernels.causal_attention import native as causal_attention
from flex.kernels.lora_linear import skinny_native
from flex.loss import cross_entropy_sum
from flex.model.adapters import add_adapters
from flex.model.architecture import Architecture, architecture_of, read_architecture
from flex.model.base import load_model
from flex.plan import plan
from flex.plan_job import Job, make_job

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "flex/recipes/codellama-7b-mbpp.yaml"
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)

H, F, L, V = 4096, 11008, 32, 32016  # Code Llama 7B
LAYER = 4 * H * H + 3 * H * F
LINEAR = L * LAYER
OTHER = 2 * V * H + (2 * L + 1) * H
ADAPTERS = L * 3 * 8 * (H + F)


def recipe(*overrides: str, world: int = 1, tokens: int | None = None) -> Job:
    return plan(load_config(str(RECIPE), overrides), world, tokens)


def component(job: Job, name: str, device: str = "cuda") -> float:
    return next(c.bytes for c in plan_memory.memory(job, device) if c.name == name)


def work(job: Job, name: str) -> plan_cost.Part:
    return next(part for part in plan_cost.step(job) if part.name == name)


# ---- Code Llama 7B by closed forms ----


def test_parameters_and_bytes_of_code_llama_7b() -> None:
    job = recipe()
    assert job.model.parameters == LINEAR + OTHER == 6_738_546_688
    assert job.adapter_parameters == ADAPTERS == 11_599_872
    assert component(job, "frozen weights") == 2 * (LINEAR + OTHER)
    assert component(job, "adapters") == component(job, "gradients") == 4 * ADAPTERS
    assert component(job, "optimizer state") == 8 * ADAPTERS
    assert component(job, "penalty: start") == 4 * ADAPTERS
    assert component(recipe("optim.name=lion"), "optimizer state") == 4 * ADAPTERS


def test_bytes_of_a_quantised_base() -> None:
    nf4 = recipe("model.quantise=nf4")
    assert (
        component(nf4, "frozen weights") == LINEAR * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 2 * OTHER
    )
    plain = recipe("model.quantise=nf4", "model.double_quant=false")
    assert component(plain, "frozen weights") == LINEAR * (1 / 2 + 4 / 64) + 2 * OTHER
    rows = L * (5 * H + 2 * F)  # one fp32 scale each
    int8 = recipe("model.quantise=int8")
    assert component(int8, "frozen weights") == LINEAR + 4 * rows + 2 * OTHER
    assert component(nf4, "workspace: weights") == 2 * H * F, "one layer dense"


def test_activations_of_code_llama_7b_on_a_gpu() -> None:
    """bf16: two fp32 norms, q k v and the output, x of gate and up, four (T, F), S of each adapter."""
    t = 512
    attention = 4 * t * (H + 1) + 2 * t * 4 * H + 4 * 32 * t
    mlp = 4 * t * (H + 1) + 2 * t * H + 2 * t * 4 * F + 3 * 2 * t * 8
    first = 2 * t * H + 2 * t * 4 * F + 3 * 2 * t * 8  # below it nothing requires a gradient
    tail = 4 * t * (H + 1) + 2 * 2 * t * 128
    expected = first + (L - 1) * (attention + mlp) + tail
    assert plan_memory.activations(recipe(tokens=t), "cuda") == expected
    recomputed = plan_memory.activations(
        recipe("model.gradient_checkpointing=true", tokens=t), "cuda"
    )
    assert recomputed == L * 2 * t * H + tail


def test_flops_and_bytes_of_a_step_of_code_llama_7b() -> None:
    t, accumulation = 512, 4
    job = recipe(tokens=t)
    forward = work(job, "frozen GEMM, forward")
    assert forward.flops == accumulation * 2 * t * LINEAR
    features = L * (4 * 2 * H + 3 * (H + F))
    assert forward.bytes == accumulation * (2 * LINEAR + 2 * t * features)
    # nothing below the first layer's gate and up requires a gradient
    below = 4 * H * H + 2 * H * F
    assert work(job, "frozen GEMM, dX").flops == accumulation * 2 * t * (LINEAR - below)
    lora = 3 * 2 * t * ADAPTERS - 2 * 2 * t * 8 * H
    assert work(job, "LoRA").flops == accumulation * lora
    assert work(job, "LoRA").bytes == accumulation * 2 * t * L * (2 * (2 * H + F) + 2 * F + H)
    assert work(job, "logits").flops == accumulation * 2 * 2 * t * H * V
    assert work(job, "attention").flops == accumulation * (L + (L - 1) * 2.5) * 2 * t * t * H
    assert work(job, "sophia").bytes == 28 * ADAPTERS  # and the norm's read
    micro = sum(p.flops for p in plan_cost.micro_batch(job))
    refresh = work(job, "curvature refresh").flops
    assert refresh == pytest.approx((micro + 2 * ADAPTERS) * accumulation / 2 / 10)


def test_checkpointing_adds_one_forward_of_the_layers_and_dx_of_all() -> None:
    t = 512
    job = recipe("model.gradient_checkpointing=true", "train.accumulation=1", tokens=t)
    layers = 2 * t * LINEAR + 2 * t * ADAPTERS + L * 2 * t * t * H
    assert work(job, "recompute").flops == layers
    assert work(job, "frozen GEMM, dX").flops == 2 * t * LINEAR


def test_quantised_weights_are_read_written_dense_and_read_again() -> None:
    job = recipe("model.quantise=nf4", "train.accumulation=1", tokens=512)
    dense = recipe("train.accumulation=1", tokens=512)
    more = work(job, "frozen GEMM, forward").bytes - work(dense, "frozen GEMM, forward").bytes
    assert more == pytest.approx(LINEAR * (1 / 2 + 1 / 64 + 4 / (64 * 256) + 2))


@pytest.mark.parametrize("world", [2, 8])
def test_traffic_and_shares_under_zero(world: int) -> None:
    ring = (world - 1) / world
    options = ("train.accumulation=1", "train.batch_size=16")
    per_boundary = 1 + 1 / 10  # and the curvature refresh's

    def sent(stage: int, *more: str) -> list[float]:
        job = recipe(
            *options, f"deepspeed={REPOSITORY}/ds_configs/zero{stage}.json", *more, world=world
        )
        return list(plan_cost.traffic(job).values())

    grads = 4 * ADAPTERS * ring * per_boundary
    assert sent(0) == pytest.approx([2 * grads])
    assert sent(1) == sent(2) == pytest.approx([grads, grads])
    weights = 2 * (LINEAR + OTHER) * ring * per_boundary
    assert sent(3) == pytest.approx([grads, grads, 2 * weights])
    assert sent(3, "model.gradient_checkpointing=true")[2] == pytest.approx(3 * weights)
    job = recipe(*options, f"deepspeed={REPOSITORY}/ds_configs/zero3.json", world=world)
    assert component(job, "frozen weights") == 2 * (LINEAR + OTHER) / world
    assert component(job, "optimizer state") == 8 * ADAPTERS / world
    offload = recipe(*options, f"deepspeed={REPOSITORY}/ds_configs/zero3_offload.json", world=world)
    assert (
        plan_memory.total(plan_memory.memory(offload, "cuda"), host=True) == 16 * ADAPTERS / world
    )


@pytest.mark.parametrize(("device", "copies"), [("cuda", 1), ("cpu", 2)])
def test_what_zero3_gathers_is_held_again_while_it_is_on_its_way(device: str, copies: int) -> None:
    job = recipe("train.accumulation=1", f"deepspeed={REPOSITORY}/ds_configs/zero3.json", world=2)
    bucket = 50_000_000 + H * F  # DeepSpeed's default, overshot by the largest matrix
    wanted = 2 * (500_000_000 + bucket + copies * bucket)
    assert component(job, "workspace: weights", device) == wanted


def test_one_gpu_sends_nothing() -> None:
    assert plan_cost.traffic(recipe()) == {}


def test_the_bound_takes_the_longer_of_arithmetic_and_memory() -> None:
    chip = CHIPS["h100"]
    assert plan_cost.Part("", 2 * chip.flops, chip.bandwidth).seconds(chip) == 2
    assert plan_cost.Part("", chip.flops, 3 * chip.bandwidth).seconds(chip) == 3


# ---- against torch ----


def choose_attention(in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_c and causal_attention.compiled() is None:
        pytest.skip("needs a processor with AVX-512 bf16 dot products")
    monkeypatch.setattr(causal_attention, "has_bf16_dots_alone", lambda: in_c)
    monkeypatch.setattr(plan_memory, "has_bf16_dot_products", lambda: in_c)


def test_the_plan_knows_the_processor_as_the_kernels_do() -> None:
    assert has_bf16_dot_products() == causal_attention.has_bf16_dots_alone()


def small(targets: tuple[str, ...], positions: int, documents: int = 1, **model: object) -> Job:
    cfg = RunConfig.model_validate(
        {
            "model": {"name": "shape:small", "dtype": "bfloat16", **model},
            "lora": {"targets": targets},
            "data": {"max_length": positions // documents},
            "train": {"batch_size": documents},
        }
    )
    return make_job(cfg, read_architecture(cfg.model), None, 1)


def forward(job: Job) -> tuple[torch.nn.Module, dict[str, object]]:
    model = add_adapters(load_model(job.cfg.model), job.cfg.lora, 0)
    model.train()
    positions = torch.arange(job.document).repeat(job.positions // job.document)[None]
    ends = torch.arange(0, job.positions + 1, job.document, dtype=torch.int32)
    inputs = {"position_ids": positions, "cu_seqlens": ends, "use_cache": False}
    return model, {"input_ids": torch.arange(job.positions)[None] % 250, **inputs}


def kept_by_autograd(job: Job) -> int:
    """Bytes of the storages, parameters apart, that forward keeps for backward up to the logits."""
    model, inputs = forward(job)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        output = model.base_model.model.model(**inputs)
    assert output.last_hidden_state.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("targets", "positions", "documents", "dtype"),
    [
        (MLP, 256, 1, "bfloat16"),
        (MLP, 512, 4, "bfloat16"),
        (MLP, 128, 1, "float32"),
        (ALL, 128, 1, "bfloat16"),
        (("q_proj", "v_proj"), 128, 1, "bfloat16"),
        (("o_proj", "down_proj"), 700, 1, "bfloat16"),
    ],
)
@pytest.mark.parametrize("in_c", [False, True], ids=["attention by torch", "attention in C"])
def test_what_autograd_keeps(
    targets: tuple[str, ...],
    positions: int,
    documents: int,
    dtype: str,
    in_c: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # without 16-bit products flash attention keeps its operands in fp32 besides
    monkeypatch.setattr(products, "_has_units", lambda dtype: True)
    choose_attention(in_c, monkeypatch)
    job = small(targets, positions, documents, dtype=dtype)
    assert kept_by_autograd(job) == pytest.approx(plan_memory.activations(job, "cpu"), rel=1e-3)


def test_what_checkpointing_keeps() -> None:
    job = small(MLP, 256, gradient_checkpointing=True)
    rotary = 2 * 2 * 256 * 32  # cos and sin, which the layers' closures hold
    assert kept_by_autograd(job) + rotary == plan_memory.activations(job, "cpu")


def addmm_(_: Any, a: Any, b: Any, *, out_shape: Any = None, **options: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


IN_PLACE: Any = {torch.ops.aten.addmm_: addmm_}  # torch counts the other form only


@pytest.mark.parametrize("targets", [MLP, ALL, ("o_proj",)])
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_that_torch_counts(
    targets: tuple[str, ...], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # products in C are none of torch's operations
    monkeypatch.setattr(skinny_native, "library_for", lambda *_: None)
    monkeypatch.setattr(products, "in_c", lambda *_: False)
    choose_attention(False, monkeypatch)
    job = small(targets, 128, gradient_checkpointing=recompute)
    model, inputs = forward(job)
    labels = torch.zeros(128, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        logits = model(**inputs).logits[0]
        cross_entropy_sum(logits, labels).backward()
    planned = sum(p.flops for p in plan_cost.micro_batch(job, "cpu") if p.name != "loss")
    assert counter.get_total_flops() == planned


# ---- the command ----


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_the_command_prints_a_plan(gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    engine = [f"deepspeed={REPOSITORY}/ds_configs/zero2.json"] if gpus > 1 else []
    options = ["train.accumulation=1", *engine, "--gpus", str(gpus)]
    assert main(["plan", "--config", str(RECIPE), *options]) == 0
    printed = capsys.readouterr().out
    for part in ("6,738,546,688 parameters", "13.48 GB", "24 GB: ", "141 GB: fits", "H100 SXM"):
        assert part in printed, printed
    assert ("sent per device" in printed) == (gpus > 1)


def test_the_command_answers_at_once_and_without_torch() -> None:
    code = (
        "import sys; from flex.commands import main; "
        f"main(['plan', '--config', {str(RECIPE)!r}]); "
        "print('loaded', *sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 10
    assert done.stdout.splitlines()[-1] == "loaded", done.stdout[-200:]


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 768}))
    with pytest.raises(ModelError, match="architecture 'gpt2'"):
        recipe(f"model.name={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(ModelError, match="lacks a usable"):
        recipe(f"model.name={tmp_path}")


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="no ds_config"):
        recipe(world=2)
    with pytest.raises(ConfigError, match="less than 8 processes"):
        recipe(f"deepspeed={REPOSITORY}/ds_configs/zero2.json", world=8)
    with pytest.raises(ConfigError, match="with ZeRO-3"):
        recipe("model.quantise=nf4", f"deepspeed={REPOSITORY}/ds_configs/zero3.json")
    with pytest.raises(ModelError, match="'gate' names no linear"):
        recipe("lora.targets=[gate]")


def test_targets_match_as_peft_matches_them() -> None:
    model = Architecture(8, 16, 2, 2, 1, 4, 32)
    found = model.targets(("mlp.up_proj", "model.layers.1.self_attn.q_proj"))
    assert found == [{"mlp.up_proj"}, {"mlp.up_proj", "self_attn.q_proj"}]


def test_presets_have_the_parameters_that_transformers_builds() -> None:
    for name, fields in (("qwen2", {"tie_word_embeddings": True}), ("llama", {"mlp_bias": True})):
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
        config = AutoConfig.for_model(name, **sizes, **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        expected = sum(p.numel() for p in model.parameters())
        assert architecture_of(name, config.to_dict()).parameters == expected


def test_constants_are_those_of_the_code_that_they_describe() -> None:
    assert plan_memory.LOSS_BLOCK == loss_head.BLOCK_BYTES
    assert (plan_memory.CPU_ROWS, plan_memory.GPU_ROWS) == (loss.ROWS_CPU, loss.ROWS_GPU)


def test_no_more_logits_than_a_block_of_the_loss() -> None:
    cfg = load_config(None, ["model.name=shape:llama3-8b"])
    model = read_architecture(cfg.model)

    def logits(targets: int) -> float:
        parts = plan_memory.memory(make_job(cfg, model, None, 1, 8192, targets), "cuda")
        return next(c.bytes for c in parts if c.name == "logits")

    assert logits(1000) == 2 * 1000 * 128256
    assert 2**28 - 2 * 128256 < logits(8192) <= 2**28
