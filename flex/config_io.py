"""Configuration files: YAML plus `key=value` overrides in, a validated RunConfig out, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from flex import yaml_io
from flex.config import PENALTY_PRESETS, RunConfig
from flex.config_errors import Given, invalid, nearest_file, not_a_section, short, unknown_option
from flex.errors import ConfigError
from flex.options import OPTIONS, SECTIONS, suggest

# Options that cannot change what is learnt; the rest is hashed. ZeRO shards the same maths, and
# implementations of a kernel differ in rounding.
_BOOKKEEPING = {
    *("name", "dir", "track", "resume", "deepspeed"),
    *("kernels.impl", "profile.tool", "profile.steps"),
    *("train.eval_every", "train.eval_batch_size", "train.save_every", "train.keep"),
    *("train.log_every", "train.sample_prompt", "train.warm_up_longest"),
    *("eval.every", "eval.benchmark", "eval.path", "eval.limit", "eval.max_new_tokens"),
    "penalty.preset",  # its fields are in the hash, resolved
    *("data.path", "data.validation_path"),  # files may move; the run folder knows their contents
}


@dataclass(frozen=True)
class Resolved:
    """An option as the run will see it."""

    key: str
    value: Any
    origin: Literal["default", "preset", "file", "override"]
    description: str


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (None: only defaults), apply `key=value` overrides and validate.

    Raises ConfigError for anything that is wrong with either: a missing file, broken YAML, a key
    that does not exist or is given twice, a value that is not allowed.
    """
    return _validate(_given(path, overrides))


def dump_config(config: RunConfig) -> str:
    """YAML of every option, resolved; `load_config` reads it back as an equal configuration."""
    return yaml_io.dump(config.model_dump())


def config_hash(config: RunConfig) -> str:
    """sha256 (64 hex digits) over the options that affect the maths, equal across machines."""
    flat = flatten(config)
    maths = {key: value for key, value in flat.items() if key not in _BOOKKEEPING}
    return hashlib.sha256(json.dumps(maths, sort_keys=True).encode()).hexdigest()


def origins(path: str | None = None, overrides: Sequence[str] = ()) -> list[Resolved]:
    """Every option in declaration order with its resolved value, where that comes from, and what
    it means. Raises ConfigError as `load_config` does."""
    given = _given(path, overrides)
    config = _validate(given)
    preset = PENALTY_PRESETS[config.penalty.preset]

    def origin(key: str, value: Any) -> Literal["default", "preset", "file", "override"]:
        # `lr: null` asks for the optimizer's default, so the value is not the file's
        if key in given and (given[key].value is not None or value is None):
            return given[key].origin
        section, _, name = key.rpartition(".")
        return "preset" if section == "penalty" and name in preset else "default"

    return [
        Resolved(key, value, origin(key, value), OPTIONS[key].description)
        for key, value in flatten(config).items()
    ]


def flatten(config: RunConfig) -> dict[str, Any]:
    """{dotted key: value} of every option, in declaration order."""

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    return {key: value(key) for key in OPTIONS}


# -- reading ---------------------------------------------------------------------------------------


def _given(path: str | None, overrides: Sequence[str]) -> dict[str, Given]:
    given = dict(_walk_file(read_mapping(path), "", path)) if path is not None else {}
    seen: set[str] = set()
    for text in overrides:
        key, value = _parse_override(text)
        if key in seen:
            raise ConfigError(
                f"the override `{key}` is given twice",
                "one of the two values would be ignored",
                f"keep one {key}=VALUE",
            )
        seen.add(key)
        given[key] = Given(value, "override", "on the command line")
    return given


def read_mapping(path: str) -> dict[str, Any]:
    """The YAML mapping in a file; empty for an empty file. Raises ConfigError."""
    try:
        content = yaml_io.parse(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"the configuration file {path} does not exist",
            "a run needs its configuration",
            nearest_file(Path(path)),
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise ConfigError(
            f"{path!r} cannot be read as text: {error}",
            "a configuration is a YAML text file in UTF-8",
            "give the path of a .yaml file, for example one of flex/recipes/",
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}{_line(error)}: {getattr(error, 'problem', None) or error}",
            "the file is not a YAML mapping of options",
            "correct that line; the files in flex/recipes/ are examples",
        ) from None
    if content is None:  # empty, or nothing but comments
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds {short(content)}, not a mapping",
            "a configuration is a YAML mapping of options",
            "write lines such as `seed: 1`, or `optim:` and below it `  lr: 1e-4`",
        )
    return content


def _walk_file(node: dict[str, Any], prefix: str, path: str) -> Iterable[tuple[str, Given]]:
    for name, value in node.items():
        key = prefix + name
        # A name with a dot is never an option: `optim.lr: 1` in a file would hide from its section.
        if key in OPTIONS and "." not in name:
            yield key, Given(value, "file", f"in {path}")
        elif key not in SECTIONS or "." in name:
            raise unknown_option(key, f"in {path}")
        elif isinstance(value, dict):
            yield from _walk_file(value, key + ".", path)
        elif value is not None:  # a section with all its lines commented out is empty
            raise not_a_section(key, value, f"in {path}")


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals:
        near = suggest(key)
        raise ConfigError(
            f"`{text}` is not key=value",
            "what follows the subcommand's options are overrides of the configuration",
            f"write {near or 'optim.lr'}=VALUE, without spaces",
        )
    if key in SECTIONS:
        raise not_a_section(key, raw, "on the command line")
    if key not in OPTIONS:
        raise unknown_option(key, "on the command line")
    if OPTIONS[key].is_text:  # as it stands: a path may hold `#` or `: `, and name=1e4 is "1e4"
        absent = raw == "" or (raw in ("~", "null") and OPTIONS[key].annotation is not str)
        return key, None if absent else raw
    try:
        return key, yaml_io.parse(raw)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{key}={raw} cannot be read: {getattr(error, 'problem', None) or error}",
            "a value is written as in YAML",
            f"quote it for the shell, for example '{key}=[a, b]' for a list",
        ) from None


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


# -- validating ------------------------------------------------------------------------------------


def _validate(given: Mapping[str, Given]) -> RunConfig:
    tree: dict[str, Any] = {}
    for key, item in given.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        # YAML knows lists only, every sequence option is a tuple, and strict mode tells them apart
        node[name] = tuple(item.value) if isinstance(item.value, list) else item.value
    try:
        # strict: no "8" for 8, no true for 1
        return RunConfig.model_validate(tree, strict=True)
    except ValidationError as error:
        raise invalid(error, given) from None
