"""Read adapters of `peft` from safetensors. Nothing in them is executed or unpickled.

Axis letters: P virtual tokens, D hidden, L layers, K key-value heads, h head size, R rank.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import pydantic

from softprompt.backbones.formats.names import WHOLE
from softprompt.backbones.loading import Base
from softprompt.errors import UserError, shortened, shown
from softprompt.files.json_files import checked, read_json
from softprompt.files.tensors import SafetensorsFile, read_npy
from softprompt.methods.backbone_arrays import matrices_of
from softprompt.methods.peft_layout import peft_embedding_scale, stored_modules

_FILE = "adapter_model.safetensors"
_OTHER_THAN_LORA = (  # settings of a LORA adapter that change what it computes
    "alora_invocation_tokens",
    "bias",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_Count = Annotated[int, pydantic.Field(gt=0, lt=10**9)]
_Factor = Annotated[float, pydantic.Field(gt=0, lt=1e9)]
_Tensors = Mapping[str, np.ndarray]
Learned = tuple[str, dict[str, Any], dict[str, Any]]  # see `import_adapter`


def import_adapter(folder: Path, base: Base) -> Learned:
    """Read an adapter of type PROMPT_TUNING, P_TUNING, PREFIX_TUNING or LORA.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      base: the base model that the adapter was trained on.

    Returns:
      The name of the method, its arrays by name, and the description that `Method.load` needs.

    Raises:
      UserError: if a file is missing or malformed, or does not fit the base model.
    """
    path = folder / "adapter_config.json"
    values = read_json(path)
    config, tensors = checked(_Config, values, str(path)), _read_tensors(folder)
    kind = config.peft_type
    try:
        if kind in ("PROMPT_TUNING", "P_TUNING"):
            return "prompt", _prompt(config, tensors, base), {}
        if kind == "PREFIX_TUNING":
            return "prefix", _prefix(config, tensors, base), {}
        if kind == "LORA":
            arrays, scales = _lora(config, values, tensors, base)
            return "lora", arrays, {"scales": scales}
    except _Misfit as error:
        raise UserError(f"{folder}: {error}") from None
    raise UserError(
        f"{folder}: adapters of kind {shortened(kind)} are not supported "
        "(supported: PROMPT_TUNING, P_TUNING, PREFIX_TUNING, LORA)"
    )


def import_array(path: Path, base: Base) -> Learned:
    """Read a prompt `[P, D]` of google-research/prompt-tuning, a `.npy` file.

    Args:
      path: the file.
      base: the base model that the prompt was trained on.

    Returns:
      The same as `import_adapter`.

    Raises:
      UserError: if the file is not such an array, or does not fit the base model.
    """
    vectors = read_npy(path)
    if vectors.ndim != 2:
        raise UserError(f"{path}: not a matrix (shape {shortened(vectors.shape)})")
    try:
        return "prompt", {"vectors": _vectors(_finite(vectors, f"{path}: it"), base)}, {}
    except _Misfit as error:
        raise UserError(f"{path}: {error}") from None


class _Misfit(Exception):
    """A mistake in an adapter. The caller adds the path to the message."""


class _Config(pydantic.BaseModel):
    """The keys of `adapter_config.json` that are read. It has many others."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    peft_type: str | None = None
    num_virtual_tokens: _Count | None = None
    num_transformer_submodules: _Count | None = None
    num_layers: _Count | None = None
    num_attention_heads: _Count | None = None
    lora_alpha: _Factor | None = None
    alpha_pattern: dict[str, _Factor] | None = None
    use_rslora: bool | None = None

    @pydantic.field_validator("alpha_pattern")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in patterns or ():
            if set(pattern) & set("\\^$*+?{}[]|()"):
                raise ValueError(f"{shortened(pattern)} is not a plain name")
        return patterns

    def required(self, key: str) -> Any:
        """Return the value of a key; raise a `_Misfit` if the file does not have it."""
        value = getattr(self, key)
        if value is None:
            raise _Misfit(f"adapter_config.json: {key} is missing")
        return value


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / _FILE
    pickled = folder / "adapter_model.bin"
    if not os.path.lexists(path) and os.path.lexists(pickled):
        raise UserError(
            f"{pickled}: pickled files are not read, because unpickling can run any code; "
            "save the adapter as safetensors"
        )
    file = SafetensorsFile(path)
    return {name: _finite(file.read(name), f"{path}: {shortened(name)}") for name in file.names}


