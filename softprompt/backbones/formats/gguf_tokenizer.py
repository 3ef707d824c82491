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

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types matched whole, before any splitting
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


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_ENDING}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"

# What byte-level BPE cuts a text by, one after the other, by the name that files give it.
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (rf"{_ENDING}|{_WORD}|\p{{N}}|{_REST}",),
    "tekken": (rf"{_cased('')}|\p{{N}}|{_REST_WITH_SLASH}",),
    "gpt-4o": (rf"{_cased(f'(?:{_ENDING})?')}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}",),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_SAME = {  # names that llama.cpp reads as another
    "gpt-2": ("olmo", "phi-2", "mellum", "modern-bert", "gigachat", "a.x-4.0", "exaone4", "mpt"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "kormo", "f2llmv2", "megrez"),
    "gpt-4o": ("llama4", "kanana2"),
}
_NAMES = {name: name for name in _SPLITS} | {
    other: name for name, others in _SAME.items() for other in others
}
_WHOLE_FIRST = ("llama-bpe", "tekken")  # a piece that is in the vocabulary is a token
_BEGINNING = ("llama-bpe", "tekken")  # begin with a mark unless the file says otherwise

Get = Callable[..., Any]


def read_tokenizer(get: Get) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and the special tokens and chat template to wrap it with.

    Args:
      get: from a GGUF key, and a default, to its value.

    Raises:
      UserError: for a kind that is not supported.
    """
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind == "llama":
        tokenizer = _sentencepiece(get)
    elif kind == "gpt2" and pre in _NAMES:
        tokenizer = _byte_level(get, _NAMES[pre])
    else:
        raise UserError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported "
            f"(supported: 'llama', and 'gpt2' with {', '.join(map(repr, _NAMES))})"
        )
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                special=of != _USER_DEFINED,
                normalized=False,
                rstrip=_takes_space_behind(get, token),
            )
            for token, of in zip(tokens, types, strict=True)
            if of in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    starts = kind == "llama" or _NAMES[pre] in _BEGINNING
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


def _takes_space_behind(get: Get, token: str) -> bool:
    """Whether white space behind a special token is lost: in Phi-3, known by the model's name."""
    name = str(get("general.name", "")).lower()
    phi3 = "phi-3" in name or "phi3" in name
    return phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")


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
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
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
