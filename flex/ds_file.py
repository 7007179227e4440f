"""Read a ds_config. Apart from the engine: `plan` reads one too, and must not wait for torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ConfigError


def read_ds_config(path: str) -> dict[str, Any]:
    """A ds_config as a dict, ready for DeepSpeed. Raises ConfigError if it is missing or not JSON."""
    file = Path(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        here = sorted(p.name for p in file.parent.glob("*.json")) or ["zero2.json"]
        raise ConfigError(
            f"no file {path}",
            "deepspeed=FILE names the engine's settings",
            f"use one of: {', '.join(here)}",
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON: {error}", "DeepSpeed cannot read it", "mend the file"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path} is not a JSON object",
            "DeepSpeed cannot read it",
            "start from ds_configs/zero2.json",
        )
    config["train_micro_batch_size_per_gpu"] = 1  # only DeepSpeed's sample counters use it
    return config
