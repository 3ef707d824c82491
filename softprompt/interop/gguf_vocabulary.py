"""The metadata of a GGUF file that describe a tokenizer.

A GGUF file names the pre-tokenizer with which llama.cpp splits texts. The name is found by trial:
`formats/gguf_tokenizer.py` reads the metadata back, and must give the same ids.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.formats.gguf_tokenizer import (
    PRE_TOKENIZERS,
    pieces_stay_whole,
    read_tokenizer,
)
from softprompt.errors import UserError

_TRIED = (
    "It's 1234567 km, they'LL say; don't!  A   B\n\n\tdef f(x):\n    return x[0] != 3.14  # ok\r\n",
    " naïve café Straße ÀÉ ЖЯ δοκιμή 東京タワー 한국어 हिन्दी สวัสดี 👍🏽 \u00a0—…«a»/b/\n/",
    "HTTPServer camelCase snake_case x2y 1,000.50$ +-*/=<>|~^`@#%&_\\ 'quoted' \"\" (a){b}[c]",
)


def vocabulary_fields(
    tokenizer: PreTrainedTokenizerFast, size: int, texts: Sequence[str], model: str
) -> dict[str, Any]:
    """Return the metadata of a tokenizer. They tell engines to add no tokens to a text.

    Args:
      tokenizer: the tokenizer.
      size: the number of tokens of the model.
      texts: texts whose ids must be the same when the metadata are read back.
      model: the name of the model. llama.cpp has special rules for tokens of some models.

    Returns:
      The values. Their keys do not include `tokenizer.ggml`.

    Raises:
      UserError: if GGUF has no equivalent of the tokenizer.
    """
    inner = tokenizer.backend_tokenizer
    content = json.loads(inner.to_str())["model"]
    for fields in _candidates(tokenizer, content, size):
        keys = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
        try:
            found, _ = read_tokenizer((keys | {"general.name": model}).get)
        except UserError:
            continue
        if all(_treat_alike(found, inner, text) for text in (*_TRIED, *texts)):
            return fields
    raise UserError("the base model's tokenizer cannot be written to a GGUF file")


def _treat_alike(found: Tokenizer, inner: Tokenizer, text: str) -> bool:
    """Return whether two tokenizers split a text alike and give the same ids."""
    if found.pre_tokenizer is not None:  # byte-level BPE
        if inner.pre_tokenizer is None:
            return False
        first, second = (t.pre_tokenizer.pre_tokenize_str(text) for t in (found, inner))
        if [piece for piece, _ in first] != [piece for piece, _ in second]:
            return False
    ids = [t.encode(text, add_special_tokens=False).ids for t in (found, inner)]
    return bool(ids[0] == ids[1])


def _candidates(
    tokenizer: PreTrainedTokenizerFast, content: dict[str, Any], size: int
) -> Iterator[dict[str, Any]]:
    """Yield the metadata to try.

    Args:
      tokenizer: the tokenizer.
      content: the section `model` of its `tokenizer.json`.
      size: the number of tokens of the model.
    """
    if content["type"] != "BPE" or not content["merges"]:
        return
    merges = [m if isinstance(m, list) else m.split(" ") for m in content["merges"]]
    fields: dict[str, Any] = {
        "tokens": _tokens(tokenizer, size),
        "token_type": _types(tokenizer, size, content["byte_fallback"]),
        **_special(tokenizer, size),
        "add_bos_token": False,
        "add_eos_token": False,
    }
    if content["byte_fallback"]:
        scores = _scores(fields["tokens"], merges)
        for prefix in (True, False):
            yield fields | {
                "model": "llama",
                "pre": "default",
                "scores": scores,
                "add_space_prefix": prefix,
            }
        return
    for pre in PRE_TOKENIZERS:
        if pieces_stay_whole(pre) == content["ignore_merges"]:
            joined = [" ".join(merge) for merge in merges]
            yield fields | {"model": "gpt2", "pre": pre, "merges": joined}


def _tokens(tokenizer: PreTrainedTokenizerFast, size: int) -> list[str]:
    """Return the text of each token, and a placeholder for each id without a token."""
    texts = tokenizer.convert_ids_to_tokens(list(range(size)))
    return [f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)]


def _types(tokenizer: PreTrainedTokenizerFast, size: int, has_bytes: bool) -> list[int]:
    """Return the type of each token."""
    types = [TokenType.UNUSED] * size
    for text, i in tokenizer.get_vocab().items():
        if i < size:
            byte = has_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            types[i] = TokenType.BYTE if byte else TokenType.NORMAL
    for i, token in tokenizer.added_tokens_decoder.items():
        if i < size:
            types[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    if has_bytes and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return [int(kind) for kind in types]


def _special(tokenizer: PreTrainedTokenizerFast, size: int) -> dict[str, int]:
    """Return the ids of the special tokens."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {key: getattr(tokenizer, f"{name}_token_id") for key, name in names.items()}
    return {f"{key}_token_id": i for key, i in found.items() if i is not None and i < size}


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return the score of each token: the earlier it is merged, the higher."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]
