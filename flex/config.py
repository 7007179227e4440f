"""Every option of a run: strict, frozen models. A field's description is its documentation."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    name: str = Field(
        "smollm2-135m", description="`smollm2-135m`, `shape:<preset>`, a local folder or a Hub id"
    )
    revision: str | None = Field(
        None, description="Hub revision; pin it for a result that others can repeat"
    )
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = Field(
        "bfloat16", description="dtype of the frozen base; float64: as a reference only"
    )
    quantise: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="linear layers of the frozen base but the head, by bitsandbytes: nf4 is 4-bit NormalFloat, "
        "int8 LLM.int8()",
    )
    double_quant: bool = Field(True, description="nf4: quantise the scales of its blocks too")
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto",
        description="auto: variable-length, over packed documents; sdpa, eager: Hugging Face's own",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward to save memory"
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.quantise != "none" and self.dtype == "float64":
            raise ValueError(
                f"quantise={self.quantise} with dtype=float64: bitsandbytes computes in 16 or 32 bits; "
                "set model.dtype=bfloat16 or model.quantise=none"
            )
        return self


class DataConfig(Section):
    name: Literal["builtin", "mbpp", "apps", "codesearchnet", "jsonl"] = Field(
        "builtin", description="builtin: this project's own small task set; jsonl: your file"
    )
    path: str | None = Field(
        None, description="local file in place of the Hub (JSONL; required for `jsonl`)"
    )
    validation_path: str | None = Field(
        None, description="local validation file; otherwise a fixed split of `path`"
    )
    language: Literal["python", "java"] = Field(
        "python", description="solution language (builtin, codesearchnet)"
    )
    difficulty: Literal["introductory", "interview", "competition", "all"] = Field(
        "all", description="apps only"
    )
    template: Literal["paper", "instruct"] = Field(
        "paper", description="how a row becomes prompt + completion"
    )
    loss_on: Literal["completion", "full"] = Field(
        "completion", description="which tokens bear loss"
    )
    max_length: Positive = Field(
        512, description="tokens per example, prompt + completion + EOS; longer are cut"
    )
    batching: Literal["auto", "packed", "grouped"] = Field(
        "auto",
        description="packed: documents in one row, no padding; grouped: similar lengths, padded; "
        "auto: packed",
    )
    limit: Positive | None = Field(None, description="use only the first N training rows")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be used: stop, or count it"
    )


class LoraSection(Section):
    r: Positive = Field(8, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="scale = alpha / r")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.05, description="on the adapters' input, while training"
    )
    targets: tuple[str, ...] = Field(
        ("gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of the linear layers that get an adapter",
    )


PENALTY_PRESETS: dict[str, dict[str, Any]] = {
    "flex": {},
    "paper-literal": {"target": "factors", "norm": "sum", "reduce": "mean", "one_sided": True},
    "repo-compat": {
        "target": "factors",
        "norm": "sum",
        "reduce": "mean",
        "one_sided": True,
        "detached": True,
    },
    "off": {"weight": 0.0},
}


class PenaltyConfig(Section):
    """The spectral penalty. A preset sets the fields that are not given; a given field wins."""

    preset: Literal["flex", "paper-literal", "repo-compat", "off"] = Field(
        "flex", description="sets the fields below that are not given"
    )
    weight: Annotated[float, Field(ge=0)] = Field(
        0.02, description="lambda; 0 is bit-identical to `off`"
    )
    schedule: Literal["linear_ramp", "hard_cutoff", "power", "sigmoid", "uniform", "shuffled"] = (
        Field("linear_ramp", description="rho over frequency; uniform, shuffled: controls")
    )
    phi_low: Fraction = Field(1.0, description="preservation at zero frequency; rho = 1 - phi")
    phi_high: Fraction = Field(0.1, description="preservation from the threshold on")
    threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="T, as a fraction of the bins"
    )
    exponent: Annotated[float, Field(gt=0)] = Field(2.0, description="p of the power schedule")
    sharpness: Annotated[float, Field(gt=0)] = Field(
        20.0, description="slope of the sigmoid schedule"
    )
    shuffle_seed: int = Field(0, description="bin permutation of the shuffled control")
    target: Literal["factors", "factor_updates", "delta_w"] = Field(
        "factor_updates",
        description="factors: A, B; factor_updates: A - A0, B; delta_w: scale * BA - (BA)0",
    )
    transform: Literal["flat", "axis", "fft2"] = Field(
        "flat",
        description="flat: row-major flattening (paper); axis: rows of A, columns of B; fft2: 2-D",
    )
    norm: Literal["sum", "ortho", "mean"] = Field(
        "ortho", description="|fft|^2 as is / by length / by bins"
    )
    reduce: Literal["sum", "mean"] = Field("sum", description="over tensors")
    one_sided: bool = Field(
        False, description="true: one-sided bins counted once (paper); false: exact Parseval"
    )
    coupling: Literal["gradient", "decoupled"] = Field(
        "gradient",
        description="into the gradient, or p -= lr * lambda * grad outside the optimizer's scaling",
    )
    detached: bool = Field(
        False, description="repo-compat: value only, no gradient; inert by construction"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, dict):
            preset = PENALTY_PRESETS.get(str(data.get("preset", "flex")), {})
            if data.get("preset") == "off" and data.get("weight", 0.0) != 0.0:
                raise ValueError(
                    "preset `off` with a weight above 0; choose preset `flex` or drop `weight`"
                )
            return {**preset, **data}
        return data

    @property
    def active(self) -> bool:
        return self.weight > 0.0

    @property
    def in_gradient(self) -> bool:
        """Whether the optimizer sees the penalty's gradient."""
        return self.active and self.coupling == "gradient" and not self.detached


