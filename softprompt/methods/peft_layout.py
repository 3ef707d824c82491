"""The layout of `peft` adapters: scale of vectors, form of prefixes, names of modules.

Axis letters: L layers, P virtual tokens, K key-value heads, h head size.
"""

from typing import Any

import numpy as np

from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.storing import find_entry
from softprompt.backbones.loading import Base, Prefix
from softprompt.errors import UserError
from softprompt.methods.backbone_arrays import matrices_of
from softprompt.methods.method import Adapter


def peft_embedding_scale(base: Base) -> float:
    """Return the factor by which the model multiplies vectors that `peft` prepends.

    Gemma scales inside its embedding table, so vectors from `peft` come after that factor, as
    vectors here do. Granite scales everything it is given, vectors from `peft` included.
    """
    return base.backbone.embedding.scale if base.config["model_type"] == "granite" else 1.0


def prefix_adapter(base: Base, prefix: Prefix | None) -> Adapter:
    """Return keys and values of a prefix as a PREFIX_TUNING adapter.

    Raises:
      UserError: if there is no such prefix, or if it also holds text for an encoder.
    """
    if prefix is None or prefix.keys is None:
        raise UserError(
            "there is no prefix of keys and values before the inputs that peft could hold"
        )
    separate_targets = base.backbone.separate_targets
    if separate_targets and getattr(prefix, "embeddings", None) is not None:
        raise UserError("peft cannot hold text before the inputs of an encoder")
    keys, values = np.asarray(prefix.keys), np.asarray(prefix.values)
    stacked = np.stack([keys, values]).astype(np.float32)  # [2, L, P, K, h]
    if separate_targets:
        # Given two submodules, peft uses layer 2i of the file for layer i of the decoder and
        # drops the others. Given one, it would also prepend the prefix to the encoder's output.
        stacked = np.stack([stacked, np.zeros_like(stacked)], axis=2)
        stacked = stacked.reshape(2, -1, *stacked.shape[3:])
    _, layers, length, kv_heads, size = stacked.shape
    return {"prompt_embeddings": stacked.transpose(2, 1, 0, 3, 4).reshape(length, -1).copy()}, {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "token_dim": kv_heads * size,
        "num_transformer_submodules": 2 if separate_targets else 1,
        "num_attention_heads": kv_heads,
        "num_layers": layers,
        "encoder_hidden_size": kv_heads * size,
        "prefix_projection": False,
    }


def stored_modules(base: Base) -> dict[str, tuple[Any, list[str]]]:
    """Return the PyTorch modules that hold the backbone's matrices.

    Returns:
      By the name of the module, with `{layer}` for the layer's number: its `Stored` entry, and
      the paths of the matrices that it holds, in order.
    """
    names = FAMILIES[base.config["model_type"]].names
    parts: dict[str, dict[int, tuple[Any, str]]] = {}
    for path in matrices_of(base.backbone):
        entry = find_entry(names, path, base.backbone.arch)
        parts.setdefault(entry.name, {})[entry.part] = entry, path
    return {
        name: (parts_of[0][0], [parts_of[part][1] for part in sorted(parts_of)])
        for name, parts_of in parts.items()
    }
