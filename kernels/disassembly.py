"""Reads what nvdisasm prints and AMD's assembly text: which instructions, and which loops they form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

LOADS = re.compile(r"(LDG|LDGSTS)\b|UTMALDG|(global|buffer)_load_")
WIDE_LOADS = re.compile(r"(LDG|LDGSTS)\b\S*\.(128|256)|UTMALDG|(global|buffer)_load_\w*dwordx4")
SPILLS = re.compile(r"(LDL|STL)\b")
# A label, or an instruction: predicate, opcode, operands. NVIDIA's `@!PT` marks a no-op.
LINE = re.compile(
    r"^(?P<label>\.L\w+):"
    r"|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\d+\s+)?(?P<nvidia>[A-Z][A-Z0-9_.]+)(?P<to>[^;]*)"
    r"|^\s+(?P<amd>(?:v|s|global|buffer|ds|scratch)_\w+)(?P<amd_to>.*)",
    re.M,
)
BRANCH = re.compile(r"BRA\b|s_c?branch")
END = re.compile(r"(EXIT|RET)\b|s_endpgm")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: where it may go, if it branches, and whether the next may follow."""

    opcode: str
    target: str | None
    falls_through: bool


@dataclass(frozen=True)
class Code:
    """The instructions of a disassembly in order, and at which of them each label stands."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def count(self, pattern: re.Pattern[str]) -> int:
        """Number of instructions whose opcode begins with `pattern`."""
        return _count(self.instructions, pattern)

    def narrow_loops(self) -> int:
        """Number of loops that load from global memory, but never 128 bits at once."""
        return sum(
            _count(loop, LOADS) > 0 and _count(loop, WIDE_LOADS) == 0 for loop in self.loops()
        )

    def loops(self) -> list[list[Instruction]]:
        """The natural loops. Compilers move blocks, so a branch backwards alone is no loop: the
        place it goes to must lie on every way to the branch."""
        starts = self._block_starts()
        ends = [*starts[1:], len(self.instructions)]
        after = [self._after(starts, end - 1) for end in ends]
        before: list[list[int]] = [[] for _ in starts]
        for block, following in enumerate(after):
            for other in following:
                before[other].append(block)
        dominators = _dominators(before)
        found = []
        for block, following in enumerate(after):
            for head in following:
                if dominators[block] >> head & 1:
                    blocks = sorted(_body(head, block, before))
                    found.append(
                        [i for b in blocks for i in self.instructions[starts[b] : ends[b]]]
                    )
        return found

    def _block_starts(self) -> list[int]:
        cuts = {i + 1 for i, x in enumerate(self.instructions) if x.target or not x.falls_through}
        return sorted(i for i in {0, *self.labels.values()} | cuts if i < len(self.instructions))

    def _after(self, starts: list[int], last: int) -> list[int]:
        instruction = self.instructions[last]
        places = [last + 1] if instruction.falls_through else []
        if instruction.target in self.labels:
            places.append(self.labels[instruction.target])
        block_at = {start: block for block, start in enumerate(starts)}
        return [block_at[place] for place in places if place in block_at]


def read(text: str) -> Code:
    """Parse the output of nvdisasm, or the text of an amdgcn kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in LINE.finditer(text):
        if line["label"]:
            labels[line["label"]] = len(instructions)
            continue
        opcode, operands = line["nvidia"] or line["amd"], line["to"] or line["amd_to"] or ""
        place = re.search(r"\.L\w+", operands) if BRANCH.match(opcode) else None
        # `@P0 BRA x`, `BRA.U UP0, x`, `BRA.DIV UR4, x`, s_cbranch_*: only under a condition
        conditional = bool(line["predicate"]) or "," in operands or "cbranch" in opcode
        leaves = END.match(opcode) or place
        instructions.append(
            Instruction(opcode, place[0] if place else None, conditional or not leaves)
        )
    return Code(instructions, labels)


def _count(instructions: Iterable[Instruction], pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.match(i.opcode)) for i in instructions)


def _dominators(before: list[list[int]]) -> list[int]:
    """For each block the set, as bits, of blocks that lie on every way to it from the first. What
    no way leads to (other functions of the binary) keeps all bits, and forms no loop of ours."""
    everything = (1 << len(before)) - 1
    found = [1] + [everything] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(before)):
            common = everything
            for other in before[block]:
                common &= found[other]
            now = common | 1 << block
            changed |= now != found[block]
            found[block] = now
    return found


def _body(head: int, tail: int, before: list[list[int]]) -> set[int]:
    inside, waiting = {head}, [tail]
    while waiting:
        block = waiting.pop()
        if block not in inside:
            inside.add(block)
            waiting += before[block]
    return inside