# Learning rate and betas when the user gives none. AdamW: as published. Sophia: 3e-4 because a
# step is at most the rate, where AdamW's may exceed it; momentum 0.9 because 0.965 averages over
# more steps than a short fine-tune has.
OPTIMIZER_DEFAULTS: dict[str, tuple[float, tuple[float, float]]] = {
    "adamw": (2e-4, (0.9, 0.999)),
    "adamw8bit": (2e-4, (0.9, 0.999)),
    "sophia": (3e-4, (0.9, 0.95)),
    "lion": (5e-5, (0.9, 0.99)),
    "signum": (5e-5, (0.9, 0.0)),
}


# Sophia's gamma when the user gives none, chosen so that a part of the coordinates is clipped and a
# part is not. SmolLM2-135M, rank 8, 1,100 target tokens a step: the default penalty's constant
# curvature is 0.027 and gamma 0.002 clips 15-32 %; alone the likelihood's is 1e-5 on average and
# gamma 5 clips 46-87 %. The paper's 0.05 would clip none in the first case and all in the second.
GAMMA_WITH_PENALTY, GAMMA_ALONE = 0.002, 5.0


class CurvatureConfig(Section):
    """Refresh of Sophia's curvature by the Gauss-Newton-Bartlett estimator."""

    every: Positive = Field(
        10, description="optimizer steps between refreshes; one precedes the first update"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(
        0, description="refresh at each of the first N steps"
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of a step's examples that a refresh uses"
    )
    gamma: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="update = m / max(gamma * h, eps), clipped to 1; choose it by the log's "
        "`clipped`; none: 0.002 with a penalty in the gradient, 5 without",
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-12, description="floor of gamma * h")

    def share_of(self, count: int) -> int:
        """`share` of a step's `count` examples or micro-batches, rounded up."""
        return math.ceil(round(self.share * count, 9))


class OptimConfig(Section):
    name: Literal["sophia", "adamw", "adamw8bit", "lion", "signum"] = Field(
        "sophia", description="lion, signum: controls without curvature"
    )
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak rate; none: the optimizer's default"
    )
    lr_ratio_b: Annotated[float, Field(gt=0)] = Field(
        1.0, description="B's rate as a multiple of A's; above 1: LoRA+ (arXiv 2402.12354)"
    )
    betas: tuple[Beta, Beta] | None = Field(
        None, description="decay of the momentum and of the second state; none: the optimizer's"
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW only")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="decoupled")
    clip_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="global gradient norm; 0 turns it off"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    warmup: Fraction = Field(0.1, description="share of the steps")
    min_lr_ratio: Fraction = Field(
        0.05, description="final rate as a share of the peak (cosine, linear)"
    )
    curvature: CurvatureConfig = CurvatureConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict):
            lr, betas = OPTIMIZER_DEFAULTS.get(str(data.get("name", "sophia")), (None, None))
            data = {k: v for k, v in data.items() if not (k in ("lr", "betas") and v is None)}
            return {"lr": lr, "betas": betas, **data}
        return data


