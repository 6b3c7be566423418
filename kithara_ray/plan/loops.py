"""Count how often a loop of a compiled program runs its body.

XLA's text seldom states the count. The loop's own arithmetic does: a counter starts at a constant, the body adds a
constant to it, and the condition compares it with a constant. A scan's counter goes from 0 in steps of 1. That of a
windowed product, which overlaps a gather with its parts, goes in steps of 2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kithara_ray.plan.hlo_text import Computation, Instruction, called, groups

_UNCHANGED = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


@dataclass(frozen=True)
class _Sum:
    """A scalar: the value of one element of the computation's parameter, if there is one, plus a constant."""

    element: int | None
    constant: int


def trips(loop: Instruction, around: Computation, computations: Mapping[str, Computation]) -> int:
    """Count the runs of a loop's body.

    XLA's own count comes first, if the text has it. Otherwise start, step and limit of the counter decide. A loop
    whose counter is not found runs as often as the largest constant of its condition says, or once.

    Args:
        loop: the `while` instruction.
        around: the computation that holds it.
        computations: all computations of the program, by name.
    """
    known = re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = computations[groups(r"condition=%([\w.\-]+)", loop)[0]]
    body = computations[groups(r"body=%([\w.\-]+)", loop)[0]]
    if counted := _counted(loop, around, condition, body, computations):
        return counted
    constants = (i.literal for i in condition.values() if i.opcode == "constant" and i.arrays[0].dims == ())
    return max((int(m[0]) for text in constants if (m := re.match(r"\d+", text))), default=1)


def _counted(
    loop: Instruction,
    around: Computation,
    condition: Computation,
    body: Computation,
    computations: Mapping[str, Computation],
) -> int | None:
    """Compute the runs from the counter's start, step and limit; None if one of them is not a constant."""
    compared = _compared(condition, computations)
    if compared is None:
        return None
    element, limit, direction = compared
    after = _element(_root(body), body, element, computations)
    if after is None or after.element != element or after.constant == 0:
        return None
    start = _Sum(None, 0)
    if loop.operands and loop.operands[0] in around and around[loop.operands[0]].opcode == "tuple":
        found = _element(around[loop.operands[0]], around, element, computations)
        start = found if found is not None and found.element is None else start
    reach = (limit - start.constant) * (1 if after.constant > 0 else -1)
    step = abs(after.constant)
    return max(reach // step + 1 if direction in ("LE", "GE") else -(-reach // step), 0)


def _compared(condition: Computation, computations: Mapping[str, Computation]) -> tuple[int, int, str] | None:
    """Find what a condition compares: (element of the loop's state, constant, direction)."""
    root = _root(condition)
    arguments: Mapping[str, _Sum | None] = {}
    within = condition
    if root.opcode == "fusion":
        within = computations[called(root)[0]]
        arguments = _arguments(root, within, condition, computations, {})
        root = _root(within)
    direction = re.search(r"direction=(\w\w)", root.attributes)
    if root.opcode != "compare" or direction is None:
        return None
    left, right = (_value(name, within, computations, arguments) for name in root.operands[:2])
    if left is None or right is None:
        return None
    if left.element is not None and right.element is None:
        return left.element, right.constant - left.constant, direction[1]
    if right.element is not None and left.element is None:
        turned = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
        return right.element, left.constant - right.constant, turned.get(direction[1], direction[1])
    return None


def _element(
    made: Instruction, within: Computation, element: int, computations: Mapping[str, Computation]
) -> _Sum | None:
    """One element of a tuple that a computation makes; of a computation's scalar result, the result itself."""
    if made.opcode == "tuple":
        return _value(made.operands[element], within, computations, {})
    return _value(made.name, within, computations, {}) if len(made.arrays) == 1 else None


def _value(
    name: str,
    within: Computation,
    computations: Mapping[str, Computation],
    arguments: Mapping[str, _Sum | None],
) -> _Sum | None:
    """Evaluate a scalar of a computation; None if it is no element of the parameter plus a constant.

    Args:
        arguments: the values of a fusion's parameters, by name; empty in a loop's condition and body.
    """
    if name in arguments:
        return arguments[name]
    instruction = within.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        literal = re.fullmatch(r"\s*(-?\d+)\s*", instruction.literal)
        return _Sum(None, int(literal[1])) if literal else None
    if instruction.opcode == "parameter":
        return _Sum(0, 0) if instruction.literal.strip() == "0" and len(instruction.arrays) == 1 else None
    if instruction.opcode == "get-tuple-element":
        source = within.get(instruction.operands[0])
        index = re.search(r"index=(\d+)", instruction.attributes)
        return _Sum(int(index[1]), 0) if source is not None and source.opcode == "parameter" and index else None
    if instruction.opcode in _UNCHANGED:
        return _value(instruction.operands[0], within, computations, arguments)
    if instruction.opcode in ("add", "subtract"):
        left, right = (_value(operand, within, computations, arguments) for operand in instruction.operands)
        return _sum(left, right, 1 if instruction.opcode == "add" else -1)
    if instruction.opcode == "fusion" and len(instruction.arrays) == 1:
        inner = computations[called(instruction)[0]]
        return _value(
            _root(inner).name, inner, computations, _arguments(instruction, inner, within, computations, arguments)
        )
    return None


def _sum(left: _Sum | None, right: _Sum | None, sign: int) -> _Sum | None:
    if left is None or right is None or (right.element is not None and (sign < 0 or left.element is not None)):
        return None
    return _Sum(right.element if left.element is None else left.element, left.constant + sign * right.constant)


def _arguments(
    fusion: Instruction,
    inner: Computation,
    within: Computation,
    computations: Mapping[str, Computation],
    arguments: Mapping[str, _Sum | None],
) -> dict[str, _Sum | None]:
    """The values of a fusion's scalar parameters, by the parameters' names."""
    found: dict[str, _Sum | None] = {}
    for parameter in inner.values():
        if parameter.opcode == "parameter":
            scalar = len(parameter.arrays) == 1 and parameter.arrays[0].dims == ()
            operand = fusion.operands[int(parameter.literal)]
            found[parameter.name] = _value(operand, within, computations, arguments) if scalar else None
    return found


def _root(computation: Computation) -> Instruction:
    """The instruction whose result a computation returns: the marked one, else the last."""
    return next((i for i in computation.values() if i.is_root), list(computation.values())[-1])
