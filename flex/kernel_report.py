"""What the compiler made of the Triton kernels, as a table, and against the golden file.

    make kernels-report                 the table; differences to tests/golden/kernels.json
    make kernels-report ARGS=--update   compiles what changed since it was recorded, writes the file

The golden file also holds a digest of what each binary depends on, and Triton's release. While both
are the same, what is recorded stands; `make test` then compiles only some binaries again.

Compiling needs no GPU. It needs a process in which Triton functions are not interpreted, so the
work is done in a child with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Golden:
    """What the golden file records.

    Attributes:
        triton: the release that compiled; "" if nothing is recorded.
        resources: by "<name> <target>", fields of `Resources` and perhaps "reason".
        digests: by the same key, `flex.kernels.compile_digest.digest` of the sources.
    """

    triton: str
    resources: dict[str, dict[str, Any]]
    digests: dict[str, str]

    def stale(self, now: Sources) -> list[str]:
        """Keys of what has to be compiled anew: changed, new, or by another Triton."""
        if now.triton != self.triton:
            return list(now.digests)
        return [
            key
            for key, digest in now.digests.items()
            if self.digests.get(key) != digest or key not in self.resources
        ]

    def gone(self, now: Sources) -> list[str]:
        """Keys of what is recorded and no longer shipped."""
        return sorted((self.resources.keys() | self.digests.keys()) - now.digests.keys())


@dataclass(frozen=True)
class Sources:
    """What would be compiled now: Triton's release, and the digest of every binary's sources."""

    triton: str
    digests: dict[str, str]


def current_sources() -> Sources:
    """The digests of this checkout; nothing is compiled.

    Raises:
        KernelReportError: they cannot be made.
    """
    return Sources(**_child("--digests"))


def compiled_resources(keys: Collection[str] | None = None) -> list[dict[str, Any]]:
    """One dict per shipped configuration and target: name, target, problems, and the resources.

    Args:
        keys: "<name> <target>" of those to compile; None: all.

    Raises:
        KernelReportError: a configuration does not compile.
    """
    rows: list[dict[str, Any]] = _child("--json", None if keys is None else sorted(keys))
    return rows


def _child(flag: str, keys: list[str] | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "flex.kernel_report", flag],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).resolve().parent.parent,
        input=json.dumps(keys),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise KernelReportError(
            f"a kernel does not compile: {lines[-1] if lines else 'no message'}",
            "what a GPU would run is not known",
            f"run `TRITON_INTERPRET=0 python -m flex.kernel_report {flag} < /dev/null` for the "
            "whole traceback",
        )
    return json.loads(done.stdout)


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


def read_golden() -> Golden:
    """What is recorded; empty if there is nothing yet."""
    if not GOLDEN.exists():
        return Golden("", {}, {})
    recorded = json.loads(GOLDEN.read_text("utf-8"))
    return Golden(recorded["triton"], recorded["resources"], recorded.get("digests", {}))


def write_golden(rows: Sequence[dict[str, Any]], now: Sources) -> None:
    """Record `rows`, and keep what is recorded of all other binaries of `now`.

    Reasons that were given by hand stay.
    """
    before = read_golden().resources
    fresh = {f"{row['name']} {row['target']}": row for row in rows}
    resources = {}
    for key in now.digests:
        if (row := fresh.get(key)) is None:
            resources[key] = before[key]
            continue
        fields = {k: v for k, v in row.items() if isinstance(v, int)}
        reason = before.get(key, {}).get("reason")
        resources[key] = fields | ({"reason": reason} if reason and row["problems"] else {})
    recorded = {"triton": now.triton, "resources": resources, "digests": now.digests}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the differences; status 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m flex.kernel_report", description=__doc__)
    parser.add_argument("--update", action="store_true", help="record what changed")
    parser.add_argument("--json", action="store_true", help="compile here, print JSON")
    parser.add_argument("--digests", action="store_true", help="print digests, compile nothing")
    args = parser.parse_args(argv)
    if args.json or args.digests:
        wanted = json.loads(sys.stdin.read() or "null")
        print(json.dumps(_digests_here() if args.digests else _compile_here(wanted)))
        return 0
    golden, now = read_golden(), current_sources()
    stale, gone = golden.stale(now), golden.gone(now)
    if golden.triton and golden.triton != now.triton:
        print(f"Triton {now.triton} compiles; what is recorded is by {golden.triton}.")
    rows = compiled_resources(stale if args.update else None)
    Console().print(resource_table(rows), soft_wrap=True)
    if args.update:
        write_golden(rows, now)
        print(f"compiled anew: {len(rows)} of {len(now.digests)}; no longer shipped: {len(gone)}")
        stale, gone, golden = [], [], read_golden()
    found = compare_with_golden(rows, golden.resources)
    found += [f"{key}: recorded, but no longer shipped" for key in gone]
    found += [f"{key}: its sources changed since it was recorded" for key in stale]
    configurations = len({row["name"] for row in rows})
    print(f"{configurations} configurations, {len(rows)} binaries, {len(found)} findings")
    print(*found, sep="\n")
    print("Registers and instructions are the compiler's; nothing here was timed on a GPU.")
    return 1 if found else 0


def _compile_here(keys: Collection[str] | None) -> list[dict[str, Any]]:
    from flex.kernels.compiled import compile_all, problems

    return [
        {"name": config.name, "target": target, "problems": problems(config, target, found)}
        | found.as_dict()
        for config, target, found in compile_all(keys)
    ]


def _digests_here() -> dict[str, Any]:
    import triton

    from flex.kernels.compile_digest import digest
    from flex.kernels.compiled import binaries

    digests = {key: digest(config, target) for key, config, target in binaries()}
    return {"triton": triton.__version__, "digests": digests}


if __name__ == "__main__":
    raise SystemExit(main())
