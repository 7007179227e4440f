"""Every configuration that the launchers of kernel.py and norm.py launch, for the kernels report."""

from __future__ import annotations

from itertools import product

from ..runtime import Shipped
from . import kernel, norm
from .scalars import SCALARS
from .table import BLOCK, META_COLUMNS

TABLE = {"owner_ptr": "*i32", "meta_ptr": "*i64"}
# fp32 throughout; bf16 gradients; fp32 masters with a bf16 copy; and pure bf16. By p, m, h, g, copy.
UPDATES = {
    "fp32": ("fp32", "fp32", "fp32", "fp32", None),
    "grad-bf16": ("fp32", "fp32", "fp32", "bf16", None),
    "copy-bf16": ("fp32", "fp32", "fp32", "bf16", "bf16"),
    "bf16": ("bf16", "bf16", "bf16", "bf16", None),
}


def _constants(aligned: bool) -> dict[str, object]:
    return {"ALIGNED": aligned, "META": META_COLUMNS, "BLOCK_N": BLOCK}


def _columns(*names: str) -> dict[str, str]:
    return {f"{name}_column_ptr": "*i64" for name in names}


def shipped() -> list[Shipped]:
    """All configurations: the ends of 16-bit and 32-bit dtypes, aligned and not."""
    found = []
    for (label, types), aligned in product(UPDATES.items(), (True, False)):
        suffix = label if aligned else f"{label}-unaligned"
        p, m, h, g, copy = (None if t is None else kernel.TL_NAMES[t] for t in types)
        found.append(
            Shipped(
                f"sophia_update/update/{suffix}",
                kernel._sophia_kernel,
                {
                    **TABLE,
                    **_columns("p", "m", "h", "g", "copy"),
                    "scalars_ptr": "*fp32",
                    "control_ptr": "*fp32",
                    "clipped_ptr": "*i32",
                },
                {
                    "P_TYPE": p,
                    "M_TYPE": m,
                    "H_TYPE": h,
                    "G_TYPE": g,
                    "COPY_TYPE": copy,
                    "HAS_CONTROL": True,
                    "SCALARS": SCALARS,
                    **_constants(aligned),
                },
                num_warps=kernel.NUM_WARPS,
                wide_loads=aligned,
            )
        )
    for dtype, aligned in product(("fp32", "bf16"), (True, False)):
        suffix = dtype if aligned else f"{dtype}-unaligned"
        tl_dtype = kernel.TL_NAMES[dtype]
        found += [
            Shipped(
                f"sophia_update/square_sum/{suffix}",
                norm._square_sum_kernel,
                {**TABLE, **_columns("g"), "partials_ptr": "*fp32"},
                {"G_TYPE": tl_dtype, **_constants(aligned)},
                num_warps=kernel.NUM_WARPS,
                wide_loads=aligned,
            ),
            Shipped(
                f"sophia_update/estimate/{suffix}",
                kernel._estimate_kernel,
                {**TABLE, **_columns("e", "g"), "num_targets": "fp32"},
                {"G_TYPE": tl_dtype, "FIRST": False, **_constants(aligned)},
                num_warps=kernel.NUM_WARPS,
                wide_loads=aligned,
            ),
            Shipped(
                f"sophia_update/curvature/{suffix}",
                kernel._curvature_kernel,
                {**TABLE, **_columns("h", "e"), "beta2": "fp32", "e_factor": "fp32"},
                {
                    "H_TYPE": tl_dtype,
                    "E_TYPE": kernel.TL_NAMES["fp32"],
                    **_constants(aligned),
                },
                num_warps=kernel.NUM_WARPS,
                wide_loads=aligned,
            ),
        ]
    found.append(
        Shipped(
            "sophia_update/norm",
            norm._norm_kernel,
            {
                "partials_ptr": "*fp32",
                "scale_ptr": "*fp32",
                "control_ptr": "*fp32",
                "n": "i32",
                "max_norm": "fp32",
                "added": "fp32",
            },
            {"HAS_SCALE": True, "BLOCK_N": kernel.SUM_BLOCK},
            num_warps=kernel.SUM_WARPS,
        )
    )
    found.append(
        Shipped(
            "sophia_update/count",
            kernel._count_kernel,
            {"counts_ptr": "*i32", "total_ptr": "*i64", "n": "i32"},
            {"BLOCK_N": kernel.SUM_BLOCK},
            num_warps=kernel.SUM_WARPS,
        )
    )
    return found
