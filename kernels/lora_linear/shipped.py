"""The configurations that lora_linear launches, for the compile matrix."""

from __future__ import annotations

import torch

from ..runtime import Shipped
from . import backward, forward, siblings
from .tiles import precision

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def shipped() -> list[Shipped]:
    """bf16 (fp16 compiles alike) with rank up to 16, 64 and 256; fp32 with rank up to 16."""
    found = []
    for dtype, block_r in (
        (torch.bfloat16, 16),
        (torch.bfloat16, 64),
        (torch.bfloat16, 256),
        (torch.float32, 16),
    ):
        found += _down(dtype, block_r) + _gemms(dtype, block_r) + _partials(dtype, block_r)
    for out in ("*bf16", "*fp32"):
        found.append(
            Shipped(
                f"lora_linear/reduce/{out[1:]}",
                backward.reduce_kernel,
                {
                    "parts_ptr": "*fp32",
                    "out_ptr": out,
                    "scale": "fp32",
                    "parts": "i32",
                    "size": "i32",
                },
                backward.REDUCE,
                divisible=("size",),
            )
        )
    return found


def _targets(block_r: int) -> tuple[str, ...]:
    """A rank above 64 is compiled for the newest chips alone, to keep the matrix short."""
    return TARGETS if block_r <= 64 else ("sm_90", "sm_100")


def _name(kernel: str, dtype: torch.dtype, block_r: int, more: str = "") -> str:
    return f"lora_linear/{kernel}/{TYPES[dtype][1:]}/r{block_r}{more}"


def _down(dtype: torch.dtype, block_r: int) -> list[Shipped]:
    pointer = TYPES[dtype]
    signature = {"x_ptr": pointer, "a_ptr": pointer, "s_ptr": pointer, "row_ids_ptr": "*i32"}
    signature |= {"seed": "i64"}
    integers = ("dropped", "rows", "inputs", "rank", "stride_xm", "stride_ar")
    signature |= dict.fromkeys(integers, "i32")
    blocks, launch = forward.down_config(block_r)
    return [
        Shipped(
            _name("down", dtype, block_r, "/dropout" if dropout else ""),
            forward.down_kernel,
            signature,
            {
                "HAS_DROPOUT": dropout,
                "HAS_ROW_IDS": dropout,
                "PRECISION": precision(dtype),
                "BLOCK_R": block_r,
                **blocks,
            },
            num_warps=launch["num_warps"],
            num_stages=launch["num_stages"],
            divisible=("inputs", "stride_xm", "stride_ar"),
            mma=dtype != torch.float32,
            targets=_targets(block_r),
        )
        for dropout in (False, True)
    ]


def _gemms(dtype: torch.dtype, block_r: int) -> list[Shipped]:
    pointer = TYPES[dtype]
    blocks, launch = forward.gemm_config(dtype, block_r)
    names: tuple[str, ...] = ("x_ptr", "w_ptr", "bias_ptr", "s_ptr", "b_ptr", "y_ptr")
    integers: tuple[str, ...] = ("rows", "inputs", "outputs", "rank", "stride_xm", "stride_wn")
    found = [
        Shipped(
            _name("forward_gemm", dtype, block_r),
            forward.forward_gemm_kernel,
            dict.fromkeys(names, pointer) | dict.fromkeys(integers, "i32"),
            {
                "HAS_BIAS": False,
                "HAS_LORA": True,
                "PRECISION": precision(dtype),
                "BLOCK_R": block_r,
                **blocks,
            },
            num_warps=launch["num_warps"],
            num_stages=launch["num_stages"],
            divisible=("inputs", "outputs", "stride_xm", "stride_wn"),
            mma=dtype != torch.float32,
            wide_loads=dtype != torch.float32,
            targets=_targets(block_r),
        )
    ]
    names = ("dy_ptr", "w_ptr", "ds_ptr", "a_ptr", "dx_ptr")
    integers = ("dropped", "rows", "inputs", "outputs", "rank")
    integers += ("stride_dm", "stride_wn", "stride_ar")
    signature = dict.fromkeys(names, pointer) | {"row_ids_ptr": "*i32", "seed": "i64"}
    signature |= dict.fromkeys(integers, "i32")
    blocks = backward.transposed(blocks)
    for with_gemm in (False, True):
        found.append(
            Shipped(
                _name("grad_x", dtype, block_r, "/gemm" if with_gemm else ""),
                backward.grad_x_kernel,
                signature,
                {
                    "HAS_DROPOUT": True,
                    "HAS_ROW_IDS": True,
                    "HAS_GEMM": with_gemm,
                    "HAS_LORA": True,
                    "ADD": False,
                    "PRECISION": precision(dtype),
                    "BLOCK_R": block_r,
                    **blocks,
                },
                num_warps=launch["num_warps"],
                num_stages=launch["num_stages"],
                divisible=("inputs", "outputs", "stride_dm", "stride_wn", "stride_ar"),
                mma=dtype != torch.float32,
                wide_loads=with_gemm and dtype != torch.float32,  # else it streams out, not in
                targets=_targets(block_r),
            )
        )
    return found


