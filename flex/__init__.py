"""FLeX: fast, honest LoRA fine-tuning of code models with a spectral penalty and Sophia."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flex.fuse import FuseReport, LayerPath, fuse_adapters, unfuse_adapters

__version__ = "0.1.0"
__all__ = ["FuseReport", "LayerPath", "__version__", "fuse_adapters", "unfuse_adapters"]


def __getattr__(name: str) -> Any:
    """Load on first use what needs torch and PEFT: the command line must answer without them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flex import fuse

    return getattr(fuse, name)
