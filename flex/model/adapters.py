"""PEFT's LoRA adapters, computed by our kernel. PEFT owns the settings, names, files and merge."""

from __future__ import annotations

import difflib
import logging
import sys
from collections import Counter
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from flex.config import LoraSection
from flex.errors import ModelError
from flex.kernels.lora_linear import lora_linear
from flex.kernels.runtime import DTYPES
from flex.model.dropout_keys import current, key_of

log = logging.getLogger("flex.adapters")

SEEDS = 2**63 - 1  # torch.randint's largest upper bound
FALLBACKS: Counter[str] = Counter()  # forward calls that PEFT's own layer computed, by reason
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# In the module or class name of quantised linear layers: a word more in the reason, no decision.
_QUANTISED = ("bitsandbytes", "4bit", "8bit", "quant", "gptq", "awq", "hqq", "eetq", "aqlm")


class FusedLora(nn.Module, LoraLayer):
    """PEFT's LoRA layer, of whatever base layer, whose forward is one call of `lora_linear`.

    x (..., K) -> y (..., N). What the kernel does not cover goes to PEFT's own forward: the reason
    is logged when it first appears and counted in `FALLBACKS`.

    The sub-modules `base_layer`, `lora_A`, `lora_B`, `lora_dropout` are read, not called; where one
    of them has hooks, PEFT's own forward calls it. `flex_impl` is the kernel's `impl`, `flex_key` the layer's own for
    its dropout masks (`dropout_keys`); without, they are drawn from torch's generator.
    """

    flex_impl = "auto"
    flex_key: int | None = None
    stock: ClassVar[type[LoraLayer]]  # the class of PEFT that this one stands for
    bases: ClassVar[tuple[type[nn.Module], ...]]  # the classes of base layers that it reads

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = why_not_fused(self) or _why_not_this_call(self, x, args, kwargs)
        if reason is not None:
            if reason not in FALLBACKS:
                log.warning(
                    "PEFT's own forward computes LoRA layers: %s (counted in FALLBACKS)", reason
                )
            FALLBACKS[reason] += 1
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        name = self.active_adapters[0]
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        seed, row_ids = self.mask_key(x) if p > 0 else (None, None)
        a, b = _factors(self, name)
        weight, bias = self.frozen()
        dtype = x.dtype
        factors = (a, b, self.scaling[name], p, seed, self.flex_impl)
        y = lora_linear(self.cast(x), weight, bias, *factors, row_ids=row_ids)
        return y if y.dtype == dtype else y.to(dtype)

    def mask_key(self, x: Tensor) -> tuple[int, Tensor | None]:
        """The seed of x's dropout mask, and the ids of x's rows where they have some."""
        keys = None if torch.compiler.is_compiling() else current()
        # rows that are no longer the batch's tokens, such as those routed to an expert, have no ids
        if keys is None or self.flex_key is None or len(keys.row_ids) != x.shape[:-1].numel():
            # From torch's CPU generator: activation checkpointing restores it, so the mask recurs.
            return int(torch.randint(SEEDS, (), device="cpu")), None
        return keys.seed(self.flex_key), keys.row_ids.to(x.device)

    def frozen(self) -> tuple[Any, Tensor | None]:
        """W and the bias as `lora_linear` takes them."""
        base = cast(nn.Linear, self.base_layer)
        return base.weight, base.bias

    def cast(self, x: Tensor) -> Tensor:
        """x in the dtype that the base layer computes in."""
        return x

    def computes_in(self, x: Tensor) -> torch.dtype:
        """The dtype that the base layer computes in, given x."""
        raise NotImplementedError

    def why_not_dtype(self, x: Tensor) -> str | None:
        """Why x's dtype is not covered; None if it is."""
        raise NotImplementedError

    def adopt(self) -> None:
        """Called when the layer takes its place in a model."""

    def release(self) -> None:
        """Called when PEFT's own layer takes the place back."""

    @staticmethod
    def never(base: Any) -> str | None:
        """Why the kernel can never compute over this base layer, one of `bases`."""
        return None

    @staticmethod
    def not_now(base: Any) -> str | None:
        """Why it cannot in the base layer's present state."""
        return None


class FlexLoraLinear(FusedLora, Linear):
    """`FusedLora` over a plain nn.Linear; x has the base weight's dtype."""

    stock = Linear
    bases = (nn.Linear,)

    def computes_in(self, x: Tensor) -> torch.dtype:
        return cast(Tensor, self.base_layer.weight).dtype

    def why_not_dtype(self, x: Tensor) -> str | None:
        dtype = self.computes_in(x)
        return None if x.dtype == dtype else f"the input is {x.dtype}, the base weight {dtype}"

    @staticmethod
    def never(base: Any) -> str | None:
        weight = base.weight
        # torchao, tensor parallelism
        if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
            return f"the base weight is a {type(weight).__name__}"
        if weight.dtype not in DTYPES:
            return f"the base weight is {weight.dtype}"
        return None


def fused_class(kind: type[LoraLayer]) -> type[FusedLora] | None:
    """The class of ours that computes PEFT's layers of class `kind`; None if there is none."""
    if FusedLora in kind.__mro__:  # PEFT's are abstract classes, whose issubclass is slow
        return cast(type[FusedLora], kind)
    if kind is Linear:
        return FlexLoraLinear
    if kind.__module__ == "peft.tuners.lora.bnb":  # then bitsandbytes is there
        from flex.model.adapters_quantised import FUSED

        return FUSED.get(kind)
    return None


