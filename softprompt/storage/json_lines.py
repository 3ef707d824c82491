"""JSON Lines: one JSON object per line."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from softprompt.errors import UserError


def parse_json_lines(lines: Iterable[str], source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parse lines of JSON; skip blank lines.

    Args:
      lines: the lines, with or without line breaks at their ends.
      source: the file's name, for error messages.

    Yields:
      The place of each object as `source:line`, and the object.

    Raises:
      UserError: if a line is not a JSON object.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{source}:{number}"
            yield where, _parse_object(line, where)


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object")
    return value


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no number {constant}")
