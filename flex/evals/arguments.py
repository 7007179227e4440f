"""Options of `eval`, `nll` and `merge-check`, in a module that loads nothing, so that --help answers at once."""

from __future__ import annotations

import argparse

BATCH_SIZE = 16


def add_system(command: argparse.ArgumentParser) -> None:
    """The options that say what is evaluated."""
    command.add_argument(
        "--model", required=True, metavar="ID", help="Hub id, folder, smollm2-135m"
    )
    command.add_argument("--adapter", metavar="DIR", help="adapter in PEFT's format")
    command.add_argument("--revision", metavar="REV", help="of a Hub id")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (float32)",
    )
    command.add_argument("--quantise", choices=("4bit",), help="load the base in 4 bits")


def add_tasks(command: argparse.ArgumentParser) -> None:
    """The options that say on what."""
    command.add_argument("--benchmark", required=True, metavar="NAME", help="such as humaneval")
    command.add_argument("--data", metavar="FILE", help="local file in place of the Hub")
    command.add_argument("--limit", type=int, metavar="N", help="the first N tasks only")


def add_eval_arguments(command: argparse.ArgumentParser) -> None:
    """All options of `eval`."""
    add_system(command)
    command.add_argument("--merged", action="store_true", help="merge the adapter into the base")
    add_tasks(command)
    command.add_argument("--samples", type=int, default=1, metavar="N", help="for each task (1)")
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of sampling (1)")
    command.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="for each completion (the benchmark's own)"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="B",
        help=f"completions at once ({BATCH_SIZE})",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of sampling (0)")
    command.add_argument("--workers", type=int, default=2, metavar="N", help="programs at once (2)")
    command.add_argument(
        "--allow-unsandboxed",
        action="store_true",
        help="run generated programs although no sandbox is here",
    )
    command.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="(hf)")
    command.add_argument(
        "--solvable", action="store_true", help="also find the tasks whose stub does not compile"
    )
    command.add_argument("--out", required=True, metavar="FILE", help="the result, JSON")


def add_merge_check_arguments(command: argparse.ArgumentParser) -> None:
    """All options of `merge-check`."""
    add_system(command)
    add_tasks(command)
    command.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="of greedy completions (128)"
    )
    command.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="B", help=f"at once ({BATCH_SIZE})"
    )
    command.add_argument("--json", metavar="FILE", help="also write everything there")


def add_nll_arguments(command: argparse.ArgumentParser) -> None:
    """All options of `nll`."""
    add_system(command)
    command.add_argument("--merged", action="store_true", help="merge the adapter into the base")
    command.add_argument(
        "--benchmark", required=True, nargs="+", metavar="NAME", help="one or more"
    )
    command.add_argument(
        "--data", nargs="+", metavar="FILE", help="local files, one for each benchmark"
    )
    command.add_argument("--limit", type=int, metavar="N", help="the first N tasks of each")
    command.add_argument("--json", metavar="FILE", help="also write everything there")
    command.add_argument(
        "--against", metavar="FILE", help="compare with another system: what its --json wrote"
    )
