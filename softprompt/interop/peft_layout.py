"""Where `peft` puts things, and so where its adapters have them."""

from typing import Any

from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.storing import find_entry
from softprompt.backbones.loading import Base
from softprompt.methods.lora import matrices_of


def peft_embedding_scale(base: Base) -> float:
    """What the model multiplies vectors by that `peft` puts in front of its embeddings.

    Granite does so to what it is given; Gemma inside its table, so that `peft`'s vectors
    stand behind that factor, as those here.
    """
    return base.backbone.embedding.scale if base.config["model_type"] == "granite" else 1.0


def stored_modules(base: Base) -> dict[str, tuple[Any, list[str]]]:
    """The modules that hold a backbone's matrices in PyTorch, by name with `{layer}` in it.

    Returns:
      With each its `Stored`, and the paths of the matrices that are its parts, in order.
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
