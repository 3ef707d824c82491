"""Saved arrays with checksums. No other module uses Orbax.

A saved folder holds `arrays/` (written by Orbax), one JSON file that describes them, and
`SHA256SUMS` with the checksum of every file. Orbax does not detect a flipped bit, so the
checksums are verified before anything is loaded.
"""

import contextlib
import errno
import gc
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from orbax.checkpoint import v1 as orbax

from softprompt.errors import UserError, reason_of
from softprompt.files.json_files import read_json
from softprompt.files.reading import MEBIBYTE, open_file, read_text
from softprompt.parallel.hosts import bytes_here, is_main, wait_for_all
from softprompt.runtime.finite import require_finite
from softprompt.runtime.memory import available_memory, gibibytes

_SUMS = "SHA256SUMS"
_STRAGGLERS = 0.3  # seconds until reads that go on after an error have ended

Result = TypeVar("Result")

# The trials of a sweep save from several threads, and Orbax mixes up concurrent saves.
_ORBAX_LOCK = threading.Lock()


class DamagedError(UserError):
    """A saved file is missing, truncated or altered. The message names it."""


def save_arrays(folder: Path, arrays: Any, description: Mapping[str, Any], file: str) -> None:
    """Write arrays and their description to a folder, completely or not at all.

    An existing folder is replaced by two renames, between which it briefly does not exist.

    In a run of several processes, all of them call this together. Each writes its part of arrays
    that are divided over them, and the main process writes everything else.

    Args:
      folder: the folder to create or replace.
      arrays: a pytree of arrays; NNX states lose their variable types.
      description: content of the JSON file.
      file: name of the JSON file.

    Raises:
      NotFiniteError: if an array holds infinity or NaN. Nothing is written then.
      OSError: if the folder cannot be written or the disk is full.
    """
    require_finite(arrays, f"{folder}: not saved")
    new = folder.with_name(f".{folder.name}.new")
    if is_main():
        shutil.rmtree(new, ignore_errors=True)
        _require_space(folder.parent, arrays)
        new.mkdir()  # fails at once; Orbax would retry for a minute
    wait_for_all("the new folder is empty")
    if jax.tree.leaves(arrays):
        _save(new.absolute() / "arrays", nnx.as_pure(arrays))
    if is_main():
        _complete(folder, new, description, file)
    wait_for_all("the new folder is complete")


def _complete(folder: Path, new: Path, description: Mapping[str, Any], file: str) -> None:
    """Add the description and the checksums to a new folder, and let it replace the old one."""
    old = folder.with_name(f".{folder.name}.old")
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


def _require_space(folder: Path, arrays: Any) -> None:
    """Check that the disk has space for arrays.

    If the disk became full while Orbax writes, its threads would print tracebacks.

    Raises:
      OSError: if there is too little.
    """
    leaves = jax.tree.leaves(arrays)
    needed = sum(leaf.nbytes for leaf in leaves) + len(leaves) * 2**12 + 2**18
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _save(path: Path, arrays: Any) -> None:
    """Save a pytree of arrays with Orbax.

    Raises:
      OSError: if it cannot be written.
    """
    try:
        with _alone_and_quiet():
            orbax.save(path, arrays)
    except Exception as error:  # of many types; TensorStore names the system's error
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


@contextlib.contextmanager
def _alone_and_quiet() -> Iterator[None]:
    """Use Orbax in one thread at a time, and without logs, which repeat what it raises."""
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    with _ORBAX_LOCK:
        levels = [log.level for log in logs]
        for log in logs:
            log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)


