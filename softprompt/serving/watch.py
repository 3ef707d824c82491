"""Load the prompts of a folder: add new ones, replace changed ones, and remove deleted ones."""

import contextlib
import itertools
import logging
import os
import re
import shutil
import tarfile
import threading
from pathlib import Path
from typing import IO

from softprompt.errors import UserError
from softprompt.serving.prompts import Prompts
from softprompt.serving.scheduler import Busy

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_MOST_FILES = 1000  # of an upload
_SECONDS = 1.0  # between two checks of the folder

Stamp = tuple[tuple[str, int, int], ...]
"""The names, times and sizes of the files of a prompt."""


def require_name(name: str) -> None:
    """Require that a name is valid for a model and for a folder.

    Raises:
      UserError: if it is not.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name[:120]!r}: a name has at most 100 letters, digits and '._-', and begins with a "
            "letter or a digit"
        )


class Folders:
    """Keeps the prompts of a folder loaded.

    Args:
      root: the folder. Each folder in it with a finished run or a saved prompt is a prompt.
      prompts: where the prompts are loaded.
      reserved: names that folders do not replace.

    Raises:
      UserError: if the folder does not exist.
    """

    def __init__(self, root: Path, prompts: Prompts, reserved: frozenset[str]):
        if not root.is_dir():
            raise UserError(f"--prompts-dir {root}: no such folder")
        self.root = root.resolve()
        self._prompts, self._reserved = prompts, reserved
        self._loaded: dict[str, Stamp] = {}  # by folder name, including removed prompts
        self._seen: dict[str, Stamp] = {}  # in the previous check
        self._failed: dict[str, Stamp] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._finish_interrupted_uploads()

    def start(self) -> None:
        """Check the folder once per second, in a thread."""
        threading.Thread(target=self._watch, name="folders", daemon=True).start()

    def stop(self) -> None:
        """Stop checking the folder."""
        self._stopping.set()

    def _watch(self) -> None:
        problem: str | None = None
        while not self._stopping.wait(_SECONDS):
            try:
                self.look()
                problem = None
            except Exception as error:
                if repr(error) != problem:  # once, not every second
                    _log.exception(f"{self.root}: cannot be watched")
                problem = repr(error)

    def look(self, *, at_once: bool = False) -> None:
        """Load new and changed prompts, and remove deleted ones.

        Args:
          at_once: do not wait until the files of a prompt are the same in two checks. Otherwise,
            files that are still being written are not read.
        """
        with self._lock:
            found = self._found()
            self._failed = {name: stamp for name, stamp in self._failed.items() if name in found}
            for name in [name for name in self._loaded if name not in found]:
                del self._loaded[name]
                if self._prompts.remove(name):
                    _log.info(f"{name}: removed")
            for name, (folder, stamp) in found.items():
                is_complete = at_once or self._seen.get(name) == stamp
                if is_complete and stamp not in (self._loaded.get(name), self._failed.get(name)):
                    self._load(name, folder, stamp)
            self._seen = {name: stamp for name, (_, stamp) in found.items()}

    def _load(self, name: str, folder: Path, stamp: Stamp) -> None:
        try:
            require_name(name)
            self._prompts.load(name, folder)
        except Busy:  # try again at the next look
            return
        except (UserError, OSError) as error:
            self._failed[name] = stamp
            _log.warning(f"not served: {error}")
            return
        except Exception:  # the others must be loaded nevertheless
            self._failed[name] = stamp
            _log.exception(f"not served: {folder}")
            return
        self._failed.pop(name, None)
        self._loaded[name] = stamp
        _log.info(f"{name}: loaded")

    def _found(self) -> dict[str, tuple[Path, Stamp]]:
        """Return the prompts in the folder, by name."""
        found = {}
        with os.scandir(self.root) as scanned:
            entries = list(scanned)
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name in self._reserved or not path.is_dir():
                continue
            try:
                stamp = _stamp(path) if self._contains(path) else ()
            except OSError as error:  # loading it will say why it cannot be read
                stamp = ((str(error), 0, 0),)
            if stamp:
                found[entry.name] = path, stamp
        return found

    def _contains(self, path: Path) -> bool:
        """Whether a path is below the folder after links are resolved."""
        return self.root in path.resolve().parents

    # Requests over HTTP.

    def open(self, name: str, folder: str) -> None:
        """Load a prompt from a folder below the root.

        Raises:
          UserError: if it is not there, or the prompt cannot be loaded.
        """
        self._require_free(name)
        path = self.root / folder
        if "\0" in folder or not self._contains(path):
            raise UserError(f"folder {folder[:200]!r} is not below --prompts-dir")
        with self._lock:
            self._prompts.load(name, path)

    def upload(self, name: str, file: IO[bytes]) -> None:
        """Load a prompt from an archive, and store it in the folder.

        It can replace a saved prompt with the same name, but not a run.

        Args:
          name: the name of the prompt and of its folder.
          file: an uncompressed tar archive with the files of a saved prompt.

        Raises:
          UserError: if the archive or the prompt is malformed.
        """
        self._require_free(name)
        target, new = self.root / name, self.root / f".{name}.new"
        if target.exists() and not (target / "prompt.json").exists():
            raise UserError(
                f"{name}: this folder is not a saved prompt, so it is kept; choose another name"
            )
        with self._lock:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            try:
                _extract(file, new)
                try:
                    self._prompts.load(name, new, root=name)
                except UserError as error:
                    raise UserError(str(error).replace(str(new), name)) from None
                self._replace(target, new)
                self._loaded[name] = _stamp(target)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def _replace(self, target: Path, new: Path) -> None:
        old = self.root / f".{target.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def _finish_interrupted_uploads(self) -> None:
        for new in self.root.glob(".*.new"):
            shutil.rmtree(new, ignore_errors=True)
        for old in self.root.glob(".*.old"):
            target = self.root / old.name.removeprefix(".").removesuffix(".old")
            if not target.exists():
                with contextlib.suppress(OSError):
                    old.rename(target)
            shutil.rmtree(old, ignore_errors=True)

    def _require_free(self, name: str) -> None:
        require_name(name)
        if name in self._reserved:
            raise UserError(
                f"{name} is the name of a prompt on the command line; choose another name"
            )


def _stamp(path: Path) -> Stamp:
    """Return the state of the files of a finished run or saved prompt; empty if it is neither."""
    folder = path
    if (path / "config.yaml").exists():
        if not (path / "summary.json").exists():
            return ()
        folder = path / "prompt"
    if not (folder / "prompt.json").exists():
        return ()
    stamp = []
    for file in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # it is being replaced
            status = file.stat()
            stamp.append((str(file), status.st_mtime_ns, status.st_size))
    return tuple(stamp)


def _extract(file: IO[bytes], folder: Path) -> None:
    """Extract an archive. The files of the prompt are at its top level or in one folder.

    Raises:
      UserError: if it contains too many files, or anything but files and folders with plain names.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members = list(itertools.islice(archive, _MOST_FILES + 1))
            if len(members) > _MOST_FILES:
                raise UserError(f"the archive has more than {_MOST_FILES} files")
            names = {member.name: _plain_path(member) for member in members}
            marks = [path for path in names.values() if path.name == "prompt.json"]
            if len(marks) != 1:
                raise UserError("the archive must contain exactly one prompt.json")
            for member in members:
                path = names[member.name]
                if member.isdir() or marks[0].parent not in path.parents:
                    continue
                target = folder / path.relative_to(marks[0].parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                with content, target.open("xb") as copy:
                    shutil.copyfileobj(content, copy)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"not an uncompressed tar archive ({error})") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise UserError("the archive contains a name twice") from None


def _plain_path(member: tarfile.TarInfo) -> Path:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    is_plain = all(_PART.fullmatch(part) for part in parts) and not member.name.startswith("/")
    is_file = member.isreg() and not member.issparse()  # a few bytes can be a file of any size
    if not is_plain or not (is_file or member.isdir()):
        raise UserError(
            f"the archive contains {member.name[:200]!r}, which is not part of a saved prompt"
        )
    return Path(*parts)
