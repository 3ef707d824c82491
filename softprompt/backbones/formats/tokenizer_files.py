"""The tokenizer of a model directory: `tokenizer.json` and the files next to it.

The result equals the one of `PreTrainedTokenizerFast.from_pretrained`, which a test checks. The
files are read here because transformers trusts them. No class that they name is loaded.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tokenizers
from tokenizers import AddedToken, Tokenizer

from softprompt.backbones.formats.tokenizer import GuardedTokenizer, library_errors
from softprompt.backbones.formats.tokenizer_limits import require_bounded
from softprompt.errors import UserError
from softprompt.files.confined import ConfinedProcess
from softprompt.files.json_files import checked, parse_json, read_json
from softprompt.files.reading import MEBIBYTE, read_text
from softprompt.runtime.cache import cache_folder

_LARGEST_FILE = 64 * MEBIBYTE  # twice the largest of the families that can be loaded
TRIAL_MEMORY = 2048 * MEBIBYTE
"""The most memory for the process that tries a tokenizer."""

TRIAL_SECONDS = 8
"""The most CPU time for trying a tokenizer."""

_WORKER = Path(__file__).with_name("tokenizer_worker.py")
_NAMED = tuple(GuardedTokenizer.SPECIAL_TOKENS_ATTRIBUTES)  # bos_token, eos_token, and so on
_BEHAVIOR = (
    "model_max_length",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "padding_side",
    "model_input_names",
)


class _Token(pydantic.BaseModel):
    """A token that is matched before a text is split, with its rules."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def added(self, **changes: bool) -> AddedToken:
        """Return the token; the library decides about rules that are not given."""
        return AddedToken(**self.model_dump(exclude_unset=True) | changes)


def _as_token(value: Any) -> Any:
    return {"content": value} if isinstance(value, str) else value


def _default_template(value: Any) -> Any:
    """Return the chat template that is used if none is named."""
    if isinstance(value, list):
        value = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
    return value.get("default") if isinstance(value, dict) else value


def _kind(value: Any) -> str:
    return "names" if isinstance(value, dict) else "list"


_Special = Annotated[_Token, pydantic.BeforeValidator(_as_token)]
_Specials = Annotated[
    Annotated[list[_Special], pydantic.Tag("list")]
    | Annotated[dict[str, _Special], pydantic.Tag("names")],
    pydantic.Discriminator(_kind),
]


class _Config(pydantic.BaseModel):
    """The keys of `tokenizer_config.json` that say how texts are tokenized."""

    model_config = pydantic.ConfigDict(extra="allow")

    bos_token: _Special | None = None
    eos_token: _Special | None = None
    unk_token: _Special | None = None
    sep_token: _Special | None = None
    pad_token: _Special | None = None
    cls_token: _Special | None = None
    mask_token: _Special | None = None
    additional_special_tokens: list[_Special] | None = None
    extra_special_tokens: _Specials | None = None
    added_tokens_decoder: dict[int, _Token] | None = None
    chat_template: Annotated[str | None, pydantic.BeforeValidator(_default_template)] = None
    model_max_length: int | float | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool | None = None
    padding_side: Literal["left", "right"] | None = None
    model_input_names: list[str] | None = None


class _AddedTokens(pydantic.RootModel[dict[str, int]]):
    """The content of `added_tokens.json`."""


def read_tokenizer_files(folder: Path) -> GuardedTokenizer:
    """Make the tokenizer of a model directory.

    Raises:
      UserError: if a file is missing or damaged, or the tokenizer needs too much time or memory.
    """
    path = folder / "tokenizer.json"
    text = read_text(path, _LARGEST_FILE)
    content = parse_json(text, str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    growth = require_bounded(content, str(path))
    config, added = _read_config(folder)
    _try(path, text)
    with library_errors(f"{folder}: its tokenizer cannot be loaded"):
        inner = Tokenizer.from_str(text)
        inner.no_truncation()  # truncated texts are counted, by the task
        inner.no_padding()
        if config.added_tokens_decoder is None:
            added |= inner.get_added_tokens_decoder()
        return GuardedTokenizer(
            inner, growth=growth, name_or_path=str(folder), **_arguments(config, added)
        )


def _try(path: Path, text: str) -> None:
    """Try a tokenizer in a process of its own, unless the same text passed the trial before.

    Args:
      path: the `tokenizer.json`.
      text: its content.

    Raises:
      UserError: if the tokenizer fails, or needs too much time or memory.
    """
    trial = [tokenizers.__version__, _WORKER.read_text(), text]
    name = hashlib.sha256(json.dumps(trial).encode()).hexdigest()
    passed = cache_folder() / "tokenizers" / name
    if os.path.exists(passed):
        return
    with contextlib.closing(ConfinedProcess(_WORKER, TRIAL_MEMORY, TRIAL_SECONDS)) as process:
        process.ask(str(path), f"{path}: the tokenizer cannot be used")
    if read_text(path, _LARGEST_FILE) == text:  # what the process has read
        with contextlib.suppress(OSError):
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


def _read_config(folder: Path) -> tuple[_Config, dict[int, AddedToken]]:
    """Return the settings next to `tokenizer.json`, and the added tokens that they list."""
    path, old, older = (
        folder / f"{name}.json"
        for name in ("tokenizer_config", "special_tokens_map", "added_tokens")
    )
    content = _read_if_present(path)
    config = checked(_Config, content, str(path))
    if config.added_tokens_decoder is not None:
        added = {i: token.added() for i, token in config.added_tokens_decoder.items()}
    else:  # older versions of transformers wrote more files
        content |= _read_if_present(old)
        config = checked(_Config, content, str(old))
        tokens = checked(_AddedTokens, _read_if_present(older), str(older)).root
        added = {i: AddedToken(token) for token, i in tokens.items()}
    template = folder / "chat_template.jinja"
    if os.path.lexists(template):
        config.chat_template = read_text(template)
    return config, added


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


def _arguments(config: _Config, added: dict[int, AddedToken]) -> dict[str, Any]:
    """Return the settings as arguments of `PreTrainedTokenizerFast`."""
    rules = {token.content: token for token in added.values()}
    extra = config.extra_special_tokens or config.additional_special_tokens or []
    named: dict[str, str | AddedToken] = {
        name: value
        for name, value in (config.model_extra or {}).items()
        if name.endswith("_token") and isinstance(value, str)
    }
    if isinstance(extra, dict):
        named |= {name: token.added(special=True) for name, token in extra.items()}
        extra = []
    arguments: dict[str, Any] = {
        "added_tokens_decoder": added,
        "extra_special_tokens": [token.added(special=True) for token in extra],
        "model_specific_special_tokens": named,
        "chat_template": config.chat_template,
    }
    for name in _NAMED:
        if (token := getattr(config, name)) is not None:
            arguments[name] = rules.get(token.content, token.added(special=True))
    for name in _BEHAVIOR:
        if (value := getattr(config, name)) is not None:
            arguments[name] = value
    return arguments
