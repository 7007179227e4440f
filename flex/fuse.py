"""The fused LoRA layer for a PEFT model that was made elsewhere: in your own loop, in the Hugging
Face Trainer, from a saved adapter.

    report = flex.fuse_adapters(peft_model)
    print(report)  # which layers take which path, and why not where not
    ...            # train, save_pretrained, merge: as before
    flex.unfuse_adapters(peft_model)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast
from weakref import WeakKeyDictionary

import flex.model  # noqa: F401  # isort: skip  # before PEFT: it keeps code from the Hub out
from peft.tuners.lora.layer import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flex.errors import ModelError
from flex.kernels.runtime import IMPLS, choose_impl, require_one_of
from flex.model.adapters import FusedLora, fused_class, never_fused, why_not_fused


@dataclass(frozen=True)
class LayerPath:
    """One LoRA layer: its name in the model, what computes its forward now, and why not ours."""

    name: str
    path: Literal["fused", "peft"]
    reason: str = ""  # empty where fused


@dataclass(frozen=True)
class FuseReport:
    """Every LoRA layer of a model, in the order of its modules. `str` and rich print it, with the
    layers that differ in a number only in one line."""

    rows: tuple[LayerPath, ...]
    impl: str  # what computes the fused layers: "torch", "triton"

    @property
    def fused(self) -> int:
        """Number of layers that our kernel computes."""
        return sum(row.path == "fused" for row in self.rows)

    @property
    def title(self) -> str:
        return f"{self.fused} of {len(self.rows)} LoRA layers are fused ({self.impl})"

    def __rich__(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        for header in ("layers", "", "path", "why not fused"):
            table.add_column(header, justify="right" if not header else "left", overflow="fold")
        lines: Counter[tuple[str, str, str]] = Counter()
        for row in self.rows:
            lines[re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name), row.path, row.reason] += 1
        for (name, path, reason), count in lines.items():
            table.add_row(name, f"x {count}", path, reason)
        return table

    def __str__(self) -> str:
        console = Console(width=200, color_system=None, markup=False, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


# Fused layer -> PEFT's own object that it stands for. Not an attribute of the layer: a cycle would
# keep a deleted model's memory, and a copy of the model would copy half of it.
_ORIGINALS: WeakKeyDictionary[FusedLora, LoraLayer] = WeakKeyDictionary()


def fuse_adapters(
    model: nn.Module, impl: Literal["auto", "torch", "triton"] = "auto"
) -> FuseReport:
    """Compute the LoRA layers of a PEFT model by the fused kernel: forward, backward, dropout.

    Each of PEFT's LoRA layers over a plain nn.Linear, or over bitsandbytes' 4 or 8 bits, gives its
    place in its parent to one of our subclasses that shares its whole state: the same Parameter
    objects, sub-modules, settings, hooks and training flag. So optimizers, state dicts, names, saved files,
    `set_adapter`, `merge_and_unload` and gradient checkpointing stay PEFT's, before or after. No
    class is patched.

    Call it after the model is made or loaded, before `torch.compile` and before an engine such as
    DeepSpeed or FSDP wraps the model. To call it again is harmless, and after a change (another
    active adapter, say) gives the table of the new state: a layer whose reason can pass, such as
    "the adapters are merged", looks at its state at each call, and the others are not replaced.

    Results are PEFT's but for rounding. Dropout draws other masks than nn.Dropout would, at the
    same rate, repeated exactly by activation checkpointing. Forward hooks on a LoRA layer fire as
    before; a layer with hooks on its `base_layer`, `lora_A`, `lora_B` or `lora_dropout` takes
    PEFT's path.

    Args:
        model: a PeftModel, or any module that holds LoRA layers; changed in place.
        impl: "torch", "triton", or "auto": Triton on GPUs, torch on CPUs. Set anew by each call,
            also on the layers that are fused already.

    Returns: the table of all LoRA layers. Calls whose input the kernel does not cover (another
        dtype than the weight's, say) go to PEFT's forward all the same: logged once a reason and
        counted in `flex.model.adapters.FALLBACKS`.

    Raises:
        ModelError: the model holds no LoRA layer, or is one itself and has no parent.
        ValueError: impl is not one of the three.
        NotImplementedError: impl="triton" where Triton cannot run. The model is as it was.
    """
    require_one_of("impl", impl, IMPLS)
    layers = _lora_layers(model)
    _check(model, layers)
    candidates = [layer for layer in layers.values() if _why_not_replaced(layer) is None]
    devices = {cast(Tensor, layer.base_layer.weight).device: None for layer in candidates}
    chosen = dict.fromkeys(choose_impl("lora_linear", impl, device) for device in devices)
    fused = {id(layer): _fused_twin(layer) for layer in candidates}
    _replace(model, fused)
    for twin in fused.values():
        twin.flex_impl = impl
        twin.adopt()
    rows = []
    for name, layer in layers.items():
        reason = _why_not_replaced(layer) or why_not_fused(layer)
        rows.append(LayerPath(name, "fused" if reason is None else "peft", reason or ""))
    return FuseReport(tuple(rows), ", ".join(chosen) or impl)


def unfuse_adapters(model: nn.Module) -> int:
    """Give all LoRA layers back to PEFT: outputs are PEFT's to the bit.

    Layers that `fuse_adapters` replaced become the very objects they were, in their present state:
    what has been trained or set in between stays. Fused layers that have no such original (Flex
    made them so itself, or the model is a copy of a fused one) become new PEFT layers that share
    their state.

    Returns: the number of layers given back; 0 when none was fused.

    Raises:
        ModelError: the model holds no LoRA layer, or is one itself and has no parent.
    """
    layers = _lora_layers(model)
    _check(model, layers)
    stock = {
        id(layer): _stock_twin(layer) for layer in layers.values() if isinstance(layer, FusedLora)
    }
    _replace(model, stock)
    return len(stock)


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def _check(model: nn.Module, layers: dict[str, LoraLayer]) -> None:
    if not layers:
        raise ModelError(
            f"this {type(model).__name__} holds no LoRA layer",
            "only PEFT's LoRA layers can be fused",
            "make them first, with peft.get_peft_model or PeftModel.from_pretrained",
        )
    if isinstance(model, LoraLayer):
        raise ModelError(
            f"this {type(model).__name__} is a LoRA layer itself",
            "a layer is replaced in its parent, which is not at hand",
            "pass the model that holds it",
        )


def _why_not_replaced(layer: LoraLayer) -> str | None:
    """Why `layer` keeps its place: the kernel can never compute it, or a twin would not act alike."""
    if isinstance(layer, FusedLora):
        return never_fused(layer)
    if "forward" in vars(layer):
        return "its forward is replaced (by accelerate's hooks, say)"
    if getattr(layer, "_compiled_call_impl", None) is not None:
        return "it is compiled by itself: fuse first"
    return never_fused(layer)


def _fused_twin(layer: LoraLayer) -> FusedLora:
    if isinstance(layer, FusedLora):
        return layer
    kind = fused_class(type(layer))
    assert kind is not None  # never_fused said so
    twin = cast(FusedLora, _twin(kind, layer))
    _ORIGINALS[twin] = layer
    return twin


def _stock_twin(layer: FusedLora) -> LoraLayer:
    layer.release()
    layer.__dict__.pop("flex_impl", None)
    return _ORIGINALS.pop(layer, None) or _twin(layer.stock, layer)


def _twin(kind: type[LoraLayer], layer: LoraLayer) -> LoraLayer:
    """An object of `kind` with the very same attribute dictionary: what one is told, both know."""
    twin: LoraLayer = kind.__new__(kind)
    object.__setattr__(twin, "__dict__", layer.__dict__)
    return twin


def _replace(model: nn.Module, twins: Mapping[int, LoraLayer]) -> None:
    """Put twins in the place of the modules with these ids, in every parent and under every name."""
    for parent, name, child in list(_children(model)):
        twin = twins.get(id(child))
        if twin is not None and twin is not child:
            parent._modules[name] = cast(nn.Module, twin)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child
