"""Limits for a `tokenizer.json`: how much longer its steps can make a text, and its tokens.

Each step can replace a character by a long text, and the next step each character of that text.
A few steps are enough to fill any memory, so the product of their factors is limited. Steps that
the Unicode standard defines count as 1.
"""

import base64
import binascii
import struct
from collections.abc import Iterator
from typing import Any

from softprompt.errors import UserError

LARGEST_GROWTH = 256
"""The most by which all steps together may multiply the length of a text."""

LONGEST_TOKEN = 2000
"""The most characters of a token."""

LARGEST_ID = 2**24
"""The largest token id. To save a tokenizer takes time in proportion to it."""

_NESTED = ("normalizers", "pretokenizers", "decoders", "processors")
_UNICODE_GROWTH = 64  # bytes; the longest replacement of a normal form has 33


def require_bounded(content: dict[str, Any], where: str) -> float:
    """Check the steps and the vocabulary of a tokenizer.

    Args:
      content: a parsed `tokenizer.json`.
      where: names it in error messages.

    Returns:
      How many times longer encoding can make a text.

    Raises:
      UserError: if a text can become too long, or a token is too long.
    """
    growth = _growth(content, ("normalizer", "pre_tokenizer", "post_processor"), where)
    _growth(content, ("decoder",), where)
    for token, number in _tokens(content):
        if len(token) > LONGEST_TOKEN:
            raise UserError(
                f"{where}: token {token[:20]!r}... has {len(token)} characters, more than "
                f"{LONGEST_TOKEN}"
            )
        if number > LARGEST_ID:
            raise UserError(f"{where}: token {token!r} has the id {number}, more than {LARGEST_ID}")
    return growth


def _growth(content: dict[str, Any], sections: tuple[str, ...], where: str) -> float:
    total = 1.0
    for section in sections:
        for step in _steps(content.get(section)):
            total *= _factor(step)
            if total > LARGEST_GROWTH:
                raise UserError(
                    f"{where}: {section}: step {step.get('type')!r} and those before it can make a "
                    f"text more than {LARGEST_GROWTH} times longer"
                )
    return total


def _steps(section: Any) -> Iterator[dict[str, Any]]:
    """Iterate over a section's steps, including those inside of sequences."""
    waiting = [section]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += reversed(value)
        elif isinstance(value, dict):
            yield value
            waiting += [value.get(key) for key in _NESTED]


def _factor(step: dict[str, Any]) -> float:
    kind = step.get("type")
    if kind == "ByteLevel":  # a character for each byte
        return 2.0
    if kind == "Prepend":
        return 1.0 + _length(step.get("prepend"))
    if kind == "Replace":
        pattern, new = step.get("pattern"), _length(step.get("content"))
        old = _length(pattern.get("String")) if isinstance(pattern, dict) else 0
        # A regular expression can match nothing, between all characters.
        return max(1.0, new / old) if old else 1.0 + new
    if kind == "Precompiled":
        longest = _longest_replacement(step.get("precompiled_charsmap"))
        return 1.0 if longest <= _UNICODE_GROWTH else float(longest)
    if kind == "TemplateProcessing":
        single = step.get("single")
        pieces = single if isinstance(single, list) else []
        return max(1.0, sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces))
    return 1.0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _longest_replacement(charsmap: Any) -> int:
    """Return the bytes of the longest replacement in SentencePiece's table of characters.

    The table is a trie with its size in front, followed by replacements that end with a NUL.

    The library panics if it cannot read a table, so a damaged one counts as unlimited.
    """
    try:
        table = base64.b64decode(charsmap, validate=True)
        (size,) = struct.unpack_from("<I", table)
    except (TypeError, ValueError, binascii.Error, struct.error):
        return 2**60
    return max(map(len, table[4 + size :].split(b"\0")), default=0)


def _tokens(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Iterate over the texts and ids of all tokens. Values of wrong types are left out."""
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[Any] = []
    if isinstance(vocabulary, dict):
        pairs += vocabulary.items()
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        pairs += (
            (token[0], i) for i, token in enumerate(vocabulary) if isinstance(token, list) and token
        )
    if isinstance(added, list):
        pairs += (
            (token.get("content"), token.get("id")) for token in added if isinstance(token, dict)
        )
    for text, number in pairs:
        if isinstance(text, str):
            yield text, number if isinstance(number, int) else 0
