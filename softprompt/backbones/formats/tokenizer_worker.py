"""Try a tokenizer inside a `ConfinedProcess`, before the main process loads it.

A `tokenizer.json` holds regular expressions and rewriting steps. They can take unlimited time
or memory, and some invalid values abort the process or panic.
"""

from typing import Any

from tokenizers import Tokenizer

# Slow patterns are slowest on long runs of one kind of character.
_SENTENCES = (
    "The film's \"plot\" (2,345.60 pages!) isn't new;\n\n\tI'd see it again, twice... </s>\r\n",
    "Les élèves naïfs, καλημέρα, привет, שלום, سلام ﷺ, नमस्ते, สวัสดี, こんにちは 世界。한국어 ",
    "def f(x): return x**2 ≠ ½ “”—… 👍🏽👩\u200d👩\u200d👧 ﬁ Å a\u0301 \x00\x7f\u200b\ufeff\ufffd",
)
_RUNS = ("a", " ", "\n", "0", "-", "é", "我", "👍", "ab ", " \t", "aA0-")
_TEXTS = (
    *("a", " ", "A joy."),
    *_SENTENCES,
    *(text * 5 for text in _SENTENCES),
    *(unit * 1000 for unit in _RUNS),
)


def answer(path: str) -> None:
    """Encode and decode texts of many kinds, and decode tokens of the vocabulary.

    Args:
      path: a `tokenizer.json`.
    """
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in _TEXTS:
        tokens = _unless_refused(tokenizer.encode, text)
        if tokens is not None:
            _unless_refused(tokenizer.decode, tokens.ids)
    tokenizer.to_str()
    for token in range(min(tokenizer.get_vocab_size(), 1000)):
        _unless_refused(tokenizer.decode, [token])


def _unless_refused(function: Any, value: Any) -> Any:
    """Call a function; an ordinary error, such as an unknown character, is no reason to stop."""
    try:
        return function(value)
    except MemoryError:
        raise
    except Exception:
        return None
