"""JSON Lines: one JSON object per line."""

from collections.abc import Iterable, Iterator
from typing import Any

from softprompt.errors import UserError
from softprompt.files.json_files import parse_json


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
            value = parse_json(line, where)
            if not isinstance(value, dict):
                raise UserError(f"{where}: not a JSON object")
            yield where, value