def _partials(dtype: torch.dtype, block_r: int) -> list[Shipped]:
    pointer = TYPES[dtype]
    blocks, launch = backward.grad_sb_config(block_r, dtype)
    sb = Shipped(
        _name("grad_sb", dtype, block_r),
        backward.grad_sb_kernel,
        dict.fromkeys(("dy_ptr", "b_ptr", "s_ptr"), pointer)
        | dict.fromkeys(("ds_ptr", "db_ptr"), "*fp32")
        | dict.fromkeys(("rows", "outputs", "rank", "stride_dm"), "i32"),
        {"NEED_DS": True, "NEED_DB": True, "PRECISION": precision(dtype)} | blocks,
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        divisible=("outputs", "stride_dm"),
        mma=dtype != torch.float32,
        targets=_targets(block_r),
    )
    blocks, launch = backward.grad_a_config(block_r, dtype)
    a = Shipped(
        _name("grad_a", dtype, block_r),
        backward.grad_a_kernel,
        {"x_ptr": pointer, "ds_ptr": pointer, "da_ptr": "*fp32", "row_ids_ptr": "*i32"}
        | {"seed": "i64"}
        | dict.fromkeys(("dropped", "rows", "inputs", "rank", "stride_xm"), "i32"),
        {"HAS_DROPOUT": True, "HAS_ROW_IDS": True, "PRECISION": precision(dtype)} | blocks,
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        divisible=("inputs", "stride_xm"),
        mma=dtype != torch.float32,
        targets=_targets(block_r),
    )
    return [sb, a, *_siblings(dtype, block_r)]


def _siblings(dtype: torch.dtype, block_r: int) -> list[Shipped]:
    if block_r > 64:
        return []
    pointer = TYPES[dtype]
    keys = {"row_ids_ptr": "*i32", "seeds_ptr": "*i64"}
    integers = dict.fromkeys(("dropped", "rows", "inputs", "rank", "stride_xm"), "i32")
    dropout = {"HAS_DROPOUT": True, "HAS_ROW_IDS": True}
    constants = {"COUNT": 3, **dropout, "PRECISION": precision(dtype)}
    found = []
    for kernel, (blocks, launch), out in (
        ("down", siblings.down_siblings_config(block_r, dtype), "s_ptr"),
        ("grad_a", siblings.grad_a_siblings_config(block_r, dtype), "da_ptr"),
    ):
        third = {"a_ptr": pointer} if kernel == "down" else {"ds_ptr": pointer}
        out_type = pointer if kernel == "down" else "*fp32"
        found.append(
            Shipped(
                _name(f"{kernel}_siblings", dtype, block_r),
                getattr(siblings, f"{kernel}_siblings_kernel"),
                {"x_ptr": pointer, **third, out: out_type, **keys, **integers},
                {**constants, **blocks},
                num_warps=launch["num_warps"],
                num_stages=launch["num_stages"],
                divisible=("inputs", "stride_xm"),
                mma=dtype != torch.float32,
            )
        )
    return found
