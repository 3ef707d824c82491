"""The tokenizer of a base model: a fast tokenizer of transformers whose failures are one line."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from softprompt.errors import Stopped, UserError, reason_of, shortened

LONGEST_TEXT = 2**25
"""The most characters of a text, after the tokenizer's own steps may have made it longer."""


class GuardedTokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose `__call__`, `encode` and `decode` raise `UserError` if they fail.

    Args:
      backend: the tokenizer of the tokenizers library.
      growth: how many times longer the tokenizer's steps can make a text.
      kwargs: see `PreTrainedTokenizerFast`.
    """

    def __init__(self, backend: Tokenizer, *, growth: float = 1.0, **kwargs: Any):
        self._tokenizer = backend  # as subclasses in transformers do; an argument would be copied
        super().__init__(**kwargs)
        self._growth = growth

    @property
    def _named(self) -> str:
        """The tokenizer with its file, for error messages."""
        return f"the tokenizer of {self.name_or_path}" if self.name_or_path else "the tokenizer"

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["verbose"] = False  # no warning about the length, which the task limits
        with self.guarded(text):
            return super()._encode_plus(text, *args, **kwargs)

    @contextlib.contextmanager
    def guarded(self, text: Any) -> Iterator[None]:
        """Check a text before the context encodes it, and turn failures into a `UserError`.

        Args:
          text: a text, or a list of texts or words.
        """
        longest = max(map(len, _texts(text)), default=0)
        if longest * self._growth > LONGEST_TEXT:
            raise UserError(f"a text of {longest} characters is too long for the tokenizer")
        with library_errors(f"{self._named} cannot encode this text"):
            try:
                yield
            except TypeError:
                _require_unicode(text)
                raise

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        with library_errors(f"{self._named} cannot decode these tokens"):
            return super()._decode(*args, **kwargs)


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Encoding]:
    """Tokenize texts without special tokens, in the parallel threads of the tokenizers library.

    Args:
      tokenizer: the base model's.
      texts: any number.

    Returns:
      For each text, its `ids`, and in `offsets` the characters of each token.

    Raises:
      UserError: if a text cannot be encoded; see `GuardedTokenizer`.
    """
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return encoded.encodings or []


def encode_ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts as `encode_texts` does, but return only their ids, which is faster.

    Args:
      tokenizer, texts: see `encode_texts`.

    Raises:
      UserError: see `encode_texts`.
    """
    texts = list(texts)
    guarded = isinstance(tokenizer, GuardedTokenizer)
    with tokenizer.guarded(texts) if guarded else contextlib.nullcontext():
        encodings = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return the tokenizer of the tokenizers library, without padding and truncation.

    A call of the tokenizer sets both. This removes the settings of the last call.
    """
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn every failure of the tokenizers library into a `UserError`.

    The library raises plain `Exception`s, and Rust panics as `PanicException`, which derives
    from `BaseException` and cannot be imported.

    Args:
      what: begins the message.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({reason_of(error)})") from error


def _texts(value: Any) -> Iterator[str]:
    """Iterate over the texts in the argument of a call: a text, or a list of texts or words."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _require_unicode(value: Any) -> None:
    for text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"text {shortened(text)} is not valid Unicode (half of a surrogate pair)"
            ) from None
