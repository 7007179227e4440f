"""Benchmarks by name: `load_benchmark("multipl-e-java", Path("humaneval-java-reworded.json"))`."""

from __future__ import annotations

import difflib
import logging
from dataclasses import replace
from pathlib import Path

from flex.errors import DataError
from flex.evals import apps, builtin_tasks, humaneval, mbpp, multipl_e, mxeval
from flex.evals.tasks import LANGUAGES, Benchmark

log = logging.getLogger("flex.evals")

# What users write for a language; MultiPL-E's names, in LANGUAGES, stand for themselves.
ALIASES = {
    **{"python": "py", "python3": "py", "javascript": "js", "node": "js", "typescript": "ts"},
    **{"c++": "cpp", "cxx": "cpp", "rust": "rs", "bash": "sh", "shell": "sh", "perl": "pl"},
    **{"golang": "go", "ruby": "rb", "c#": "cs", "csharp": "cs"},
}
# The first that a name begins with, so the longer come first; with the languages of each.
FAMILIES: dict[str, tuple[str, ...]] = {
    "multipl-e-mbpp": LANGUAGES,
    "multipl-e-humaneval": LANGUAGES,
    "multipl-e": LANGUAGES,
    "humaneval-x": tuple(mxeval.HUMANEVAL_X_FOLDERS),
    "mbxp": tuple(mxeval.MBXP_FILES),
}
_BUILTIN = ("builtin-python", "builtin-java")
PLAIN = (
    *(*humaneval.NAMES, "mbpp", "mbpp-all", *apps.NAMES),
    *(*_BUILTIN, *(f"{name}-validation" for name in _BUILTIN)),
)
# As shown to users; LANG is one of LANGUAGES or ALIASES.
NAMES = (*PLAIN, *(f"{family}-LANG" for family in FAMILIES if family != "multipl-e-humaneval"))


def load_benchmark(name: str, data: Path | None = None, limit: int | None = None) -> Benchmark:
    """The benchmark `name`, one of NAMES.

    Args:
        data: a file in the benchmark's public schema; None is the Hub, or for the built-in tasks
            the package.
        limit: take only the first tasks; the result's source says so.

    Raises:
        DataError: no such benchmark, the data are not there or not its own, or `limit` is below 1.
    """
    name, family, language = parse_name(name)
    if limit is not None and limit < 1:
        what = f"limit is {limit}"
        raise DataError(what, "a benchmark has at least one task", "give a limit of 1 or more")
    if family.startswith("multipl-e"):
        base = family.removeprefix("multipl-e").removeprefix("-")
        benchmark = multipl_e.load(name, language, base, data)
    elif family == "humaneval-x":
        benchmark = mxeval.load_humaneval_x(name, language, data)
    elif family == "mbxp":
        benchmark = mxeval.load_mbxp(name, language, data)
    elif name in humaneval.NAMES:
        benchmark = humaneval.load(name, data)
    elif name.startswith("mbpp"):
        benchmark = mbpp.load(name, data)
    elif name in apps.NAMES:
        benchmark = apps.load(name, data)
    elif data is not None:
        what = f"{name} was given the file {data}"
        raise DataError(what, "the built-in tasks are part of the package", "leave out --data")
    else:
        benchmark = builtin_tasks.load(name)
    return benchmark if limit is None else _first(benchmark, limit)


def parse_name(name: str) -> tuple[str, str, str]:
    """(name as it goes into results, family, language); the last two are "" for one of PLAIN.

    Raises:
        DataError: there is no such benchmark, or not in that language.
    """
    asked = name.strip().lower().replace("_", "-")
    if asked in PLAIN:
        return asked, "", ""
    if asked.removesuffix("-validation") == "builtin-py":
        return asked.replace("-py", "-python"), "", ""
    for family, languages in FAMILIES.items():
        if asked.startswith(family + "-"):
            word = asked.removeprefix(family + "-")
            language = ALIASES.get(word, word)
            if language in languages:
                return f"{family.removesuffix('-humaneval')}-{language}", family, language
            known = difflib.get_close_matches(word, [*languages, *ALIASES], n=1)
            fix = f"did you mean {family}-{known[0]}?" if known else f"languages: {languages}"
            if language in LANGUAGES:
                fix = f"its languages are {', '.join(languages)}; multipl-e-{language} is another"
            raise DataError(
                f"there is no benchmark {name}",
                f"{family} is known here in {', '.join(languages)}",
                fix,
            )
    whole = [*PLAIN, *(f"{family}-{x}" for family, known in FAMILIES.items() for x in known)]
    near = difflib.get_close_matches(asked, whole, n=1)
    raise DataError(
        f"there is no benchmark {name}",
        f"the benchmarks are {', '.join(NAMES)}",
        f"did you mean {near[0]}?" if near else "give one of these names",
    )


def _first(benchmark: Benchmark, limit: int) -> Benchmark:
    count = len(benchmark.tasks)
    if limit < count:
        log.info("%s: the first %d of %d tasks (limit)", benchmark.name, limit, count)
    source = {**benchmark.source, "limit": limit, "of": count}
    return replace(benchmark, tasks=benchmark.tasks[:limit], source=source)
