"""Saved arrays: the only file that knows Orbax.

A saved folder holds `arrays/` (Orbax), one JSON file that describes them, and
`SHA256SUMS` of every file. Orbax itself does not notice a flipped bit, so the sums are
checked before anything is read.
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

_SUMS = "SHA256SUMS"
_ONE_AT_A_TIME = threading.Lock()  # Orbax mixes up what several threads save (trials of a sweep)


class DamagedError(UserError):
    """A saved file is missing, truncated or altered; the message names it."""


def save_arrays(folder: Path, arrays: Any, description: Mapping[str, Any], file: str) -> None:
    """Write arrays and their description to `folder`, whole or not at all.

    What was there is replaced; for a moment between two renames there is nothing.

    Args:
      folder: the folder to make.
      arrays: a pytree of arrays; NNX states lose their variable types.
      description: what goes into the JSON file.
      file: name of the JSON file.
    """
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()  # Orbax would wait a minute before it says that it cannot
    if jax.tree.leaves(arrays):
        with _ONE_AT_A_TIME:
            orbax.save(new.absolute() / "arrays", nnx.as_pure(arrays))
    (new / file).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    sums = [f"{_sha256(path)}  {path.relative_to(new)}\n" for path in _files(new)]
    (new / _SUMS).write_text("".join(sums))
    for path in [*_files(new), *(p for p in new.rglob("*") if p.is_dir()), new]:
        _sync(path)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_description(folder: Path, file: str) -> dict[str, Any]:
    """Check every file of a saved folder against its SHA-256 and read the description.

    Raises:
      DamagedError: naming the file that is missing or was altered.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder}: no such folder")
    try:
        *lines, end = (folder / _SUMS).read_text().split("\n")
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if end:
            raise ValueError("cut short")
    except FileNotFoundError:
        raise DamagedError(f"{folder / _SUMS}: missing") from None
    except ValueError:
        raise DamagedError(f"{folder / _SUMS}: damaged") from None
    here = {str(path.relative_to(folder)): path for path in _files(folder)}
    for name, digest in sums.items():
        if name not in here:
            raise DamagedError(f"{folder / name}: missing")
        if _sha256(here[name]) != digest:
            raise DamagedError(f"{folder / name}: damaged (its SHA-256 is not the recorded one)")
    if file not in sums:
        raise DamagedError(f"{folder / file}: missing")
    return json.loads((folder / file).read_text())


def load_arrays(folder: Path, like: Any) -> Any:
    """Read the arrays of a folder that `load_description` has checked.

    Args:
      folder: the folder.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s; what is saved must fit it.

    Raises:
      DamagedError: if what is saved has other shapes or another structure.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nnx.as_pure(like)
    )
    path = folder.absolute() / "arrays"
    if not jax.tree.leaves(like) and not path.exists():
        return like
    saved, wanted = _shapes(orbax.metadata(path).metadata), _shapes(abstract)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise DamagedError(
                f"{folder}: its arrays do not fit ({name} is {saved.get(name, 'missing')}, "
                f"not {wanted.get(name, 'there')})"
            )
    with _ONE_AT_A_TIME:
        loaded = orbax.load(path, abstract)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(loaded))


def _shapes(tree: Any) -> dict[str, str]:
    """Type and shape of every array of a tree, by its path."""
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
