"""The command line. A command imports what it needs when it runs, so that `config show` and a
mistyped option answer at once, without loading torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import flex
from flex.config_io import Resolved, load_config, origins
from flex.errors import FlexError
from flex.evals.arguments import add_eval_arguments, add_merge_check_arguments, add_nll_arguments

USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code.

    0: done. 2: the user can fix it (a FlexError, or argparse's usage error). 130: Ctrl-C. Any other
    exception is a defect of FLeX and keeps its traceback.
    """
    parser = _parser()
    args, extra = parser.parse_known_args(argv)
    flags = [text for text in extra if text.startswith("-")]
    if flags or (extra and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(flags or extra)}")
    if extra:  # overrides that stand behind an option, which argparse does not collect
        args.overrides = [*args.overrides, *extra]
    return guarded(lambda: args.run(args))


def guarded(call: Callable[[], int]) -> int:
    """Run `call`; tell a FlexError in its three parts on stderr and turn it into an exit code."""
    try:
        return call()
    except FlexError as error:
        if not _others_say_the_same():
            show_error(error)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _others_say_the_same() -> bool:
    """Whether this is not rank 0 and the processes have not met yet: until then all of them do the same."""
    distributed = sys.modules.get("torch.distributed")
    met = distributed is not None and distributed.is_initialized()
    return int(os.environ.get("RANK", 0)) > 0 and not met


def show_error(error: FlexError) -> None:
    """Print what happened, why it matters and what to type; in colour on a terminal."""
    text = Text.assemble(
        ("error: ", "bold red"),
        (error.what, "bold"),
        ("\n  why: ", "dim"),
        error.why,
        ("\n  fix: ", "bold green"),
        error.fix,
    )
    # a pipe gets the lines unwrapped, so that they can be searched
    Console(stderr=True, highlight=False).print(text, soft_wrap=not sys.stderr.isatty())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flex",
        description="LoRA fine-tuning of code models with a spectral penalty and Sophia.",
    )
    parser.add_argument("--version", action="version", version=f"flex-lora {flex.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        where: argparse._SubParsersAction, name: str, run: Callable, help: str
    ) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = where.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    def group(name: str, help: str) -> argparse._SubParsersAction:
        return commands.add_parser(name, help=help).add_subparsers(metavar="WHAT", required=True)

    def configured(command: argparse.ArgumentParser, required: bool) -> None:
        command.add_argument(
            "--config", metavar="FILE", required=required, help="YAML, see flex/recipes/"
        )
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="for example optim.lr=1e-4"
        )

    train = add(commands, "train", _train, "fine-tune in one process")
    add_dry_run_arguments(train)
    configured(train, required=True)
    add(commands, "demo", _demo, "fine-tune a small real model under DeepSpeed, two processes")

    merge = add(commands, "merge", _merge, "merge an adapter into its base model")
    merge.add_argument("--adapter", required=True, metavar="DIR")
    merge.add_argument("--out", required=True, metavar="DIR", help="new folder, safetensors")
    merge.add_argument("--base", metavar="ID", help="base model, in place of the adapter's own")

    quantise = add(
        commands, "quantise", _quantise, "round the base to NF4 on the run's training data"
    )
    quantise.add_argument("--out", required=True, metavar="DIR", help="new folder, safetensors")
    quantise.add_argument(
        "--tokens", type=int, metavar="N", help="training tokens to calibrate on (131072)"
    )
    configured(quantise, required=True)

    add_eval_arguments(
        add(commands, "eval", _eval, "evaluate a model on a benchmark, in a sandbox")
    )
    add_nll_arguments(add(commands, "nll", _nll, "how likely a model finds reference solutions"))
    add_merge_check_arguments(
        add(commands, "merge-check", _merge_check, "compare an adapter with itself, merged")
    )

    compare = add(commands, "compare", _compare, "compare result files on the same tasks")
    compare.add_argument("files", nargs="*", metavar="FILE", help="each is compared with the first")
    compare.add_argument(
        "--group",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "FILE"),
        help="a method's training runs; give it twice or more",
    )
    compare.add_argument(
        "--pair", nargs=2, action="append", default=[], metavar=("A", "B"), help="for a table"
    )
    compare.add_argument("--k", type=int, default=1, metavar="N", help="of pass@k (1)")
    compare.add_argument("--json", metavar="FILE", help="also write everything there")

    race = add(commands, "race", _race, "race the optimizers: how much budget Sophia needs")
    race.add_argument(
        "--config", required=True, metavar="FILE", help="YAML, see flex/recipes/races/"
    )
    race.add_argument("--workers", type=int, metavar="N", help="runs at once (one per core)")
    race.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of all runs, such as data.path=FILE"
    )

    data = group("data", "look at the training data")
    show = add(data, "show", _data_show, "print examples: which tokens bear loss")
    show.add_argument("--n", type=int, default=3, metavar="N", help="examples (3)")
    configured(show, required=True)

    config = group("config", "look at the configuration")
    configured(
        add(config, "show", _config_show, "print every option: value, origin, meaning"),
        required=False,
    )
    plan = add(commands, "plan", _plan, "predict memory, work and time from the configuration")
    configured(plan, required=True)
    for name, metavar, help in (
        ("--gpus", "N", "processes, one per device (WORLD_SIZE, or 1)"),
        ("--tokens", "N", "positions per micro-batch and process (all at data.max_length)"),
        ("--targets", "N", "of which bear loss (all)"),
    ):
        plan.add_argument(name, type=int, metavar=metavar, help=help)
    plan.add_argument("--chip", metavar="NAME", help="bound the time on this chip only")

    doctor = add(commands, "doctor", _doctor, "report versions, devices, threads and compilers")
    doctor.add_argument(
        "--kernels",
        action="store_true",
        help="each kernel's error and time here; without a GPU also what the compiler made of it",
    )
    return parser


