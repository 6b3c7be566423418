"""A compiled program's HLO text, parsed into computations and instructions. Nothing here counts."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2} | {
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")
_CALLED = re.compile(r"\b(calls|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of a result. `hbm` is False where the compiler keeps the array in a nearer memory."""

    dtype: str
    dims: tuple[int, ...]
    hbm: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.dims) * _BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `literal` is the text in its brackets: a constant's value or a parameter's number."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]


def arrays_of(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (dtype, dims) of every array named in a program."""
    for dtype, dims, _ in _ARRAY.findall(text):
        if dims and dtype in _BYTES:
            yield dtype, tuple(map(int, dims.split(",")))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parse a program: its computations by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (found := _COMPUTATION.match(line)):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[2]] = _instruction(found, line[found.end() :])
    return computations, entry


def _instruction(found: re.Match, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing(rest, -1)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    arrays = tuple(
        Array(dtype, tuple(map(int, dims.split(","))) if dims else (), "S(" not in layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    )
    return Instruction(found[2], arrays, opcode, operands, rest[:end], rest[end + 1 :], bool(found[1]))


def _closing(text: str, start: int) -> int:
    """Position of the bracket that closes the one opened at `start`; -1 is a bracket just before the text."""
    depth = 1 if start < 0 else 0
    for place in range(max(start, 0), len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def called(instruction: Instruction) -> list[str]:
    return [name for _, names in _CALLED.findall(instruction.attributes) for name in re.findall(r"%([\w.\-]+)", names)]


def groups(pattern: str, instruction: Instruction) -> tuple[str, ...]:
    """Return the groups of a pattern that this kind of instruction always has among its attributes."""
    found = re.search(pattern, instruction.attributes)
    if found is None:
        raise ValueError(f"{instruction.name}: no {pattern} in {instruction.attributes[:200]}")
    return found.groups()
