"""`python -m flex eval`: from arguments to a result file and what is printed of it."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flex.evals.engine import Engine
    from flex.evals.run import SamplingPlan
    from flex.evals.subject import Subject

INTERRUPTED = 130


def eval_command(args: argparse.Namespace) -> int:
    """Evaluate and print. Returns 0, or 130 after Ctrl-C. Raises FlexError."""
    out = Path(args.out)
    check_counts(args, "samples", "max_new_tokens", "batch_size", "workers", "limit")
    _check_out(out)
    from flex.train import set_up_logging

    set_up_logging()
    from flex.evals.benchmarks import load_benchmark
    from flex.evals.execute import Runner
    from flex.evals.probe import unsolvable
    from flex.evals.run import Evaluation, SamplingPlan
    from flex.evals.sampling import Sampling
    from flex.evals.tables import print_report

    sampling = Sampling(args.temperature, args.top_p)
    system = subject(args, merged=args.merged)
    benchmark = load_benchmark(args.benchmark, args.data and Path(args.data), args.limit)
    limit = args.max_new_tokens or benchmark.max_new_tokens
    plan = SamplingPlan(
        sampling=sampling, samples=args.samples, max_new_tokens=limit, seed=args.seed
    )
    try:
        # The runner first: a sandbox that is not here is said before hours of generating
        with Runner(
            benchmark.language,
            workers=args.workers,
            allow_unsandboxed=args.allow_unsandboxed,
        ) as runner:
            evaluation = Evaluation(
                benchmark,
                plan,
                system.describe(),
                engine(args.engine, system, plan, args.batch_size),
                runner,
                partial(unsolvable, benchmark, runner) if args.solvable else None,
            )
            report = evaluation.run(out)
    except KeyboardInterrupt:
        print(_interrupted(out), file=sys.stderr)
        return INTERRUPTED
    print_report(report)
    if (rate := _tokens_per_second(out)) is not None:
        print(f"{rate:.0f} tokens/s")
    print(out)
    return 0


def subject(args: argparse.Namespace, merged: bool = False) -> Subject:
    """The system that the arguments name. Raises ConfigError."""
    from flex.evals.subject import Subject

    return Subject(
        model=args.model,
        adapter=args.adapter,
        merged=merged,
        dtype=args.dtype,
        quantise=args.quantise,
        revision=args.revision,
    )


def engine(name: str, system: Subject, plan: SamplingPlan, batch_size: int) -> Engine:
    """The engine of that name, "hf" or "vllm"."""
    if name == "vllm":
        from flex.evals.vllm_engine import VllmEngine

        return VllmEngine(system, plan.sampling, plan.max_new_tokens, batch_size)
    from flex.evals.engine import HfEngine

    return HfEngine(system, plan.sampling, plan.max_new_tokens, batch_size)


def check_counts(args: argparse.Namespace, *options: str) -> None:
    """Raise ConfigError for one of these options that is given and below 1."""
    for option in options:
        value = getattr(args, option)
        if value is not None and value < 1:
            flag = option.replace("_", "-")
            raise ConfigError(f"--{flag} {value}", "it counts something", "give 1 or more")


def _check_out(out: Path) -> None:
    if out.is_dir() or not out.parent.is_dir():
        raise DataError(
            f"--out {out}: {'is a folder' if out.is_dir() else f'there is no folder {out.parent}'}",
            "the result and its progress are written there",
            "give the name of a file in a folder that exists",
        )


def _interrupted(out: Path) -> str:
    from flex.evals.journal import journal_path

    try:
        lines = journal_path(out).read_bytes().splitlines()
    except OSError:
        return "interrupted: nothing was generated yet"
    made = sum(line.startswith(b'{"sample"') for line in lines)
    ran = sum(line.startswith(b'{"verdict"') for line in lines)
    return f"interrupted: {made} completions, {ran} of them run, are kept; the same command goes on"


def _tokens_per_second(out: Path) -> float | None:
    from flex.evals.results import timing_path

    try:
        times: dict[str, Any] = json.loads(timing_path(out).read_bytes())
    except (OSError, ValueError):
        return None
    rate = times.get("tokens_per_second")
    return float(rate) if rate is not None else None
