"""What a compiled program contains: the shapes of its arrays, and its collectives."""

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
_LOOP = re.compile(r'body=%?([\w.-]+).*"known_trip_count":\{"n":"(\d+)"\}')
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\])")  # groups of one device
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
      in_layer: whether it is in a loop over layers.
    """

    opcode: str
    shapes: frozenset[Shape]
    elements: int
    largest: int
    in_layer: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of a compiled program, as each device runs them.

    Attributes:
      shapes: the shapes of all arrays.
      collectives: see `Collective`.
    """

    shapes: frozenset[Shape]
    collectives: tuple[Collective, ...]

    @classmethod
    def of(cls, compiled: Any, layers: Collection[int]) -> "Program":
        """Read the text of a compiled function.

        Args:
          compiled: the function.
          layers: the numbers of layers. A loop of so many turns is a loop over layers.
        """
        computations, entry = _computations(compiled.as_text())
        inside = _in_loops(computations, entry, layers)
        shapes: set[Shape] = set()
        collectives = []
        for name, lines in computations.items():
            for line in lines:
                if not (found := _INSTRUCTION.match(line)):
                    continue
                sizes = [_sizes(text) for text in _SHAPE.findall(found[1])]
                plain = [tuple(sorted(size for size in each if size > 1)) for each in sizes]
                shapes.update(plain)
                opcode = found[2].removesuffix("-start")
                if opcode in _COLLECTIVES and not _ALONE.search(line):
                    counts = [math.prod(each) for each in sizes]
                    collectives.append(
                        Collective(
                            opcode, frozenset(plain), sum(counts), max(counts), name in inside
                        )
                    )
        return cls(frozenset(shapes), tuple(collectives))


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


def _in_loops(computations: dict[str, list[str]], entry: str, turns: Collection[int]) -> set[str]:
    """Return the computations that run only in loops of so many turns."""

    def called(name: str) -> list[str]:
        return [
            other
            for line in computations[name]
            for others in _CALLED.findall(line)
            for other in re.findall(r"[\w.-]+", others)
        ]

    def reachable(name: str, without: Collection[str] = ()) -> set[str]:
        found, pending = {name}, [name]
        while pending:
            new = {*called(pending.pop())} - found - {*without}
            found |= new
            pending += new
        return found

    bodies = {
        loop[1]
        for lines in computations.values()
        for line in lines
        if (loop := _LOOP.search(line)) and int(loop[2]) in turns
    }
    return {name for body in bodies for name in reachable(body)} - reachable(entry, bodies)
