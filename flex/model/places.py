"""What becomes of a weight that was read: kept as it is, quantised, or cut into ZeRO-3's partitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flex.errors import ModelError
from flex.model.tensors import Source

_BLOCK = 64  # elements that share a scale
_PIECE = 1_048_576  # elements quantised at once: whole blocks


class Place:
    """Whole weights in the model's dtype on one device."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def prepare(self, model: PreTrainedModel) -> None:
        """Replace modules of a model that has no memory yet (device meta)."""

    def put(self, module: nn.Module, name: str, source: Source, dtype: torch.dtype) -> None:
        """Give `module` its parameter or buffer `name`."""
        self._set(module, name, self._read(source, dtype))

    def _read(self, source: Source, dtype: torch.dtype) -> Tensor:
        value = torch.empty(source.shape, dtype=dtype, device=self.device)
        source.read_into(value.view(-1))
        return value

    def _set(self, module: nn.Module, name: str, value: Tensor) -> None:
        if name in module._buffers:
            module._buffers[name] = value
        else:
            setattr(module, name, nn.Parameter(value, requires_grad=False))


class Quantised(Place):
    """Linear layers but the output head in bitsandbytes' blocks, quantised one by one; the rest whole.

    Args:
        device: a CPU or a GPU.
        kind: "nf4": 4-bit NormalFloat, blocks of 64; "int8": LLM.int8(), one scale a row.
        double_quant: nf4: quantise the blocks' scales too.
        dtype: the matrices are dequantised to it in every product.
    """

    def __init__(
        self,
        device: torch.device | str,
        kind: Literal["nf4", "int8"],
        double_quant: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(device)
        self.kind, self.double_quant, self.dtype = kind, double_quant, dtype
        try:
            import bitsandbytes
        except ImportError as error:
            raise ModelError(
                f"model.quantise={kind} needs bitsandbytes, which cannot be imported: {error}",
                "it holds the quantised weights and computes with them",
                "pip install bitsandbytes, or set model.quantise=none",
            ) from error
        self.nn: Any = bitsandbytes.nn
        self.functional: Any = bitsandbytes.functional

    def prepare(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        linear = [
            name for name, m in model.named_modules() if type(m) is nn.Linear and m is not head
        ]
        if not linear:
            raise ModelError(
                f"model.quantise={self.kind}: {type(model).__name__} has no linear layers",
                "only those are quantised: nothing would be gained",
                "set model.quantise=none",
            )
        for name in linear:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, self.layer(model.get_submodule(name)))
        # What PEFT asks to choose its layers.
        setattr(model, "is_loaded_in_4bit" if self.kind == "nf4" else "is_loaded_in_8bit", True)

    def layer(self, old: nn.Module) -> nn.Module:
        """bitsandbytes' layer, still without memory, for the place of a linear one."""
        assert isinstance(old, nn.Linear)
        shape = (old.in_features, old.out_features)
        options: dict[str, Any] = {"bias": old.bias is not None, "device": "meta"}
        if self.kind == "int8":
            layer = self.nn.Linear8bitLt(*shape, has_fp16_weights=False, **options)
        else:
            layer = self.nn.Linear4bit(
                *shape,
                compute_dtype=self.dtype,
                compress_statistics=self.double_quant,
                quant_type="nf4",
                **options,
            )
        return layer

    def put(self, module: nn.Module, name: str, source: Source, dtype: torch.dtype) -> None:
        if name != "weight" or not isinstance(module, (self.nn.Linear4bit, self.nn.Linear8bitLt)):
            super().put(module, name, source, dtype)
            return
        if self.kind == "int8":
            value = Place("cpu")._read(source, dtype)  # quantises on its way from the CPU
            weight = self.nn.Int8Params(value, requires_grad=False, has_fp16_weights=False)
            module.weight = weight.to(self.device)
            return
        self.hold(module, *self._blocks(source, dtype))

    def hold(self, module: nn.Module, blocks: Tensor, state: Any) -> None:
        """Give a 4-bit layer its weight, quantised as bitsandbytes has it: packed codes and a QuantState."""
        module.quant_state = state
        module.weight = self.nn.Params4bit(
            blocks,
            requires_grad=False,
            quant_state=state,
            compress_statistics=self.double_quant,
            quant_type="nf4",
            module=module,
            bnb_quantized=True,
        )

    def _blocks(self, source: Source, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """What bitsandbytes makes of the whole weight, piece by piece: on a CPU its quantiser takes 20 bytes an
        element beside the weight. Only the scales of all blocks are quantised together."""
        count, blocks = source.numel, -(-source.numel // _BLOCK)
        # Made before the pieces: what stays does not lie between what goes, which would hold the heap open.
        packed = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=self.device)
        absmax = torch.empty(blocks, device=self.device)
        offset = nested = code = None
        for start in range(0, count, _PIECE):
            piece = torch.empty(min(_PIECE, count - start), dtype=dtype, device=self.device)
            source.read_into(piece, start)
            part, state = self.functional.quantize_4bit(piece, blocksize=_BLOCK, quant_type="nf4")
            packed[start // 2 : start // 2 + len(part)] = part
            first = start // _BLOCK
            absmax[first : first + len(state.absmax)] = state.absmax
            code = state.code
        if self.double_quant:
            offset = absmax.mean()
            absmax, nested = self.functional.quantize_blockwise(absmax - offset, blocksize=256)
        whole = self.functional.QuantState(
            absmax=absmax,
            shape=torch.Size(source.shape),
            dtype=dtype,
            blocksize=_BLOCK,
            code=code,
            quant_type="nf4",
            offset=offset,
            state2=nested,
        )
        return packed, whole


class Partitioned(Place):
    """ZeRO-3's partitions: of every weight, each process reads and keeps its own part.

    Args:
        device: where this process computes.
        ds_config: DeepSpeed's configuration, stage 3; its process group must have started.
    """

    def __init__(self, device: torch.device | str, ds_config: Mapping[str, Any]) -> None:
        super().__init__(device)
        import deepspeed

        # Given a module, Init also swaps in the linear function that does not keep gathered weights for backward.
        self.init: Any = deepspeed.zero.Init(
            module=nn.Identity(), config_dict_or_path=dict(ds_config)
        )
        # hpZ keeps a second copy, cut by node: it is made of the whole weight.
        self.whole = self.init.zero_param_process_group is not None

    def put(self, module: nn.Module, name: str, source: Source, dtype: torch.dtype) -> None:
        if name in module._buffers:
            super().put(module, name, source, dtype)
            return
        # Whole, but only this process's part is written: the rest never takes memory on a CPU.
        value = torch.empty(source.shape, dtype=dtype, device=self.device)
        parameter = nn.Parameter(value, requires_grad=False)
        self.init._convert_to_deepspeed_param(parameter)
        part: Any = parameter
        size = -(-source.numel // part.ds_zero_partition_world_size)
        start = 0 if self.whole else size * part.ds_zero_partition_rank
        stop = source.numel if self.whole else min(source.numel, start + size)
        if start < stop:
            source.read_into(value.view(-1)[start:stop], start)
        part.partition()
        setattr(module, name, parameter)
