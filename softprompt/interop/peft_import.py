"""Read adapters of `peft` from safetensors. Nothing in them is executed or unpickled.

Axis letters: P virtual tokens, D hidden, L layers, K key-value heads, h head size, R rank.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from softprompt.backbones.formats.names import WHOLE
from softprompt.backbones.loading import Base
from softprompt.errors import UserError
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
    config, tensors = _read_config(folder), _read_tensors(folder)
    kind = config.get("peft_type")
    try:
        if kind in ("PROMPT_TUNING", "P_TUNING"):
            return "prompt", _prompt(config, tensors, base), {}
        if kind == "PREFIX_TUNING":
            return "prefix", _prefix(config, tensors, base), {}
        if kind == "LORA":
            arrays, scales = _lora(config, tensors, base)
            return "lora", arrays, {"scales": scales}
    except _Misfit as error:
        raise UserError(f"{folder}: {error}") from None
    raise UserError(
        f"{folder}: adapters of kind {kind!r} are not supported "
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
    try:
        with path.open("rb") as file:
            vectors = np.load(file, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not an array of numbers ({str(error).splitlines()[0]})") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise UserError(f"{path}: not a matrix of floating-point numbers")
    try:
        return "prompt", {"vectors": _vectors(vectors, base)}, {}
    except _Misfit as error:
        raise UserError(f"{path}: {error}") from None


class _Misfit(Exception):
    """A mistake in an adapter. The caller adds the path to the message."""


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    return config


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / _FILE
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.exists():
            raise UserError(
                f"{pickled}: pickled files are not read, because unpickling can run any code; "
                "save the adapter as safetensors"
            )
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="flax") as file:
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"{path}: {name} has the type {tensor.dtype}, not floating point")
        tensors[name] = tensor.astype(np.float32)
        if not np.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} has values that are not finite")
    return tensors


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if type(value) is not int or not 0 < value < 1e9:
        raise _Misfit(f"adapter_config.json: {key} is {value!r}, but must be a positive integer")
    return value


def _positive(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _Misfit(f"adapter_config.json: {key} is {value!r}, but must be a positive number")
    return value


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


def _prompt(config, tensors, base: Base) -> dict[str, Any]:
    embeddings, length = _embeddings(tensors), _count(config, "num_virtual_tokens")
    modules = _count(config, "num_transformer_submodules", 1)
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


def _prefix(config, tensors, base: Base) -> dict[str, Any]:
    embeddings = _embeddings(tensors)
    layers, _, kv_heads, size = base.backbone.prefix_shape(0)
    modules, stored = _count(config, "num_transformer_submodules", 1), layers
    if base.backbone.separate_targets:
        stored = _count(config, "num_layers", layers)  # by default, as many as in the encoder
    elif modules != 1:
        raise _Misfit(f"adapter_config.json: num_transformer_submodules is {modules}, not 1")
    shape = _count(config, "num_virtual_tokens"), stored, 2, kv_heads, size
    if (heads := config.get("num_attention_heads", kv_heads)) != kv_heads:
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


def _lora(config, tensors, base: Base) -> tuple[dict[str, Any], dict[str, float]]:
    for key in _OTHER_THAN_LORA:
        if config.get(key) not in (None, False, "none", [], {}):
            raise _Misfit(f"adapter_config.json: {key} {config[key]!r} is not supported")
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
            _, inputs, outputs = linears[path].kernel.shape
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
    inputs = linears[paths[0]].kernel.shape[1]
    outputs = sum(linears[path].kernel.shape[2] for path in paths)
    if down.shape[1:] != (inputs,) or up.shape != (outputs, len(down)):
        raise _Misfit(
            f"{_FILE}: {module} has A {down.shape} and B {up.shape}, but the module of the base "
            f"model {base.name!r} is [{outputs}, {inputs}]"
        )
    return down, entry.form.split(up, base.backbone.arch)


def _scale(config, module: str, pair) -> float:
    """Return the factor of B·A of a module; 0 if the adapter does not change it."""
    if pair is None:
        return 0.0
    alpha = _positive(config, "lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _Misfit(f"adapter_config.json: alpha_pattern is {patterns!r}, not an object")
    for pattern in patterns:
        if set(pattern) & set("\\^$*+?{}[]|()"):
            raise _Misfit(f"adapter_config.json: alpha_pattern {pattern!r} is not a plain name")
        if f".{module}".endswith(f".{pattern}"):
            alpha = _positive(patterns, pattern)
            break
    rank = len(pair[0])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _listed(tensors: Mapping[str, Any]) -> str:
    names = sorted(tensors)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
