"""Write GGUF files with a small vocabulary and no tensors, for the comparison with llama.cpp."""

import json
from collections.abc import Sequence
from pathlib import Path

import gguf

VOCABULARIES = Path(__file__).parent / "vocabularies.json"


def write_vocabulary(
    path: Path,
    kind: str,
    pre: str,
    name: str = "",
    control_tokens: Sequence[str] = (),
    **flags: bool,
) -> None:
    """Write the stored vocabulary of a kind (`gpt2` or `llama`) as a GGUF file.

    Args:
      path: the file to write.
      kind: `tokenizer.ggml.model`.
      pre: `tokenizer.ggml.pre`.
      name: `general.name`, not written if empty.
      control_tokens: control tokens to append to the vocabulary.
      flags: flags of `tokenizer.ggml`, such as `add_space_prefix`.
    """
    stored = json.loads(VOCABULARIES.read_text())[kind]
    writer = gguf.GGUFWriter(path, "llama")
    if name:
        writer.add_name(name)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*stored["tokens"], *control_tokens])
    writer.add_token_types([*stored["types"], *(3 for _ in control_tokens)])
    if kind == "llama":
        writer.add_token_scores([*stored["scores"], *(0.0 for _ in control_tokens)])
        writer.add_unk_token_id(0)
    else:
        writer.add_token_merges(stored["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for flag, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{flag}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
