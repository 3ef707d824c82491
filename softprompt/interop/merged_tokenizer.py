"""The tokenizer of a merged model, as files that transformers 4 and 5 read alike."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    `save_pretrained` of transformers 5 names a class and writes a list of special tokens that
    version 4 cannot load.

    Args:
      tokenizer: the tokenizer.
      folder: an existing folder.
    """
    backend = tokenizer.backend_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    special = dict(tokenizer.special_tokens_map)
    special.pop("extra_special_tokens", None)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "additional_special_tokens": list(tokenizer.extra_special_tokens),
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "model_input_names": tokenizer.model_input_names,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
    }
    # Version 4 changes the pre-tokenizer if this does not equal its setting.
    if hasattr(backend.pre_tokenizer, "add_prefix_space"):
        config["add_prefix_space"] = backend.pre_tokenizer.add_prefix_space
    config = {key: value for key, value in config.items() if value not in (None, [])}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