class TrainSection(Section):
    steps: Positive | None = Field(None, description="optimizer steps; none: from `epochs`")
    epochs: Annotated[float, Field(gt=0)] = Field(3.0, description="passes over the training rows")
    batch_size: Positive = Field(16, description="examples per optimizer step over all processes")
    accumulation: Positive = Field(
        1, description="micro-batches per process and step; changes memory, not the maths"
    )
    eval_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between validations; 0: start and end only"
    )
    eval_batch_size: Positive = Field(16, description="examples per validation batch and process")
    save_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between checkpoints; 0: at the end only"
    )
    keep: Positive = Field(2, description="checkpoints kept")
    log_every: Positive = Field(1, description="steps between log lines")
    warm_up_longest: Literal["auto", "always", "never"] = Field(
        "auto",
        description="run the largest micro-batch before the first step, to no effect but that a "
        "lack of memory shows at once; auto: on GPUs",
    )
    sample_prompt: bool = Field(True, description="print a sample completion before and after")


class EvalSection(Section):
    """Pass@1 of a few tasks while training: a look, not a result (that is `python -m flex eval`)."""

    every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between looks, one more at the end; 0: never"
    )
    benchmark: str = Field(
        "builtin-python-validation", description="as `python -m flex eval --benchmark`"
    )
    path: str | None = Field(
        None, description="local file of the benchmark; none: the Hub, or the package"
    )
    limit: Positive = Field(24, description="its first N tasks")
    max_new_tokens: Positive = Field(256, description="of each completion")


class KernelsConfig(Section):
    impl: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="which implementation computes LoRA, penalty and Sophia: auto: Triton on GPUs, "
        "torch on CPUs and for the penalty",
    )


class ProfileConfig(Section):
    """Named ranges around phases and kernels of a few steps: a table and a trace."""

    tool: Literal["none", "torch", "proton", "nvtx"] = Field(
        "none",
        description="torch: torch.profiler; proton: Triton's profiler (GPU); nvtx: marks for nsys "
        "(NVIDIA GPU)",
    )
    steps: str = Field(
        "5-8", description="the steps to profile, first and last as the log numbers them, or one"
    )

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, text: str) -> str:
        found = re.fullmatch(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", text, re.ASCII)
        if found is None:
            raise ValueError("must be a step or FIRST-LAST, such as 5-8; the first step is 1")
        if int(found[2] or found[1]) < int(found[1]):
            raise ValueError("must not end before it begins")
        return text

    @property
    def first(self) -> int:
        return int(self.steps.partition("-")[0])

    @property
    def last(self) -> int:
        return int(self.steps.rpartition("-")[2])


class RunConfig(Section):
    """A whole run. `python -m flex config show` prints it resolved."""

    name: str = Field("flex", pattern=r"^[A-Za-z0-9._-]+$", description="run folder below `dir`")
    dir: str = Field("runs", description="where run folders live")
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="of the data order, adapters, dropout and label sampling"
    )
    deepspeed: str | None = Field(
        None, description="a file of ds_configs/; none: plain PyTorch in one process"
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue the run folder's last checkpoint"
    )
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="trackers beside metrics.jsonl; each must be installed"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraSection = LoraSection()
    penalty: PenaltyConfig = PenaltyConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    kernels: KernelsConfig = KernelsConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_gamma(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        penalty, optim = data.get("penalty", {}), data.get("optim", {})
        if isinstance(penalty, dict):
            try:
                penalty = PenaltyConfig.model_validate(penalty)
            except ValidationError:
                return data  # told with all other errors
        optim = optim.model_dump() if isinstance(optim, OptimConfig) else optim
        curvature = optim.get("curvature", {}) if isinstance(optim, dict) else None
        if not isinstance(curvature, dict) or curvature.get("gamma") is not None:
            return data
        gamma = GAMMA_WITH_PENALTY if penalty.in_gradient else GAMMA_ALONE
        return {**data, "optim": {**optim, "curvature": {**curvature, "gamma": gamma}}}

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if (
            self.optim.name == "sophia"
            and self.penalty.target == "delta_w"
            and self.penalty.in_gradient
        ):
            raise ValueError(
                "penalty.target=delta_w has no constant curvature for Sophia; "
                "set penalty.coupling=decoupled"
            )
        if self.data.name == "jsonl" and self.data.path is None:
            raise ValueError("data.name=jsonl needs data.path=FILE.jsonl")
        return self
