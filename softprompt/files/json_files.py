"""JSON from outside: parsed without surprises, and checked by a schema."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pydantic

from softprompt.errors import UserError, shortened, shown
from softprompt.files.reading import MEBIBYTE, read_text

Schema = TypeVar("Schema", bound=pydantic.BaseModel)


def parse_json(text: str, where: str) -> Any:
    r"""Parse a JSON value.

    Unlike `json.loads`, this rejects NaN and Infinity, which are not JSON, numbers such as 1e999,
    which would become infinite, and escapes such as `\ud800`, which stand for half a character
    that cannot be written as UTF-8.

    Args:
      text: the text.
      where: the place of the text, for error messages.

    Raises:
      UserError: if the text is not JSON, or is nested too deeply.
    """
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not valid JSON (half of a surrogate pair)") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    return value


def read_json(path: Path, limit: int = 16 * MEBIBYTE) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
      path: the file.
      limit: the largest size to read, in bytes.

    Raises:
      UserError: if it cannot be read, is too large, or is not a JSON object.
    """
    value = parse_json(read_text(path, limit), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def checked(schema: type[Schema], value: Any, where: str) -> Schema:
    """Return a value from outside as an instance of its schema.

    Args:
      schema: the schema.
      value: what `read_json` returned, or a part of it.
      where: the place of the value, for error messages.

    Raises:
      UserError: one line that names every wrong field.
    """
    try:
        return schema.model_validate(value)
    except pydantic.ValidationError as errors:
        problems = [_problem(error) for error in errors.errors(include_url=False)]
        more = f"; and {len(problems) - 5} more" if problems[5:] else ""
        raise UserError(f"{where}: {'; '.join(problems[:5])}{more}") from None


def _problem(error: Any) -> str:
    """Describe one of pydantic's errors: the field, what is wrong, and the value if it is short."""
    field = ".".join(shown(str(key)) for key in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["type"] == "missing" else f", not {shortened(error['input'])}"
    return f"{field}: {message}{given}" if field else f"{message}{given}"


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"the number {shortened(number)} is too large")
    return value


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no number {constant}")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_finite)
