"""Escape texts for Markdown, YAML and Python."""

import json
import re
from typing import Any


def quoted(value: Any) -> str:
    """Return JSON on one line that is also valid YAML and, for a text, valid Python.

    Characters that are not printable are escaped, because YAML forbids some of them.
    """
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xD800 <= number < 0xE000:
        return "\\ufffd"  # half a character, which UTF-8 cannot encode
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def plain(text: str) -> str:
    """Return a text that Markdown shows on one line as it is."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", line)


def code(text: str) -> str:
    """Return a text as code within a line."""
    line = "".join(c if c.isprintable() else " " for c in text)
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line[:1] in ("`", " ") or line[-1:] in ("`", " ", "") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(text: str, language: str = "") -> str:
    """Return a text as a block of code. Its fence is longer than any fence in the text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    kept = text.encode("utf-8", errors="replace").decode("utf-8")
    return f"{fence}{language}\n{kept}\n{fence}"


def _longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
