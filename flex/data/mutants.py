"""Small faults put into a correct solution. Tests worth their name notice at least one of them."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}

_JAVA_TEXT = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|//[^\n]*|/\*.*?\*/", re.DOTALL)
_JAVA_SWAPS = {
    "==": "!=",
    "!=": "==",
    "<": ">=",
    ">=": "<",
    ">": "<=",
    "<=": ">",
    "&&": "||",
    "||": "&&",
    "%": "/",
    "/": "*",
    "*": "+",
    "-": "+",
    "+": "-",
    "true": "false",
    "false": "true",
}
_Fault = tuple[re.Pattern[str], Callable[[str], str]]
# Where, and what to. Operators go first: a changed integer may be no more than a spare capacity. The spaces
# around operators keep generics and arrows out; a `+` may join strings, so it goes after what always compiles.
_JAVA_FAULTS: tuple[_Fault, ...] = (
    (re.compile(r"(?<=\s)(?:==|!=|<=|>=|<|>|&&|\|\||[%*-])(?=\s)"), _JAVA_SWAPS.__getitem__),
    (re.compile(r"(?<=\bif \().+(?=\) \{$)", re.MULTILINE), "!({})".format),
    (re.compile(r"\b(?:true|false)\b"), _JAVA_SWAPS.__getitem__),
    (re.compile(r"(?<=[ (])[0-9]+(?=[;,) ])"), lambda old: str(int(old) + 1)),
    (re.compile(r'"_*"'), lambda old: f'{old[:-1]}x"'),
    (re.compile(r"(?<=\s)[+/](?=\s)"), _JAVA_SWAPS.__getitem__),
    (re.compile(r"(?<=\breturn )[^;]+(?=;)"), "1 + ({})".format),
    (re.compile(r"(?<=\breturn )[^;]+(?=;)"), "!({})".format),
    (re.compile(r"(?<=\breturn )[^;]+(?=;)"), lambda old: "null"),
)


def python_mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield (what was changed, mutated program), one change each, in the order of the source.

    Changed are comparisons, arithmetic, bit and logical operators, constants (integers by one,
    booleans negated, strings lengthened) and return values (to None).
    """
    tree = ast.parse(source)
    for index, node in enumerate(ast.walk(tree)):
        for slot in _slots(node):
            mutant = copy.deepcopy(tree)
            change = _change(list(ast.walk(mutant))[index], slot)
            if change:
                where = getattr(node, "lineno", 0)
                yield f"line {where}: {change}", ast.unparse(mutant)


def _slots(node: ast.AST) -> range:
    return range(len(node.ops) if isinstance(node, ast.Compare) else 1)


def _change(node: ast.AST, slot: int) -> str | None:
    """Change the node in place and say how; None where there is nothing to change."""
    if isinstance(node, ast.Compare):
        old: ast.AST = node.ops[slot]
        node.ops[slot] = _SWAPS[type(old)]()  # type: ignore[call-overload]
        return f"{type(old).__name__} to {type(node.ops[slot]).__name__}"
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
        old = node.op
        node.op = _SWAPS[type(old)]()  # type: ignore[assignment]
        return f"{type(old).__name__} to {type(node.op).__name__}"
    if isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        node.value = ast.Constant(None)
        return "return None"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | str):
        value = node.value
        node.value = (
            not value
            if isinstance(value, bool)
            else value + 1
            if isinstance(value, int)
            else value + "x"
        )
        return f"{value!r} to {node.value!r}"
    return None


def java_mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield (what was changed, mutated program), one change each; some of them do not compile.

    Changed are operators, conditions, constants and, last of all, returned values.
    """
    masked = _JAVA_TEXT.sub(_mask, source)
    for pattern, change in _JAVA_FAULTS:
        for match in pattern.finditer(masked):
            start, end = match.span()
            old, line = source[start:end], source.count("\n", 0, start) + 1
            if (new := change(old)) != old:
                what = " ".join(f"line {line}: {old} to {new}".split())
                yield what, source[:start] + new + source[end:]


def _mask(text: re.Match[str]) -> str:
    """Blank a comment, and fill a literal, so that nothing in them looks like code."""
    if text[0][0] == "/":
        return re.sub(r"[^\n]", " ", text[0])
    return text[0][0] + "_" * (len(text[0]) - 2) + text[0][-1]
