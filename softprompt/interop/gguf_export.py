"""Export a base model with a trained prompt as one GGUF file, for llama.cpp and Ollama."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

from softprompt.backbones.config import architecture_of
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.loading import Base
from softprompt.errors import UserError
from softprompt.inference.prompt import TrainedPrompt
from softprompt.interop.extended import ExtendedModel, extend
from softprompt.interop.gguf_fields import (
    architecture_fields,
    architecture_name,
    differing_fields,
    rope_tensors,
)
from softprompt.interop.gguf_vocabulary import vocabulary_fields
from softprompt.interop.written import example_input

GGUFType = Literal["f32", "f16", "q8_0"]
"""How the matrices of a GGUF file are stored. Norms and biases are always in float32."""

GGUF_FILE = "model.gguf"
"""The name of the file in an export."""

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def export_gguf(prompt: TrainedPrompt, folder: Path, dtype: GGUFType) -> str:
    """Write a GGUF file that computes the same as the base model with the prompt.

    Args:
      prompt: the trained prompt.
      folder: an existing folder.
      dtype: how the matrices are stored.

    Returns:
      The form of an input, see `ExtendedModel`.

    Raises:
      UserError: if no plain model computes the same, or GGUF files or llama.cpp do not support
        the base model.
    """
    base, kind = prompt.base, prompt.base.config["model_type"]
    names = FAMILIES[kind].gguf_names
    if names is None:
        known = ", ".join(sorted(name for name, each in FAMILIES.items() if each.gguf_names))
        raise UserError(f"model type {kind} cannot be written to a GGUF file (supported: {known})")
    model = extend(prompt, names)
    texts = [example_input(model.written)]
    vocabulary = vocabulary_fields(model.tokenizer, model.size, texts, base.hub_name)
    path = folder / GGUF_FILE
    try:
        _write(path, base, model, vocabulary, dtype)
        _require_same_architecture(path, base, model)
    except UserError:
        path.unlink(missing_ok=True)
        raise
    return model.written


def _write(
    path: Path, base: Base, model: ExtendedModel, vocabulary: dict[str, Any], dtype: GGUFType
) -> None:
    """Write the file."""
    name = architecture_name(base)
    writer = gguf.GGUFWriter(path, name)
    writer.add_type("model")
    writer.add_name(base.hub_name)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    fields = {f"{name}.{key}": value for key, value in architecture_fields(base).items()}
    fields[f"{name}.vocab_size"] = model.size
    fields |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    if len(model.ends) > 1:
        fields["tokenizer.ggml.eot_token_id"] = model.ends[-1]
    if model.new:
        fields["tokenizer.ggml.suppress_tokens"] = model.new
    if model.tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = model.tokenizer.chat_template
    for key, value in fields.items():
        writer.add_key_value(key, value, _value_type(value))
    for tensor, array in {**rope_tensors(base), **model.tensors}.items():
        stored, kind = _stored(array, dtype, tensor)
        writer.add_tensor(tensor, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value_type(value: Any) -> gguf.GGUFValueType:
    """Return the type of a value. The `gguf` package would make single integers signed."""
    if type(value) is int:
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


def _stored(
    array: np.ndarray, dtype: GGUFType, name: str
) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Return a tensor as it is stored, and its type. Vectors stay in float32."""
    values = np.asarray(array, np.float32)
    kind = gguf.GGMLQuantizationType[dtype.upper() if values.ndim > 1 else "F32"]
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    if kind is not gguf.GGMLQuantizationType.F32 and np.abs(values).max() > np.finfo("f2").max:
        raise UserError(f"tensor {name} has values that float16 cannot represent; use --dtype f32")
    return gguf.quantize(values, kind), kind


def _require_same_architecture(path: Path, base: Base, model: ExtendedModel) -> None:
    """Read the file back, and compare the architecture that it describes.

    Raises:
      UserError: if GGUF's metadata cannot describe the model.
    """
    arch = base.backbone.arch
    wanted = dataclasses.replace(
        arch, vocab_size=model.size, tied_head=arch.tied_head and not model.untied
    )
    file = GGUFFile(path)
    if differing := differing_fields(wanted, architecture_of(file.config, file.names)):
        raise UserError(
            f"this {base.config['model_type']} model cannot be written to a GGUF file: GGUF cannot "
            f"represent its {', '.join(differing)}"
        )