def load_description(folder: Path, file: str, limit: int = 16 * MEBIBYTE) -> dict[str, Any]:
    """Verify the checksum of every file of a saved folder, and read the description.

    Args:
      folder: the saved folder.
      file: name of the JSON file.
      limit: the largest size of the JSON file, in bytes.

    Raises:
      DamagedError: if a file is missing, altered or too large; the message names it.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder}: no such folder")
    try:
        sums = _read_sums(folder / _SUMS)
        _require_files_and_folders(folder)
        present = {str(path.relative_to(folder)): path for path in _files(folder)}
        for name, digest in sums.items():
            if name not in present:  # names that lead out of the folder are not in it either
                raise DamagedError(f"{folder / name}: missing")
            if _sha256(present[name]) != digest:
                raise DamagedError(f"{folder / name}: damaged (its SHA-256 does not match {_SUMS})")
        for name in present:  # Orbax reads whatever is in `arrays/`
            if name.startswith("arrays/") and name not in sums:
                raise DamagedError(f"{folder / name}: not listed in {_SUMS}; remove it")
        if file not in sums:
            raise DamagedError(f"{folder / file}: missing")
        return read_json(folder / file, limit)
    except DamagedError:
        raise
    except UserError as error:
        raise DamagedError(str(error)) from None
    except OSError as error:
        raise DamagedError(f"{folder}: cannot be read ({error.strerror})") from None


def digest_of_files(folder: Path) -> str:
    """Return one digest of the checksums of all files in a saved folder."""
    return _sha256(folder / _SUMS)


def _require_files_and_folders(folder: Path) -> None:
    """Check that a folder holds nothing else. Orbax would wait forever for a pipe's writer."""
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise DamagedError(f"{path}: neither a file nor a folder")


def _read_sums(path: Path) -> dict[str, str]:
    """Read the checksums by the names of the files."""
    if not path.exists():
        raise DamagedError(f"{path}: missing")
    *lines, end = read_text(path).split("\n")
    pairs = [line.split("  ", 1) for line in lines]
    if end or not all(len(pair) == 2 for pair in pairs):
        raise DamagedError(f"{path}: damaged")
    return {name: digest for digest, name in pairs}


def load_arrays(folder: Path, like: Any) -> Any:
    """Load the arrays of a folder that `load_description` has verified.

    Args:
      folder: the saved folder.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the expected structure. In a run of
        several processes, all of them call this together.

    Returns:
      The arrays in the structure of `like`: divided over devices as these are, otherwise on the
      first device.

    Raises:
      DamagedError: if the saved arrays have another structure, shape or dtype.
      NotFiniteError: if a saved array holds infinity or NaN.
      UserError: if the arrays need more memory than is available.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_divided_or_first(x)),
        nnx.as_pure(like),
    )
    path, leaves = folder.absolute() / "arrays", jax.tree.leaves(abstract)
    if not leaves and not path.exists():
        return like
    _read(path, lambda: _require_shapes(folder, orbax.metadata(path).metadata, abstract))
    needed, available = bytes_here(leaves), available_memory()
    if needed > available:
        raise UserError(
            f"{path}: needs {gibibytes(needed)} of memory, but {gibibytes(available)} are available"
        )
    loaded = _read(path, lambda: orbax.load(path, abstract))
    require_finite(loaded, str(path))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(loaded))


def _divided_or_first(array: Any) -> jax.sharding.Sharding:
    """Return the sharding of an array if it has several devices, otherwise the first device."""
    sharding = getattr(array, "sharding", None)
    if sharding is not None and len(sharding.device_set) > 1:
        return sharding
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _read(path: Path, reading: Callable[[], Result]) -> Result:
    """Return what Orbax reads.

    Raises:
      DamagedError: if it fails.
    """
    try:
        with _alone_and_quiet(), _first_error_only():
            return reading()
    except DamagedError:
        raise
    except Exception as error:  # of many types, as the files decide what is called
        raise DamagedError(f"{path}: cannot be read ({reason_of(error)})") from error


def _require_shapes(folder: Path, saved_arrays: Any, expected_arrays: Any) -> None:
    """Check that the arrays of a folder have the expected names, dtypes and shapes."""
    saved, expected = _shapes(saved_arrays), _shapes(expected_arrays)
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise DamagedError(
                f"{folder}: unexpected arrays ({name} is {saved.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such array')})"
            )


@contextlib.contextmanager
def _first_error_only() -> Iterator[None]:
    """Drop what is printed about further errors after one that is raised.

    Orbax reads arrays at the same time. If one fails, the others end later, in threads of
    TensorStore that print tracebacks, or when their tasks are freed.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except Exception as error:
            time.sleep(_STRAGGLERS)
            cause: BaseException | None = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)  # they hold tasks
                cause = cause.__cause__ or cause.__context__
            gc.collect()
            raise
        finally:
            sys.unraisablehook = hook


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
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    """Call `fsync` on a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
