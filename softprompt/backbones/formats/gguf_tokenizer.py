"""The tokenizer that the metadata of a GGUF file describe.

Texts are split as in llama.cpp (`src/llama-vocab.cpp`), and the tests compare token ids with
those of llama.cpp. For some models, llama.cpp uses approximate patterns; this module then uses
the exact patterns of the model.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import pydantic
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

from softprompt.backbones.formats.tokenizer_limits import LONGEST_TOKEN
from softprompt.errors import UserError, shortened
from softprompt.files.json_files import checked

_UNKNOWN, _CONTROL, _USER_DEFINED = (
    2,
    3,
    4,
)  # the types of tokens that are matched before the text is split
_SPACE = "▁"  # the character for a space in SentencePiece vocabularies

_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
_REST = rf"{_PUNCTUATION}[\r\n]*|{_SPACES}"
_REST_WITH_SLASH = rf"{_PUNCTUATION}[\r\n/]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str) -> str:
    """Return a pattern for words that splits before a capital letter after a small one."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return f"{first}{_UPPER}*{_LOWER}+{ending}|{first}{_UPPER}+{_LOWER}*{ending}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"

# The patterns by which byte-level BPE splits a text, applied in order, by pre-tokenizer name.
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}",),
    "tekken": (rf"{_cased('')}|\p{{N}}|{_REST_WITH_SLASH}",),
    "gpt-4o": (rf"{_cased(f'(?:{_CONTRACTION})?')}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}",),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_ALIASES = {  # names that llama.cpp treats alike
    "gpt-2": ("olmo", "phi-2", "mellum", "modern-bert", "gigachat", "a.x-4.0", "exaone4", "mpt"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "kormo", "f2llmv2", "megrez"),
    "gpt-4o": ("llama4", "kanana2"),
}
_NAMES = {name: name for name in _SPLITS} | {
    alias: name for name, aliases in _ALIASES.items() for alias in aliases
}
_IGNORE_MERGES = ("llama-bpe", "tekken")  # a piece that is in the vocabulary is not split
_ADD_BOS = ("llama-bpe", "tekken")  # texts begin with a BOS token by default

PRE_TOKENIZERS = tuple(_SPLITS)
"""The names of the byte-level BPE pre-tokenizers, without aliases."""

Get = Callable[..., Any]

_Flag = Annotated[bool, pydantic.Field(strict=False)]
_Id = Annotated[int, pydantic.Field(ge=0)]
# The parts of all tokens have at most this many characters. 256,000 tokens of usual length have 1%.
_MOST_WORK = 10**9


def read_tokenizer(get: Get) -> tuple[Tokenizer, dict[str, Any]]:
    """Make a tokenizer from GGUF metadata.

    Args:
      get: returns the value of a GGUF key, or the default given after the key.

    Returns:
      The tokenizer, and its special tokens and chat template as arguments for
      `PreTrainedTokenizerFast`.

    Raises:
      UserError: if this kind of tokenizer is not supported.
    """
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != "llama" and (kind != "gpt2" or str(pre) not in _NAMES):
        raise UserError(
            f"tokenizer {shortened(kind)} with pre-tokenizer {shortened(pre)} is not supported "
            f"(supported: 'llama', and 'gpt2' with {', '.join(map(repr, _NAMES))})"
        )
    fields = {name: get(f"tokenizer.ggml.{name}") for name in _Fields.model_fields}
    _require_consistent(checked(_Fields, fields, "tokenizer.ggml"), kind)
    tokenizer = _sentencepiece(get) if kind == "llama" else _byte_level(get, _NAMES[pre])
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    tokenizer.add_tokens(
        [
            AddedToken(
                token,
                special=token_type != _USER_DEFINED,
                normalized=False,
                rstrip=_strips_space_after(get, token),
            )
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    adds_bos = kind == "llama" or _NAMES[pre] in _ADD_BOS
    first = _added_to_texts(get, "bos", tokens, default=adds_bos)
    last = _added_to_texts(get, "eos", tokens, default=False)
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(token for token, _ in first), "$A", *(token for token, _ in last)],
            special_tokens=[*first, *last],
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
    template = get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError("tokenizer.chat_template: not text")
    return tokenizer, special | {"chat_template": template}


def pieces_stay_whole(pre: str) -> bool:
    """Return whether a pre-tokenizer keeps a piece whole if it is in the vocabulary."""
    return _NAMES[pre] in _IGNORE_MERGES


class _Fields(pydantic.BaseModel):
    """The GGUF keys that begin with `tokenizer.ggml.`."""

    model_config = pydantic.ConfigDict(strict=True)

    tokens: list[str]
    token_type: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    bos_token_id: _Id | None = None
    eos_token_id: _Id | None = None
    unknown_token_id: _Id | None = None
    padding_token_id: _Id | None = None
    add_bos_token: _Flag | None = None
    add_eos_token: _Flag | None = None
    add_space_prefix: _Flag | None = None


def _require_consistent(fields: _Fields, kind: str) -> None:
    """Check the lists of a kind of tokenizer, the ids of special tokens and the lengths of tokens.

    Raises:
      UserError: names the key.
    """
    needed = "scores" if kind == "llama" else "merges"
    if getattr(fields, needed) is None:
        raise UserError(f"tokenizer.ggml.{needed}: missing")
    count = len(fields.tokens)
    for name in ("token_type", "scores"):
        values = getattr(fields, name)
        if values is not None and len(values) != count:
            raise UserError(f"tokenizer.ggml.{name}: {len(values)} values for {count} tokens")
    for name in ("bos", "eos", "unknown", "padding"):
        number = getattr(fields, f"{name}_token_id")
        if number is not None and number >= count:
            raise UserError(
                f"tokenizer.ggml.{name}_token_id: {number}, but there are {count} tokens"
            )
    longest = max(map(len, fields.tokens), default=0)
    if longest > LONGEST_TOKEN:
        raise UserError(f"tokenizer.ggml.tokens: a token has {longest} characters")
    if sum(len(token) ** 2 for token in fields.tokens) > _MOST_WORK:
        raise UserError("tokenizer.ggml.tokens: too many long tokens")


def _strips_space_after(get: Get, token: str) -> bool:
    """Return whether white space after a special token is dropped, as Phi-3 does.

    GGUF files mark this only by the name of the model.
    """
    name = str(get("general.name", "")).lower()
    phi3 = "phi-3" in name or "phi3" in name
    return phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")


def _added_to_texts(
    get: Get, key: str, tokens: Sequence[str], default: bool
) -> list[tuple[str, int]]:
    """Return the BOS or EOS token and its id if it is added to every text, else nothing."""
    number = get(f"tokenizer.ggml.{key}_token_id")
    if number is None or not get(f"tokenizer.ggml.add_{key}_token", default):
        return []
    return [(tokens[number], number)]


def _byte_level(get: Get, pre: str) -> Tokenizer:
    tokens = get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _IGNORE_MERGES))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: Get) -> Tokenizer:
    """Make a tokenizer that merges the pair of neighbors with the best score first.

    The merges are all pairs of tokens whose concatenation is a token, ordered by its score.
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
