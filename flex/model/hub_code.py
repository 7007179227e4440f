"""No code from the Hub through bitsandbytes.

On a CPU with AVX512-BF16, importing bitsandbytes 0.50 fetches a compiled kernel from the Hub and
runs it, if Hugging Face's package `kernels` is installed; and PEFT imports bitsandbytes. There is
no switch for it. So bitsandbytes is imported here first, while `kernels` cannot be imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys

from flex.errors import ModelError

log = logging.getLogger("flex.model")

_PACKAGE = "kernels"  # Hugging Face's; our folder of that name has no __init__.py, hence no origin


def keep_out() -> None:
    """Import bitsandbytes without it, where both packages are installed; else nothing is imported."""
    if "bitsandbytes" in sys.modules or not _both_installed():
        return
    before = sys.modules.get(_PACKAGE)
    sys.modules[_PACKAGE] = None  # type: ignore[assignment]  # so importing it fails
    try:
        importlib.import_module("bitsandbytes")
    finally:
        del sys.modules[_PACKAGE]
        if before is not None:
            sys.modules[_PACKAGE] = before
    log.info("bitsandbytes was imported without the kernel that it takes from the Hub")


def refuse() -> None:
    """Raise ModelError if bitsandbytes holds code from the Hub: it was imported before flex."""
    backend = sys.modules.get("bitsandbytes.backends.cpu.ops")
    if getattr(backend, "gemm_4bit_forward_kernel", None) is not None:
        raise ModelError(
            "bitsandbytes has loaded a compiled kernel from the Hub",
            "code from the Hub is never run here, and its 4-bit products would call it",
            "import flex.model before bitsandbytes and peft, or pip uninstall kernels",
        )


def _both_installed() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    module = sys.modules.get(_PACKAGE)
    spec = module.__spec__ if module is not None else importlib.util.find_spec(_PACKAGE)
    return spec is not None and spec.origin is not None
