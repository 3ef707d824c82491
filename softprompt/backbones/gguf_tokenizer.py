"""The tokenizer that a GGUF file's metadata describe.

How each kind splits text is what llama.cpp's `src/llama-vocab.cpp` says, whose ids the
tests compare with; where its patterns are stand-ins for the model's own, these are used.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from softprompt.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # token types that are matched whole, before any splitting
_SPACE = "▁"  # what SentencePiece writes for a space

_ENDING = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_REST = rf"{_MARKS}[\r\n]*|{_SPACES}"
_REST_WITH_SLASH = rf"{_MARKS}[\r\n/]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str) -> str:
    """A word that does not go on with a capital behind a small letter."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return f"{first}{_UPPER}*{_LOWER}+{ending}|{first}{_UPPER}+{_LOWER}*{ending}"


# What stands between the pieces of byte-level BPE, by the name that files give it.
_LLAMA3 = rf"{_ENDING}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_PATTERNS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": rf"{_ENDING}|{_WORD}|\p{{N}}|{_REST}",
    "deepseek-r1-qwen": rf"{_ENDING}|{_WORD}|\p{{N}}|{_REST}",
    "stablelm2": rf"{_ENDING}|{_WORD}|\p{{N}}|{_REST}",
    "tekken": rf"{_cased('')}|\p{{N}}|{_REST_WITH_SLASH}",
    "gpt-4o": rf"{_cased(f'(?:{_ENDING})?')}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}",
}
_GPT2 = ("gpt-2", "olmo", "phi-2")
_GPT2_AND_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a piece in the vocabulary is a token

Get = Callable[..., Any]


def read_tokenizer(get: Get) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and the special tokens and chat template to wrap it with.

    Args:
      get: from a GGUF key, and a default, to its value.

    Raises:
      UserError: for a kind that is not supported.
    """
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    byte_level = (*_GPT2, *_GPT2_AND_DIGITS, *_PATTERNS)
    if kind == "llama":
        tokenizer = _sentencepiece(get)
    elif kind == "gpt2" and pre in byte_level:
        tokenizer = _byte_level(get, pre)
    else:
        raise UserError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported "
            f"(supported: 'llama', and 'gpt2' with {', '.join(map(repr, byte_level))})"
        )
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    starts = kind == "llama" or pre in ("llama-bpe", "llama3", "llama-v3")
    before = _marks(get, "bos", tokens, default=starts)
    behind = _marks(get, "eos", tokens, default=False)
    if before or behind:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(token for token, _ in before), "$A", *(token for token, _ in behind)],
            special_tokens=[*before, *behind],
        )
    special = {
        name: tokens[get(f"tokenizer.ggml.{key}_token_id")]
        for name, key in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ]
        if get(f"tokenizer.ggml.{key}_token_id") is not None
    }
    return tokenizer, special | {"chat_template": get("tokenizer.chat_template")}


def _marks(get: Get, key: str, tokens: Sequence[str], default: bool) -> list[tuple[str, int]]:
    """The token, with its id, that stands at one end of every text, if one does."""
    number = get(f"tokenizer.ggml.{key}_token_id")
    if number is None or not get(f"tokenizer.ggml.add_{key}_token", default):
        return []
    return [(tokens[number], number)]


def _byte_level(get: Get, pre: str) -> Tokenizer:
    tokens = get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_FIRST))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS)
    steps: list[Any] = [byte_level]
    if pre in _PATTERNS:
        steps.insert(0, pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated"))
    elif pre in _GPT2_AND_DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: Get) -> Tokenizer:
    """BPE over characters, by scores: of all neighbours that make a token the best first.

    Its merges are all the ways to put a token together from two others.
    """
    tokens, scores = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(vocabulary, key=lambda token: -scores[vocabulary[token]])
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer
