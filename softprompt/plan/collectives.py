"""The bytes that a compiled program moves between devices, read from its text (HLO)."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

# For each collective: the bytes that a device sends, given the bytes of the result on one device
# and the number n of devices in a group. All but the last are formulas of ring algorithms. No
# algorithm sends less for large arrays.
_SENT: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
COLLECTIVES = tuple(_SENT)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count"\s*:\s*\{"n"\s*:\s*"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUP_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_AXIS_IN_GROUP = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")


class _Instruction(NamedTuple):
    kind: str  # the type of the result
    operation: str
    rest: str  # operands and attributes


@dataclasses.dataclass
class _Program:
    computations: dict[str, list[_Instruction]]
    entry: str
    devices: int


class _Collective(NamedTuple):
    name: str
    sent: float  # bytes, each time it runs
    runs: int


def bytes_moved(text: str, devices: int) -> dict[str, int]:
    """Return the bytes that each device sends in one run of a program, by kind of collective.

    Args:
      text: the compiled program, `compiled.as_text()`.
      devices: the number of devices.

    Returns:
      Bytes for each of `COLLECTIVES` that occurs. A loop counts as often as it runs.

    Raises:
      ValueError: if the number of runs of a loop with collectives is not in the program.
    """
    program = _parse(text, devices)
    totals: Counter[str] = Counter()
    for name, sent, runs in _collectives(program, program.entry, None):
        totals[name] += round(sent * runs)
    return {name: totals[name] for name in COLLECTIVES if name in totals}


def _parse(text: str, devices: int) -> _Program:
    program = _Program({}, "", devices)
    current: list[_Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = program.computations[header[2]] = []
            if header[1]:
                program.entry = header[2]
        elif instruction := _INSTRUCTION.match(line):
            current.append(_Instruction(*instruction.groups()))
    return program


def _collectives(program: _Program, name: str, fused: set[str] | None) -> Iterator[_Collective]:
    """Yield the collectives of a computation and of those that it calls.

    Args:
      program: the program.
      name: the computation.
      fused: for a fusion the channels of the collectives in the fusions before it, else None. A TPU
        spreads one collective over several fusions, and each of them contains it.
    """
    fused_here: set[str] = set()
    for kind, operation, rest in program.computations[name]:
        collective = operation.removesuffix("-start")
        if collective in _SENT:
            channel = _CHANNEL.search(rest)
            if fused is not None and channel:
                if channel[1] in fused:
                    continue
                fused.add(channel[1])
            yield _collective(collective, kind, operation, rest, name, program.devices)
        if operation.endswith(("-done", "-update")):
            continue  # its start has been counted
        called = [inner for match in _CALLED.findall(rest) for inner in _names(match)]
        inside = [
            found
            for inner in called
            if inner in program.computations
            for found in _collectives(program, inner, fused_here if operation == "fusion" else None)
        ]
        trips = _trip_count(program, rest) if inside and operation == "while" else 1
        yield from (found._replace(runs=found.runs * trips) for found in inside)


def _collective(
    name: str, kind: str, operation: str, rest: str, computation: str, devices: int
) -> _Collective:
    sizes = [_bytes(*array) for array in _ARRAY.findall(kind)]
    if operation in ("all-gather-start", "collective-permute-start"):
        # A tuple of the operands, the results and, for a permutation, two numbers of 4 bytes.
        sizes = [size for size in sizes if size > 4] if len(sizes) > 2 else sizes
        sizes = sizes[len(sizes) // 2 :]
    group = _group_size(rest, devices)
    if name == "all-reduce" and "all-reduce-scatter" in computation:
        # A fusion in which each device keeps only its part of the sum.
        return _Collective("reduce-scatter", sum(sizes) * (group - 1) / group, 1)
    return _Collective(name, _SENT[name](sum(sizes), group), 1)


def _names(text: str) -> list[str]:
    return [name.strip().removeprefix("%") for name in text.strip("{}").split(",")]


def _trip_count(program: _Program, rest: str) -> int:
    """Return how often a loop runs: its known trip count, or the constant it compares with."""
    if known := _TRIPS.search(rest):
        return int(known[1])
    condition = _CONDITION.search(rest)
    constants = [
        int(operands.split(")")[0])
        for kind, operation, operands in program.computations[condition[1] if condition else ""]
        if operation == "constant" and re.match(r"[su](32|64)\[\]", kind)
    ]
    if len(constants) != 1:
        raise ValueError("the number of runs of a loop is not in the program")
    return constants[0]


def _bytes(dtype: str, shape: str) -> float:
    digits = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
    return math.prod(int(size) for size in shape.split(",") if size) * bits / 8


def _group_size(rest: str, devices: int) -> int:
    """Return the number of devices that take part in a collective together."""
    if iota := _GROUP_IOTA.search(rest):
        return int(iota[2])
    if listed := _GROUP_LIST.search(rest):
        return len(listed[1].split(","))
    if mesh := _GROUP_MESH.search(rest):
        sizes = dict(_AXIS.findall(mesh[1]))
        parts = _AXIS_IN_GROUP.findall(mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return devices
