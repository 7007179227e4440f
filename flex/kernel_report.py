"""What the compiler made of the Triton kernels, as a table, and against the golden file.

    make kernels-report                 the table; differences to tests/golden/kernels.json
    make kernels-report ARGS=--update   the same, then writes the golden file

Compiling needs no GPU. It needs a process in which Triton functions are not interpreted, so the
work is done in a child with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flex.errors import FlexError

GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden/kernels.json"
# ptxas of another release may take a few registers more or fewer; a kernel that changed takes more
REGISTER_SLACK = 8


class KernelReportError(FlexError):
    """The kernels could not be compiled."""


def compiled_resources() -> list[dict[str, Any]]:
    """One dict per shipped configuration and target: name, target, problems, and the resources.

    Raises:
        KernelReportError: a configuration does not compile.
    """
    done = subprocess.run(
        [sys.executable, "-m", "flex.kernel_report", "--json"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise KernelReportError(
            f"a kernel does not compile: {lines[-1] if lines else 'no message'}",
            "what a GPU would run is not known",
            "run `TRITON_INTERPRET=0 python -m flex.kernel_report --json` for the whole traceback",
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def compare_with_golden(
    rows: Sequence[dict[str, Any]], golden: dict[str, dict[str, Any]]
) -> list[str]:
    """What is wrong: a resource out of bounds without a recorded reason, or worse than recorded.

    Args:
        rows: as `compiled_resources` gives them.
        golden: by "<name> <target>"; an entry may carry "reason", which excuses its spills and no
            others.

    Returns: one line per finding: configuration, target, number, what was recorded.
    """
    found = []
    for row in rows:
        key = f"{row['name']} {row['target']}"
        recorded = golden.get(key)
        if recorded is None:
            found.append(f"{key}: not in the golden file; accept it with --update")
            continue
        excused = "reason" in recorded
        for problem in row["problems"]:
            if not (excused and "spill" in problem and not key.endswith(("sm_90", "sm_100"))):
                found.append(f"{key}: {problem}")
        for field, slack in (("registers", REGISTER_SLACK), ("spills", 0), ("shared", 0)):
            if row[field] > recorded[field] + slack:
                found.append(f"{key}: {field} {row[field]}, recorded {recorded[field]}")
        # tables are read wide in any case: fewer wide loads mean that data no longer is
        for field, least in (
            ("mma", min(recorded["mma"], 1)),
            ("wide_loads", recorded["wide_loads"]),
        ):
            if row[field] < least:
                found.append(f"{key}: {field} {row[field]}, recorded {recorded[field]}")
    present = {f"{row['name']} {row['target']}" for row in rows}
    found += [f"{key}: recorded, but no longer shipped" for key in golden if key not in present]
    return found


def resource_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The resources, a row per configuration and target."""
    from flex.kernels.compiled import SHARED_LIMIT

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("configuration", overflow="fold")
    for title in ("target", "registers", "spills", "shared of limit", "MMA", "128-bit loads", ""):
        table.add_column(title, justify="left" if title in ("target", "") else "right")
    last = None
    for row in rows:
        table.add_row(
            row["name"] if row["name"] != last else "",
            row["target"],
            str(row["registers"]),
            str(row["spills"]),
            f"{row['shared']} of {SHARED_LIMIT[row['target']]}",
            str(row["mma"]),
            str(row["wide_loads"]),
            "; ".join(row["problems"]) or "OK",
            style="" if not row["problems"] else "red",
        )
        last = row["name"]
    return table


def read_golden() -> dict[str, dict[str, Any]]:
    """The recorded resources by "<name> <target>"; empty if there are none yet."""
    if not GOLDEN.exists():
        return {}
    recorded: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text("utf-8"))["resources"]
    return recorded


def write_golden(rows: Sequence[dict[str, Any]]) -> None:
    """Record `rows`; reasons that were given by hand stay."""
    import triton

    before = read_golden()
    resources = {}
    for row in rows:
        key = f"{row['name']} {row['target']}"
        fields = {k: v for k, v in row.items() if isinstance(v, int)}
        reason = before.get(key, {}).get("reason")
        resources[key] = fields | ({"reason": reason} if reason and row["problems"] else {})
    text = json.dumps({"triton": triton.__version__, "resources": resources}, indent=1)
    GOLDEN.write_text(text + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the differences; status 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m flex.kernel_report", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the golden file")
    parser.add_argument("--json", action="store_true", help="compile here, print JSON")
    args = parser.parse_args(argv)
    if args.json:
        print(json.dumps(_compile_here()))
        return 0
    rows = compiled_resources()
    Console().print(resource_table(rows), soft_wrap=True)
    if args.update:
        write_golden(rows)
    found = compare_with_golden(rows, read_golden())
    configurations = len({row["name"] for row in rows})
    print(f"{configurations} configurations, {len(rows)} binaries, {len(found)} findings")
    print(*found, sep="\n")
    print("Registers and instructions are the compiler's; nothing here was timed on a GPU.")
    return 1 if found else 0


def _compile_here() -> list[dict[str, Any]]:
    from flex.kernels.compiled import compile_all, problems

    return [
        {"name": config.name, "target": target, "problems": problems(config, target, found)}
        | found.as_dict()
        for config, target, found in compile_all()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