def never_fused(layer: LoraLayer) -> str | None:
    """Why the kernel can never compute `layer`, whatever state it gets into; None if it can."""
    base = cast(nn.Module, layer).__dict__["_modules"]["base_layer"]
    base_kind = type(base)
    fused = fused_class(type(layer))
    if fused is None:
        quantised = f"{base_kind.__module__} {base_kind.__name__}".lower()
        note = ", quantised" if any(word in quantised for word in _QUANTISED) else ""
        return f"it is PEFT's {type(layer).__name__} over a {base_kind.__name__}{note}"
    if base_kind not in fused.bases:
        return f"the base layer is a {base_kind.__name__}"
    return fused.never(base)


def why_not_fused(layer: LoraLayer) -> str | None:
    """Why PEFT's own forward computes `layer` in its present state; None if the kernel does.

    Asked at every call, so sub-modules are read from their dictionaries: 4 us, where it takes 10
    with nn.Module's own attribute access (one core of a Zen 4).
    """
    if (reason := never_fused(layer)) is not None:
        return reason
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return "the adapters are merged"
    names = layer.active_adapters
    modules = cast(nn.Module, layer).__dict__["_modules"]
    a = modules["lora_A"]._modules.get(names[0]) if len(names) == 1 else None
    if a is None:
        return "not exactly one adapter is active"
    name = names[0]
    if name in layer.lora_variant:
        return "the adapter is a LoRA variant (DoRA or the like)"
    if layer.lora_bias[name]:
        return "lora_B has a bias"
    base = modules["base_layer"]
    kind = fused_class(type(layer))
    if kind is not None and (reason := kind.not_now(base)) is not None:
        return reason
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "the base layer is trainable"
    b, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"lora_A is a {type(a).__name__}, lora_B a {type(b).__name__}"
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"lora_dropout is a {type(dropout).__name__}"
    if _does_more(base) or _does_more(a) or _does_more(b) or _does_more(dropout):
        return "a sub-module has hooks or a forward of its own"
    return None


def _does_more(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class says, so that reading it is not enough."""
    own = module.__dict__
    if "forward" in own:  # accelerate's hooks
        return True
    for kind in _HOOKS:
        # ZeRO-3 gathers what is read outside its module too
        if own[kind] and not all(
            getattr(hook, "__module__", "").startswith("deepspeed") for hook in own[kind].values()
        ):
            return True
    return False


def _why_not_this_call(
    layer: FusedLora, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    if args or any(value is not None for value in kwargs.values()):
        return "the call has further arguments"
    if (reason := layer.why_not_dtype(x)) is not None:
        return reason
    if torch.is_autocast_enabled(x.device.type):
        wanted, dtype = torch.get_autocast_dtype(x.device.type), layer.computes_in(x)
        # autocast leaves fp64 alone
        if wanted != dtype and dtype != torch.float64:
            return f"autocast computes in {wanted}, the base weight is {dtype}"
    return None


def add_adapters(
    model: PreTrainedModel, cfg: LoraSection, seed: int, impl: str = "auto"
) -> PeftModel:
    """Freeze `model` and put a LoRA adapter, "default", on every linear layer in `cfg.targets`.

    Args:
        model: the base, in any float dtype or with bitsandbytes' 4- or 8-bit layers, which are
            dequantised for each product; its modules are replaced in place.
        cfg: rank, alpha, dropout, targets (the last part of a module's name, or more of its parts).
        seed: decides A (uniform within 1/sqrt(K), PEFT's default) and nothing else; B is zero.
            torch's generator is left as it was.
        impl: which implementation of the kernel computes them: "auto", "torch" or "triton".

    Returns: a PeftModel; only its adapters, fp32, require a gradient.

    Raises:
        ModelError: a target names nothing, or something that is neither a plain nn.Linear nor
            bitsandbytes'.
    """
    _check_targets(model, cfg.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.r,
        lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # PEFT says int, and divides
        lora_dropout=cfg.dropout,
        target_modules=list(cfg.targets),
    )
    config._register_custom_module(_classes())
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        peft_model = get_peft_model(model, config)
    for name, layer in peft_model.named_modules():
        if isinstance(layer, FusedLora):
            layer.flex_impl, layer.flex_key = impl, key_of(name)
    if "bitsandbytes" in sys.modules:
        from flex.model.adapters_quantised import keep_layout

        keep_layout(peft_model)  # of the layers without an adapter too
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


def _classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Base layer -> our layer, derived classes first: PEFT takes the first that fits."""
    fused: list[type[FusedLora]] = [FlexLoraLinear]
    if "bitsandbytes" in sys.modules:
        from flex.model.adapters_quantised import FUSED

        fused = [*FUSED.values(), *fused]
    return {base: kind for kind in fused for base in kind.bases}


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    modules = dict(model.named_modules())
    kinds = _classes()
    linear = sorted({n.rpartition(".")[2] for n, m in modules.items() if type(m) in kinds})
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
            if type(module) not in kinds:
                raise ModelError(
                    f"lora.targets: {target!r} names {name}, a {type(module).__name__}",
                    "adapters go on plain nn.Linear layers and bitsandbytes' only",
                    f"choose among {', '.join(linear)}",
                )
            if module.weight is embedding:
                raise ModelError(
                    f"lora.targets: {target!r} shares its weight with the input embedding",
                    "merging the adapter would change the embedding too",
                    f"leave {target!r} out of lora.targets",
                )
