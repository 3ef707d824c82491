"""The text and the bytes of single tokens, for log-probabilities."""

import functools
import re

from transformers import PreTrainedTokenizerFast


class TokenTexts:
    r"""Turns ids into text, one by one.

    A token can hold a part of a character. Its text is then its bytes, such as `bytes:\xe2`, as
    in OpenAI's API.

    Args:
      tokenizer: the base model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_tokens)
        self._is_byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        self.text = functools.lru_cache(2**16)(self._text)

    def bytes(self, token: int) -> bytes:
        """Return the bytes of a token."""
        written = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(written, str):
            return b""
        if written in self._special:
            return written.encode()
        if self._is_byte_level and all(character in _BYTES for character in written):
            return bytes(_BYTES[character] for character in written)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", written):
            return bytes.fromhex(byte[1])
        return written.replace("\u2581", " ").encode()

    def _text(self, token: int) -> str:
        content = self.bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _byte_characters() -> dict[str, int]:
    """Return the bytes by the characters that byte-level vocabularies write for them.

    Printable characters of Latin-1 stand for themselves, and the others for those from 256 on
    (GPT-2, `bytes_to_unicode`).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _byte_characters()
