"""Saved arrays with checksums. No other module uses Orbax.

A saved folder holds `arrays/` (written by Orbax), one JSON file that describes them, and
`SHA256SUMS` with the checksum of every file. Orbax does not detect a flipped bit, so the
checksums are verified before anything is loaded.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as orbax

from softprompt.errors import UserError
from softprompt.files.json_files import read_json

_SUMS = "SHA256SUMS"
# The trials of a sweep save from several threads, and Orbax mixes up concurrent saves.
_ORBAX_LOCK = threading.Lock()


class DamagedError(UserError):
    """A saved file is missing, truncated or altered. The message names it."""


def save_arrays(folder: Path, arrays: Any, description: Mapping[str, Any], file: str) -> None:
    """Write arrays and their description to a folder, completely or not at all.

    An existing folder is replaced by two renames, between which it briefly does not exist.

    Args:
      folder: the folder to create or replace.
      arrays: a pytree of arrays; NNX states lose their variable types.
      description: content of the JSON file.
      file: name of the JSON file.
    """
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()  # fails at once; Orbax would retry for a minute
    if jax.tree.leaves(arrays):
        with _ORBAX_LOCK:
            orbax.save(new.absolute() / "arrays", nnx.as_pure(arrays))
    (new / file).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    sums = [f"{_sha256(path)}  {path.relative_to(new)}\n" for path in _files(new)]
    (new / _SUMS).write_text("".join(sums))
    for path in [*_files(new), *(p for p in new.rglob("*") if p.is_dir()), new]:
        _flush_to_disk(path)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _flush_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_description(folder: Path, file: str) -> dict[str, Any]:
    """Verify the checksum of every file of a saved folder, and read the description.

    Args:
      folder: the saved folder.
      file: name of the JSON file.

    Raises:
      DamagedError: if a file is missing or altered; the message names it.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder}: no such folder")
    try:
        *lines, end = (folder / _SUMS).read_text().split("\n")
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if end:
            raise ValueError("truncated")
    except FileNotFoundError:
        raise DamagedError(f"{folder / _SUMS}: missing") from None
    except ValueError:
        raise DamagedError(f"{folder / _SUMS}: damaged") from None
    present = {str(path.relative_to(folder)): path for path in _files(folder)}
    for name, digest in sums.items():
        if name not in present:
            raise DamagedError(f"{folder / name}: missing")
        if _sha256(present[name]) != digest:
            raise DamagedError(f"{folder / name}: damaged (its SHA-256 does not match {_SUMS})")
    if file not in sums:
        raise DamagedError(f"{folder / file}: missing")
    try:
        return read_json(folder / file)
    except UserError as error:
        raise DamagedError(str(error)) from None


def load_arrays(folder: Path, like: Any) -> Any:
    """Load the arrays of a folder that `load_description` has verified.

    Args:
      folder: the saved folder.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the expected structure.

    Returns:
      The arrays, on the first device, in the structure of `like`.

    Raises:
      DamagedError: if the saved arrays have another structure, shape or dtype.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nnx.as_pure(like)
    )
    path = folder.absolute() / "arrays"
    if not jax.tree.leaves(like) and not path.exists():
        return like
    saved, expected = _shapes(orbax.metadata(path).metadata), _shapes(abstract)
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise DamagedError(
                f"{folder}: unexpected arrays ({name} is {saved.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such array')})"
            )
    with _ORBAX_LOCK:
        loaded = orbax.load(path, abstract)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(loaded))


def _shapes(tree: Any) -> dict[str, str]:
    """The dtype and shape of every array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / _SUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    """Call `fsync` on a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
