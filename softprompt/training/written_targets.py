"""Targets that a teacher writes before training, kept in the run folder.

A file `targets-<split>.jsonl` begins with digests of the teacher and the records, and has one more
line for each record. Lines are added while the teacher writes, so that a stopped run can continue.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from softprompt.data.records import Record
from softprompt.data.task import Task
from softprompt.errors import FolderError, UserError
from softprompt.experiment.schema import Experiment, GenerationSettings
from softprompt.files.json_lines import parse_json_lines
from softprompt.files.reading import MEBIBYTE, read_bytes
from softprompt.files.writing import write_errors, write_file
from softprompt.generation.engine import Engine, Request, requests_of
from softprompt.parallel.hosts import is_main, result_of_main
from softprompt.runtime.progress import Progress
from softprompt.training.teachers import PreparedTeacher

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation")  # the teacher writes their targets

_LIMIT = 4096 * MEBIBYTE
_BATCHES = 4  # generated before their texts are stored


@dataclasses.dataclass(frozen=True)
class WrittenTargets:
    """The targets that a teacher wrote for the records of a split.

    Attributes:
      split: the name of the split.
      header: the first line of the file: `digest` of the teacher, its settings and its inputs,
        `teacher`, the digest of the teacher alone, and `records`, of the inputs of the student.
      texts: one for each record; empty if the teacher wrote nothing.
      records: the records with a text, which is their target.
    """

    split: str
    header: Mapping[str, str]
    texts: Sequence[str]
    records: Sequence[Record]

    def save(self, folder: Path) -> None:
        """Store the targets in another run folder.

        Raises:
          UserError, FolderError: see `write_targets`.
        """
        path = _path(folder, self.split)
        stored = result_of_main(lambda: _begin(path, self.header, len(self.texts)))
        if is_main():
            _append(path, self.texts[len(stored) :])


def write_targets(
    teacher: PreparedTeacher,
    student: Task,
    experiment: Experiment,
    records: Sequence[Record],
    split: str,
    folder: Path | None,
    progress: Progress,
) -> WrittenTargets:
    """Return records with the targets that a teacher writes. Stored targets are used again.

    Records after which the teacher writes nothing are left out.

    Args:
      teacher: the teacher, which writes greedily.
      student: the task of the student, which learns the targets.
      experiment: its section `generation` says how long a target may be and where it stops.
      records: the records of a split. Their own targets are not read.
      split: the name of the split.
      folder: the run folder; None to store nothing. A file with targets of another teacher or for
        other data is renamed.
      progress: shows how many targets have been written.

    Raises:
      UserError: if a record does not fit the template, or the file cannot be read or written.
      FolderError: if a run began with other targets.
    """
    task, model, size = teacher.task, teacher.model, experiment.evaluation.batch_size
    settings = task.stopping(experiment.generation, trained=False)
    requests = requests_of(records, task, model.prefix, settings)
    header = _header(teacher, settings, requests, _digest_of(student, records))
    path, texts = None, []
    if folder is not None:
        path = _path(folder, split)
        texts = result_of_main(lambda: _begin(path, header, len(records)))
    engine = Engine(model.backbone, task.base.tokenizer, settings)
    with progress(f"write {split} targets", len(records), "targets", done=len(texts)) as bar:
        while len(texts) < len(records):
            part = requests[len(texts) : len(texts) + _BATCHES * size]
            new = [each.text.strip() for each in engine.generate(part, size)]
            if path is not None and is_main():
                _append(path, new)
            texts += new
            bar.advance(len(new))
    return _with_targets(student, records, split, header, texts)


def read_targets(
    student: Task, records: Sequence[Record], split: str, folder: Path
) -> WrittenTargets:
    """Read the targets of records from a run folder, without the teacher.

    Args:
      student: the task of the student.
      records: the records of a split, as the run read them.
      split: the name of the split.
      folder: the run folder.

    Raises:
      UserError: if the file is missing, damaged or incomplete, or is for other records.
    """
    path = _path(folder, split)
    if not path.exists():
        raise UserError(
            f"{path}: no such file; it contains the targets that the teacher wrote for the {split} "
            "data"
        )
    header, texts, _ = _read(path)
    if header.get("records") != _digest_of(student, records):
        raise UserError(
            f"{path}: the {split} data has changed since the teacher wrote these targets; restore "
            "the data"
        )
    if len(texts) != len(records):
        raise UserError(f"{path}: has {len(texts)} targets for {len(records)} records")
    return _with_targets(student, records, split, header, texts)


def require_unused(folder: Path) -> None:
    """Check that no run has begun in a folder whose teacher or data has changed.

    Raises:
      FolderError: if there are checkpoints.
    """
    if any(folder.glob("checkpoints/*")):
        raise FolderError(
            f"{folder}: its teacher or data has changed since the run began; restore it, "
            "or choose another folder"
        )


def _path(folder: Path, split: str) -> Path:
    return folder / f"targets-{split}.jsonl"


def _header(
    teacher: PreparedTeacher,
    settings: GenerationSettings,
    requests: Sequence[Request],
    records: str,
) -> dict[str, str]:
    """Return the first line of a file; see `WrittenTargets`."""
    digest = hashlib.sha256(f"{teacher.digest} {settings.model_dump_json()}".encode())
    for request in requests:
        digest.update(json.dumps(list(map(int, request.tokens))).encode())
    return {"digest": digest.hexdigest(), "teacher": teacher.digest, "records": records}


def _digest_of(student: Task, records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(student.input_fields(record)).encode())
    return digest.hexdigest()


def _with_targets(
    student: Task,
    records: Sequence[Record],
    split: str,
    header: Mapping[str, str],
    texts: Sequence[str],
) -> WrittenTargets:
    written = [
        student.with_target(record, text)
        for record, text in zip(records, texts, strict=True)
        if text
    ]
    if not written:
        raise UserError(f"objective.teacher: the teacher wrote no target for the {split} data")
    if len(written) < len(records):
        count = len(records) - len(written)
        _log.info(f"{split}: left out {count} records for which the teacher wrote nothing")
    return WrittenTargets(split, header, texts, written)


def _begin(path: Path, header: Mapping[str, str], count: int) -> list[str]:
    """Return the stored targets of the first records; begin the file if there are none.

    An incomplete last line, left by a killed process, is removed.
    """
    texts: list[str] = []
    complete = False
    if path.exists():
        found, stored, complete = _read(path)
        if found.get("digest") == header["digest"]:
            texts = stored
        elif found:
            require_unused(path.parent)
            other = _unused_name(path)
            with write_errors(path):
                path.rename(other)
            _log.warning(
                f"{path}: the teacher or the data has changed; the earlier targets are now in "
                f"{other.name}"
            )
        if len(texts) > count:
            raise UserError(f"{path}: has more targets than records; delete it to write it again")
    if not texts or not complete:
        lines = [json.dumps(header), *map(_line, texts)]
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(f"{line}\n" for line in lines))
    return texts


def _read(path: Path) -> tuple[dict[str, str], list[str], bool]:
    """Return the header, the targets, and whether the last line is complete."""
    *lines, end = read_bytes(path, _LIMIT).decode(errors="replace").split("\n")
    values = list(parse_json_lines(lines, str(path)))
    if not values or "digest" not in values[0][1]:
        return ({"digest": ""} if values else {}), [], not end
    for where, value in values[1:]:
        if not isinstance(value.get("target"), str):
            raise UserError(f"{where}: not a target; delete the file to write it again")
    return values[0][1], [value["target"] for _, value in values[1:]], not end


def _unused_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.{number}.jsonl") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _append(path: Path, texts: Sequence[str]) -> None:
    with write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{_line(text)}\n" for text in texts))


def _line(text: str) -> str:
    return json.dumps({"target": text}, ensure_ascii=False)