def add_dry_run_arguments(parser: argparse.ArgumentParser) -> None:
    """`--dry-run` and `--world`, the same for both ways to start a run."""
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything but the weights, write nothing"
    )
    parser.add_argument(
        "--world", type=int, metavar="N", help="with --dry-run: as if N processes were launched"
    )


def _train(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from flex.train import start

    return start(config, args.dry_run, args.world)


def _demo(args: argparse.Namespace) -> int:
    from flex.demo import main as demo

    return demo()


def _merge(args: argparse.Namespace) -> int:
    from flex.model.export import merge

    print(merge(args.adapter, args.out, base=args.base))
    return 0


def _quantise(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from flex.train import set_up_logging

    set_up_logging()  # before the libraries are imported, which talk while they are
    from flex.quantise import TOKENS, quantise_command

    return quantise_command(config, Path(args.out), TOKENS if args.tokens is None else args.tokens)


def _data_show(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from flex.data.show import show

    show(config, args.n)
    return 0


def _config_show(args: argparse.Namespace) -> int:
    options = origins(args.config, args.overrides)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("option", "value", "origin", "meaning"):
        table.add_column(title, overflow="fold")
    for option in options:
        style = "dim" if option.origin == "default" else ""
        table.add_row(option.key, _yaml(option), option.origin, option.description, style=style)
    console = Console(highlight=False, markup=False)
    # a pipe gets one line per option
    console.print(table) if console.is_terminal else print(*map(_row, options), sep="\n")
    return 0


def _row(option: Resolved) -> str:
    return f"{option.key} = {_yaml(option)}  [{option.origin}]  {option.description}".rstrip()


def _yaml(option: Resolved) -> str:
    if isinstance(option.value, tuple):
        return f"[{', '.join(map(str, option.value))}]"
    if option.value is None or isinstance(option.value, bool):
        return {None: "null", True: "true", False: "false"}[option.value]
    return str(option.value)


def _plan(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from flex.plan import plan_command

    return plan_command(config, args.gpus, args.chip, args.tokens, args.targets)


def _eval(args: argparse.Namespace) -> int:
    from flex.evals.command import eval_command

    return eval_command(args)


def _nll(args: argparse.Namespace) -> int:
    from flex.train import set_up_logging

    set_up_logging()  # before the libraries are imported, which talk while they are
    from flex.evals.measure_commands import nll_command

    return nll_command(args)


def _merge_check(args: argparse.Namespace) -> int:
    from flex.train import set_up_logging

    set_up_logging()  # before the libraries are imported, which talk while they are
    from flex.evals.measure_commands import merge_check_command

    return merge_check_command(args)


def _compare(args: argparse.Namespace) -> int:
    from flex.evals.tables import compare_command

    return compare_command(args.files, args.group, args.pair, args.json, args.k)


def _race(args: argparse.Namespace) -> int:
    from flex.train import set_up_logging

    set_up_logging()
    from flex.race.command import race_command

    return race_command(args)


def _doctor(args: argparse.Namespace) -> int:
    if args.kernels:
        import torch

        from flex import kernel_check, kernel_report

        failed = kernel_check.main()
        if torch.cuda.is_available():
            return failed
        print("\nWhat a GPU would run, as compiled here:", flush=True)
        return kernel_report.main([]) or failed
    from flex.doctor import report

    for label, value in report():
        print(f"{label:<16} {value}")
    return 0
