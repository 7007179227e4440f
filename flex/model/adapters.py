"""PEFT's LoRA adapters, computed by our kernel. PEFT owns the settings, names, files and merge."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from flex.config import LoraSection
from flex.errors import ModelError
from flex.kernels.lora_linear import lora_linear

log = logging.getLogger("flex.adapters")

SEEDS = 2**63 - 1  # torch.randint's largest upper bound
FALLBACKS: Counter[str] = Counter()  # forward calls that PEFT's own layer computed, by reason


class FlexLoraLinear(Linear):
    """PEFT's LoRA layer over nn.Linear whose forward is one call of `lora_linear`.

    x (..., K) of the base weight's dtype -> y (..., N). What the kernel does not cover goes to
    PEFT's own forward: the reason is logged when it first appears and counted in `FALLBACKS`.

    The sub-modules `base_layer`, `lora_A`, `lora_B` are read, not called, so forward hooks on them
    do not fire.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = self._why_not_fused(x, args, kwargs)
        if reason is not None:
            if reason not in FALLBACKS:
                log.warning(
                    "PEFT's own forward computes LoRA layers: %s (counted in FALLBACKS)", reason
                )
            FALLBACKS[reason] += 1
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        base, dropout = cast(nn.Linear, self.base_layer), self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        # From torch's CPU generator: activation checkpointing restores it, so the mask recurs.
        seed = int(torch.randint(SEEDS, (), device="cpu")) if p > 0 else None
        a, b = _factors(self, name)
        return lora_linear(x, base.weight, base.bias, a, b, self.scaling[name], p, seed)

    def _why_not_fused(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        if self.disable_adapters:
            return "the adapters are disabled"
        if self.merged:
            return "the adapters are merged"
        if args or any(value is not None for value in kwargs.values()):
            return "the call has further arguments"
        names = self.active_adapters
        if len(names) != 1 or names[0] not in self.lora_A:
            return "not exactly one adapter is active"
        if names[0] in self.lora_variant:
            return "the adapter is a LoRA variant (DoRA or the like)"
        if self.lora_bias[names[0]]:
            return "lora_B has a bias"
        if type(self.base_layer) is not nn.Linear:
            return f"the base layer is a {type(self.base_layer).__name__}"
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return "the base layer is trainable"
        if x.dtype != weight.dtype:
            return f"the input is {x.dtype}, the base weight {weight.dtype}"
        return None


def add_adapters(model: PreTrainedModel, cfg: LoraSection, seed: int) -> PeftModel:
    """Freeze `model` and put a LoRA adapter, "default", on every linear layer in `cfg.targets`.

    Args:
        model: the base, any float dtype; its modules are replaced in place.
        cfg: rank, alpha, dropout, targets (the last part of a module's name, or more of its parts).
        seed: decides A (uniform within 1/sqrt(K), PEFT's default) and nothing else; B is zero.
            torch's generator is left as it was.

    Returns: a PeftModel; only its adapters, fp32, require a gradient.

    Raises:
        ModelError: a target names nothing, or something that is not a plain nn.Linear.
    """
    _check_targets(model, cfg.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.r,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # PEFT says int, and divides
        lora_dropout=cfg.dropout,
        target_modules=list(cfg.targets),
    )
    config._register_custom_module({nn.Linear: FlexLoraLinear})
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    adapters = adapter_parameters(peft_model)
    for parameter in adapters.values():
        parameter.data = parameter.data.float()  # PEFT widens 16-bit adapters only
    log.info(
        "%d LoRA adapters of rank %d, scale %g: %d trainable parameters",
        len(adapters) // 2,
        cfg.r,
        cfg.alpha / cfg.r,
        sum(parameter.numel() for parameter in adapters.values()),
    )
    return peft_model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable A and B of all LoRA layers by full parameter name, in the order of names."""
    found = {
        n: p
        for n, p in model.named_parameters()
        if p.requires_grad and (".lora_A." in n or ".lora_B." in n)
    }
    return dict(sorted(found.items()))


def factor_pairs(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter, float]]:
    """(module name, A (r, d_in), B (d_out, r), scale) of every active adapter, ordered by name."""
    return sorted(
        (
            (name, *_factors(module, adapter), module.scaling[adapter])
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
            for adapter in module.active_adapters
            if adapter in module.lora_A
        ),
        key=lambda pair: pair[0],
    )


def _factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B, the Parameter objects themselves (ZeRO-3 gathers behind them)."""
    a, b = cast(nn.Linear, layer.lora_A[adapter]), cast(nn.Linear, layer.lora_B[adapter])
    return cast(nn.Parameter, a.weight), cast(nn.Parameter, b.weight)


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    modules = dict(model.named_modules())
    linear = sorted({n.rpartition(".")[2] for n, m in modules.items() if type(m) is nn.Linear})
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    for target in targets:
        matches = {n: m for n, m in modules.items() if n == target or n.endswith(f".{target}")}
        if not matches:
            near = difflib.get_close_matches(target, linear, n=1, cutoff=0.0)
            raise ModelError(
                f"lora.targets: {target!r} names no module of this model",
                f"its linear layers are {', '.join(linear)}",
                f"did you mean {near[0]!r}?" if near else "choose another model",
            )
        for name, module in matches.items():
            if type(module) is not nn.Linear:
                raise ModelError(
                    f"lora.targets: {target!r} names {name}, a {type(module).__name__}",
                    "adapters go on plain nn.Linear layers only",
                    f"choose among {', '.join(linear)}",
                )
            if module.weight is embedding:
                raise ModelError(
                    f"lora.targets: {target!r} shares its weight with the input embedding",
                    "merging the adapter would change the embedding too",
                    f"leave {target!r} out of lora.targets",
                )
