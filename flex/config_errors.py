"""What is wrong with a configuration, in three parts: the words behind `flex.config_io`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from flex.errors import ConfigError
from flex.options import OPTIONS, SECTIONS, suggest

RECIPES = Path(__file__).parent / "recipes"
_SHOW = "`python -m flex config show` lists every option with its meaning"


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it."""

    value: Any
    origin: Literal["file", "override"]
    place: str  # for messages: "in run.yaml", "on the command line"


def invalid(error: ValidationError, given: Mapping[str, Given]) -> ConfigError:
    """The first problem in full, the others by their keys."""
    problems: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        problems.setdefault(_key(item["loc"]), []).append(item)
    key, items = next(iter(problems.items()))
    others = [name for name in problems if name != key]
    more = f" (also wrong: {', '.join(others)})" if others else ""
    if key not in OPTIONS:  # a rule across options
        return ConfigError(
            items[0]["msg"].removeprefix("Value error, ") + more,
            "these options contradict each other",
            f"change one of them; {_SHOW}",
        )
    value = given[key].value if key in given else items[0]["input"]
    rule = " or ".join(dict.fromkeys(map(_rule, items)))
    place = given[key].place if key in given else "by default"
    return ConfigError(
        f"{key} = {short(value)} ({place}) is not allowed{more}",
        f"{key}: {rule}",
        _fix(key, value),
    )


def _rule(item: Any) -> str:
    """Pydantic's message in our words: its tuple is the user's list."""
    context = item.get("ctx", {})
    match item["type"]:
        case "tuple_type":
            return "must be a list"
        case "too_short" | "too_long":
            bound = context.get("min_length", context.get("max_length"))
            return f"the list must not have {context['actual_length']} items but {bound}"
        case "missing":
            return "the list has too few items"
        case "string_type":
            return "must be text"
        case "string_pattern_mismatch":
            return f"must match the pattern {context['pattern']}"
    return item["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)


def _fix(key: str, value: Any) -> str:
    annotation = OPTIONS[key].annotation
    if isinstance(value, str):
        if near := get_close_matches(value, _choices(annotation), n=1):
            return f"did you mean {key}={near[0]}? {_SHOW}"
        if str(annotation).startswith("tuple"):
            return f"write a list: '{key}=[{value}]'"
    elif value is not None and OPTIONS[key].is_text:
        return f"put the value of {key} in quotes; {_SHOW}"
    return f"give an allowed value, {key}=VALUE; {_SHOW}"


def _choices(annotation: Any) -> list[str]:
    return [arg for arg in get_args(annotation) if isinstance(arg, str)]


def _key(location: tuple[int | str, ...]) -> str:
    """The option a pydantic location lies in; its section, or "", for a rule across options."""
    for end in range(len(location), 0, -1):
        key = ".".join(map(str, location[:end]))
        if key in OPTIONS or key in SECTIONS:
            return key
    return ""


def unknown_option(key: str, place: str) -> ConfigError:
    why = "an ignored option would be a run that you did not ask for"
    near = suggest(key)
    if near == key:  # only in a file: `optim.lr: 1`
        section, _, name = key.rpartition(".")
        fix = f"nest it: `{section}:` and below it `  {name}: ...`"
    elif near is None:
        fix = _SHOW
    else:
        fix = f"did you mean `{near}`? {_SHOW}"
    return ConfigError(f"there is no option `{key}` ({place})", why, fix)


def not_a_section(key: str, value: Any, place: str) -> ConfigError:
    inside = [option for option in OPTIONS if option.startswith(key + ".")]
    main = f"{key}.name" if f"{key}.name" in inside else inside[0]
    return ConfigError(
        f"`{key}` is a section, not a single value: {short(value)} ({place})",
        f"its options are {', '.join(inside)}",
        f"did you mean {main}={short(value)}?",
    )


def nearest_file(path: Path) -> str:
    known = [*_yaml_files(path.parent), *_yaml_files(RECIPES)]
    names = {file.name: file for file in reversed(known)}
    wanted = path.name if path.suffix else path.name + ".yaml"
    if near := get_close_matches(wanted, names, n=1):
        return f"did you mean {names[near[0]]}?"
    return f"give one of {', '.join(sorted(map(str, known)))}" if known else "check the path"


def _yaml_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:
        return []


def short(value: Any) -> str:
    """`value` as YAML would have it, cut to a line."""
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 40:
        return value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)
