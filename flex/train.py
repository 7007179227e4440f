"""Entry for `deepspeed flex/train.py --config FILE [key=value ...]` and for `python -m flex train`.

data -> model -> adapters -> penalty -> optimizer -> engine -> loop -> adapter folder
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Python puts a script's own folder first on the path, where its modules could hide others.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import logging
import warnings
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flex.config import RunConfig

log = logging.getLogger("flex.train")

STOPPED = 3  # exit status of a run that was asked to stop and can be continued


def main(argv: list[str] | None = None) -> int:
    """The launcher's entry; `--local_rank` is the launcher's own."""
    from flex.commands import add_dry_run_arguments, guarded
    from flex.config_io import load_config

    parser = argparse.ArgumentParser(prog="deepspeed flex/train.py", description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML; none: every option's default")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_dry_run_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(argv)
    return guarded(
        lambda: start(load_config(args.config, args.overrides), args.dry_run, args.world)
    )


def start(cfg: RunConfig, dry_run: bool, world: int | None) -> int:
    """`run`, or its rehearsal. Raises ConfigError for a `world` that would have no effect."""
    if dry_run:
        set_up_logging()
        from flex.dry_run import rehearse

        return rehearse(cfg, world)
    if world is not None:
        from flex.errors import ConfigError

        raise ConfigError(
            "--world without --dry-run",
            "the number of a run's processes is the launcher's to decide",
            f"deepspeed --num_gpus {world} flex/train.py, or add --dry-run",
        )
    return run(cfg)


def run(cfg: RunConfig) -> int:
    """Train as configured. Returns 0 when the run is finished, 3 when it was asked to stop.

    What is wrong with the input is found before the first training step, cheapest first, and
    nothing that exists is overwritten.
    """
    set_up_logging()
    from flex import processes
    from flex.data.loader import StepLoader, load_data, validation_batches
    from flex.model.base import load_tokenizer
    from flex.ranges import check_profile
    from flex.run_folder import open_run
    from flex.session import Session

    rank, world = processes.rank(), processes.world()
    check_settings(cfg, world)
    tokenizer = load_tokenizer(cfg.model)
    data = load_data(cfg, tokenizer)
    pad = tokenizer.pad_token_id
    loader = StepLoader(data.train, cfg, rank, world, pad)
    check_profile(cfg.profile, loader.total_steps)
    validation = validation_batches(data.validation, cfg, rank, world, pad)
    processes.share_cores()
    with ExitStack() as stack:
        spot_check = None
        if cfg.eval.every:
            from flex.evals.spot_check import SpotCheck

            spot_check = stack.enter_context(closing(SpotCheck(cfg.eval, tokenizer, rank)))
        folder = stack.enter_context(open_run(cfg, rank, data.fingerprint()))
        processes.start(cfg)
        stack.callback(processes.stop)
        return Session(
            cfg, folder, tokenizer, loader, validation, data.validation, spot_check
        ).run()


def check_settings(cfg: RunConfig, world: int) -> None:
    """What the options alone and this machine can tell: engine, ds_config, trackers.

    Raises:
        ConfigError: they do not fit each other, the number of processes or what is installed.
    """
    from flex import processes
    from flex.ds_sections import check_zero_section
    from flex.engine_zero import check_ds_config, read_ds_config
    from flex.trackers import require_installed

    processes.check(cfg, world)
    if cfg.deepspeed is not None:
        ds_config = read_ds_config(cfg.deepspeed)
        check_ds_config(ds_config, cfg)
        check_zero_section(cfg.deepspeed, ds_config, world)
    require_installed(cfg.track)


def set_up_logging() -> None:
    """FLeX's own log on stderr, from rank 0; other libraries only when something is wrong. Before they are imported,
    because some of them talk while they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("flex")
    logger.handlers[:], logger.propagate = [handler], False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers|peft)\b.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    # ds_configs/ allow it on purpose, and the engine's tests cover it
    deepspeed.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # else DeepSpeed warns that it looked for more
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
