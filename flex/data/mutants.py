"""Small faults put into a correct solution. Tests worth their name notice at least one of them."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator

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

# Text that must stay as it is, then the operators and values; the spaces keep generics and arrows out.
_JAVA = re.compile(
    r"""(?P<keep>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|//[^\n]*|/\*.*?\*/)"""
    r"""|(?<=\s)(?P<operator>==|!=|<=|>=|<|>|&&|\|\||%|\*|-)(?=\s)"""
    r"""|\b(?P<value>true|false)\b|(?<=[ (])(?P<number>[0-9]+)(?=[;,) ])""",
    re.DOTALL,
)
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
    "*": "+",
    "-": "+",
    "true": "false",
    "false": "true",
}


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
    if isinstance(node, ast.Return) and node.value is not None:
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


def java_mutant(source: str) -> tuple[str, str] | None:
    """(what was changed, mutated program) of the first operator, or else value, that can be changed.

    Operators go first: a changed integer may be no more than a spare capacity.
    """
    found = [match for match in _JAVA.finditer(source) if not match["keep"]]
    found.sort(key=lambda match: ("operator", "value", "number").index(str(match.lastgroup)))
    for match in found:
        old = match[0]
        new = _JAVA_SWAPS.get(old) or str(int(old) + 1)
        line = source.count("\n", 0, match.start()) + 1
        return f"line {line}: {old} to {new}", source[: match.start()] + new + source[match.end() :]
    return None
