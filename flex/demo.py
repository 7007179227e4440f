"""`python -m flex demo`: fine-tune a small real model under DeepSpeed, in two processes, from a checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flex.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RECIPE, ENGINE = "flex/recipes/builtin-smollm2.yaml", "ds_configs/zero2.json"


def main() -> int:
    """Show the command, run it, and say what can be done with the result. Returns its exit status.

    An interrupted demonstration is continued; a finished one is left alone and another is started.
    """
    missing = [path for path in (RECIPE, ENGINE) if not (ROOT / path).is_file()]
    if missing:
        raise ConfigError(
            f"{ROOT} has no {missing[0]}",
            "the demonstration runs from a checkout, as a user would type it",
            "clone the repository, then `make demo` in it",
        )
    name = next_name(ROOT / "runs")
    arguments = ["--num_accelerators", "2", "flex/train.py", "--config", RECIPE]
    arguments += [f"deepspeed={ENGINE}", f"name={name}"]
    print(f"$ deepspeed {' '.join(arguments)}\n", flush=True)
    launcher = Path(sys.executable).with_name("deepspeed")
    status = subprocess.run(
        [sys.executable, launcher, *arguments], cwd=ROOT, check=False
    ).returncode
    if status == 0:
        print(f"\n{advice(f'runs/{name}')}")
    return status


def next_name(runs: Path) -> str:
    """demo, demo-2, ...: the first whose folder holds no finished run."""
    number, name = 1, "demo"
    while (runs / name / "finished.json").exists():
        number += 1
        name = f"demo-{number}"
    return name


def advice(run: str) -> str:
    """What was reached, and the commands that use it."""
    summary = json.loads((ROOT / run / "finished.json").read_bytes())
    before, after = summary["validation_loss_before"], summary["validation_loss_after"]
    return (
        f"validation loss on unseen tasks fell by {1 - after / before:.1%}. Next:\n"
        f"  {run}/loss.png                                the curves\n"
        f"  python -m flex merge --adapter {run}/adapter --out merged    one model, for any tool\n"
        f"  python -m flex data show --config {RECIPE}    what it was trained on"
    )
