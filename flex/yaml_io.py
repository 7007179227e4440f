"""YAML as people expect it (YAML 1.2 scalars), and strict: no duplicate keys, no aliases, no tags.

PyYAML reads YAML 1.1: there `1e-4` is a string, `off` is False, `1:30` is 90, and of a key given
twice the last one wins silently.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", [*"-+0123456789"]),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            _refuse("aliases (*name) and tags (!name) are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_map(self, node: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                _refuse(f"the key {key!r} is not text", key_node.start_mark)
            if key in result:
                _refuse(f"the key `{key}` is given twice", key_node.start_mark)
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def construct_int(self, node: Any) -> int:
        return int(node.value)  # 010 is ten, not eight


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}


def _refuse(message: str, mark: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=message, problem_mark=mark)


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_map)
_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
)


def parse(text: str) -> Any:
    """The value that `text` denotes; raises yaml.YAMLError that says what is wrong and where."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise yaml.YAMLError(str(error)) from None


def dump(value: Any) -> str:
    """Text that `parse` reads as an equal value (tuples as lists), keys in their given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)
