"""What a compiled program contains: the shapes of its arrays, and its collectives."""

import dataclasses
import math
import re
from typing import Any

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
)

Shape = tuple[int, ...]  # the sizes of an array in ascending order, without ones


@dataclasses.dataclass(frozen=True)
class Collective:
    """An instruction that moves arrays between devices.

    Attributes:
      opcode: such as `all-gather`.
      shapes: the shapes of its results.
      elements, largest: the number of elements of all its results, and of the largest one.
      in_inner_loop: whether it is in a loop without a loop inside.
    """

    opcode: str
    shapes: frozenset[Shape]
    elements: int
    largest: int
    in_inner_loop: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of a compiled program, as each device runs them.

    Attributes:
      shapes: the shapes of all arrays.
      shapes_outside_inner_loops: those of arrays that exist outside of loops without a loop inside.
      collectives: see `Collective`.
    """

    shapes: frozenset[Shape]
    shapes_outside_inner_loops: frozenset[Shape]
    collectives: tuple[Collective, ...]

    @classmethod
    def of(cls, compiled: Any) -> "Program":
        """Read the text of a compiled function."""
        computations, entry = _computations(compiled.as_text())
        inner = _inner_loops(computations, entry)
        shapes: dict[bool, set[Shape]] = {True: set(), False: set()}
        collectives = []
        for name, lines in computations.items():
            for line in lines:
                if not (found := _INSTRUCTION.match(line)):
                    continue
                sizes = [_sizes(text) for text in _SHAPE.findall(found[1])]
                plain = [tuple(sorted(size for size in each if size > 1)) for each in sizes]
                shapes[name in inner].update(plain)
                opcode = found[2].removesuffix("-start")
                if opcode in _COLLECTIVES:
                    counts = [math.prod(each) for each in sizes]
                    collectives.append(
                        Collective(
                            opcode, frozenset(plain), sum(counts), max(counts), name in inner
                        )
                    )
        outside = frozenset(shapes[False])
        return cls(outside | shapes[True], outside, tuple(collectives))


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation, and the name of the first one to run."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)
    assert entry, "not the text of a compiled program"
    return computations, entry


def _inner_loops(computations: dict[str, list[str]], entry: str) -> set[str]:
    """Return the computations that run only in loops without a loop inside."""

    def called(name: str) -> list[tuple[str, str]]:
        return [
            (how, other)
            for line in computations[name]
            for how, others in _CALLED.findall(line)
            for other in re.findall(r"[\w.-]+", others)
        ]

    def reachable(name: str) -> set[str]:
        return {name}.union(*(reachable(other) for _, other in called(name)))

    bodies = {
        other
        for name in computations
        for how, other in called(name)
        if how == "body"
        and not any(how == "body" for n in reachable(other) for how, _ in called(n))
    }
    inside = set().union(*map(reachable, bodies)) if bodies else set()
    # A computation that is also called from elsewhere is not only in these loops.
    outside, pending = {entry}, [entry]
    while pending:
        for _, other in called(pending.pop()):
            if other not in bodies and other not in outside:
                outside.add(other)
                pending.append(other)
    return inside - outside