def _finite(values: np.ndarray, where: str) -> np.ndarray:
    """Return values as float32; raise a `UserError` if some are not finite."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{where} has values that are not finite")
    return values


def _embeddings(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    if "prompt_embeddings" not in tensors:
        raise _Misfit(f"{_FILE}: no prompt_embeddings (it has {_listed(tensors)})")
    if len(tensors) > 1:
        raise _Misfit(f"{_FILE}: it has more than prompt_embeddings ({_listed(tensors)})")
    embeddings = tensors["prompt_embeddings"]
    if embeddings.ndim != 2:
        raise _Misfit(
            f"{_FILE}: prompt_embeddings has shape {embeddings.shape}, which is not a matrix"
        )
    return embeddings


def _prompt(config: _Config, tensors: _Tensors, base: Base) -> dict[str, Any]:
    embeddings, length = _embeddings(tensors), config.required("num_virtual_tokens")
    modules = config.num_transformer_submodules or 1
    if len(embeddings) != length * modules:
        raise _Misfit(
            f"{_FILE}: prompt_embeddings has {len(embeddings)} rows, not the {length * modules} "
            "of adapter_config.json"
        )
    # With an encoder-decoder there are two halves, and peft never reads the second.
    return {"vectors": _vectors(embeddings[:length], base)}


def _vectors(embeddings: np.ndarray, base: Base) -> Any:
    size = base.backbone.arch.hidden_size
    if embeddings.shape[1] != size:
        raise _Misfit(
            f"its vectors have {embeddings.shape[1]} dimensions, but the base model "
            f"{base.name!r} has {size}"
        )
    if not len(embeddings):
        raise _Misfit("it has no vectors")
    return jnp.asarray(embeddings, jnp.float32) * peft_embedding_scale(base)


def _prefix(config: _Config, tensors: _Tensors, base: Base) -> dict[str, Any]:
    embeddings = _embeddings(tensors)
    layers, _, kv_heads, size = base.backbone.prefix_shape(0)
    modules, stored = config.num_transformer_submodules or 1, layers
    if base.backbone.separate_targets:
        stored = config.num_layers or layers  # by default, as many as in the encoder
    elif modules != 1:
        raise _Misfit(f"adapter_config.json: num_transformer_submodules is {modules}, not 1")
    shape = config.required("num_virtual_tokens"), stored, 2, kv_heads, size
    if (heads := config.num_attention_heads or kv_heads) != kv_heads:
        raise _Misfit(
            f"adapter_config.json: num_attention_heads is {heads}, but the base model "
            f"{base.name!r} has {kv_heads} key-value heads"
        )
    if embeddings.shape != (shape[0], math.prod(shape[1:])):
        raise _Misfit(
            f"{_FILE}: prompt_embeddings has shape {embeddings.shape}, but the base model "
            f"{base.name!r} takes ({shape[0]}, {math.prod(shape[1:])})"
        )
    keys, values = embeddings.reshape(shape).transpose(2, 1, 0, 3, 4)
    if base.backbone.separate_targets:
        if modules == 1 and stored < layers:
            raise _Misfit(f"adapter_config.json: num_layers is {stored}, the decoder has {layers}")
        used = np.arange(layers) * modules % stored  # see `prefix_adapter`
        keys, values = keys[used], values[used]
    return {"keys": jnp.asarray(keys), "values": jnp.asarray(values)}


def _lora(
    config: _Config, values: Mapping[str, Any], tensors: _Tensors, base: Base
) -> tuple[dict[str, Any], dict[str, float]]:
    for key in _OTHER_THAN_LORA:
        if values.get(key) not in (None, False, "none", [], {}):
            raise _Misfit(f"adapter_config.json: {key} {shortened(values[key])} is not supported")
    left = dict(tensors)
    arrays: dict[str, Any] = {}
    scales: dict[str, float] = {}
    linears = matrices_of(base.backbone)
    for name, (entry, paths) in stored_modules(base).items():
        layers = len(linears[paths[0]].kernel)
        sides = [
            _take_pair(left, name.format(layer=layer), linears, entry, paths, base)
            for layer in range(layers)
        ]
        if not any(sides):
            continue
        factors = [_scale(config, name.format(layer=i), pair) for i, pair in enumerate(sides)]
        scale = next(factor for factor in factors if factor)
        for part, path in enumerate(paths):
            _, inputs, outputs = linears[path].shape
            rank = max(len(pair[0]) for pair in sides if pair)
            down = np.zeros((layers, inputs, rank), np.float32)
            up = np.zeros((layers, rank, outputs), np.float32)
            for layer, pair in enumerate(sides):
                if pair:
                    r, factor = len(pair[0]), np.float32(factors[layer] / scale)
                    down[layer, :, :r] = pair[0].T
                    up[layer, :r] = pair[1][part].T * factor
            if entry.form is not WHOLE:  # drop the ranks of the other parts of the module
                used = up.any(axis=(0, 2))
                down, up = down[:, :, used], up[:, used]
            if up.size:
                arrays[f"{path}.down"], arrays[f"{path}.up"] = jnp.asarray(down), jnp.asarray(up)
                scales[path] = scale
    if left:
        raise _Misfit(f"{_FILE}: the base model {base.name!r} has no module for {_listed(left)}")
    if not scales:
        raise _Misfit(f"{_FILE}: no matrices")
    return arrays, scales


def _take_pair(left, module: str, linears, entry, paths, base: Base):
    """Remove and return A `[R, in]` of a module and the parts `[out, R]` of its B.

    Returns None if the adapter does not change the module.
    """
    names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
    here = [name for name in names if name in left]
    if not here:
        return None
    if len(here) == 1:
        missing = names[1 - names.index(here[0])]
        raise _Misfit(f"{_FILE}: there is {here[0]}, but not {missing}")
    down, up = (left.pop(name) for name in names)
    inputs = linears[paths[0]].shape[1]
    outputs = sum(linears[path].shape[2] for path in paths)
    if down.shape[1:] != (inputs,) or up.shape != (outputs, len(down)):
        raise _Misfit(
            f"{_FILE}: {module} has A {down.shape} and B {up.shape}, but the module of the base "
            f"model {base.name!r} is [{outputs}, {inputs}]"
        )
    return down, entry.form.split(up, base.backbone.arch)


def _scale(config: _Config, module: str, pair) -> float:
    """Return the factor of B·A of a module; 0 if the adapter does not change it."""
    if pair is None:
        return 0.0
    alpha = config.required("lora_alpha")
    for pattern, value in (config.alpha_pattern or {}).items():
        if f".{module}".endswith(f".{pattern}"):
            alpha = value
            break
    rank = len(pair[0])
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _listed(tensors: Mapping[str, Any]) -> str:
    names = sorted(tensors)
    first = ", ".join(shown(name, 200) for name in names[:3])
    return first + (f" and {len(names) - 3} more" if names[3:] else "")
