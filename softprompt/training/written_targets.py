"""Targets that a teacher writes before training, kept in the run folder.

A file `targets-<split>.jsonl` begins with a digest of the teacher and its inputs, and has one more
line for each record. Lines are added while the teacher writes, so that a stopped run can continue.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from softprompt.data.records import Record
from softprompt.data.task import Task
from softprompt.errors import FolderError, UserError
from softprompt.experiment.schema import Experiment
from softprompt.files.json_lines import parse_json_lines
from softprompt.files.reading import MEBIBYTE, read_bytes
from softprompt.files.writing import write_errors, write_file
from softprompt.generation.engine import Engine, requests_of
from softprompt.parallel.hosts import is_main, result_of_main
from softprompt.runtime.progress import Progress
from softprompt.training.teachers import PreparedTeacher

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation")  # the teacher writes their targets

_LIMIT = 4096 * MEBIBYTE
_BATCHES = 4  # generated before their texts are stored


def with_written_targets(
    teacher: PreparedTeacher,
    student: Task,
    experiment: Experiment,
    records: Sequence[Record],
    split: str,
    folder: Path | None,
    progress: Progress,
) -> Sequence[Record]:
    """Return records with the targets that a teacher writes. Stored targets are used again.

    Records after which the teacher writes nothing are left out.

    Args:
      teacher: the teacher, which writes greedily.
      student: the task of the student, which learns the targets.
      experiment: its section `generation` says how long a target may be and where it stops.
      records: the records of a split. Their own targets are not read.
      split: the name of the split.
      folder: the run folder; None to store nothing.
      progress: shows how many targets have been written.

    Raises:
      UserError: if a record does not fit the template, or the file cannot be read or written.
      FolderError: if a run began with other targets.
    """
    task, model, size = teacher.task, teacher.model, experiment.evaluation.batch_size
    settings = task.stopping(experiment.generation, trained=False)
    requests = requests_of(records, task, model.prefix, settings)
    digest = hashlib.sha256(f"{teacher.digest} {settings.model_dump_json()}".encode())
    for request in requests:
        digest.update(json.dumps(list(map(int, request.tokens))).encode())
    path = None if folder is None else folder / f"targets-{split}.jsonl"
    texts: list[str] = []
    if path is not None:
        texts = result_of_main(lambda: _stored(path, digest.hexdigest(), len(records)))
    engine = Engine(model.backbone, task.base.tokenizer, settings)
    with progress(f"write {split} targets", len(records), "targets", done=len(texts)) as bar:
        while len(texts) < len(records):
            part = requests[len(texts) : len(texts) + _BATCHES * size]
            new = [each.text.strip() for each in engine.generate(part, size)]
            if path is not None and is_main():
                _append(path, new)
            texts += new
            bar.advance(len(new))
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
    return written


def _stored(path: Path, digest: str, count: int) -> list[str]:
    """Return the stored targets of the first records; begin the file if there are none.

    An incomplete last line, left by a killed process, is removed.
    """
    texts: list[str] = []
    end = None  # an incomplete line
    if path.exists():
        *lines, end = read_bytes(path, _LIMIT).decode(errors="replace").split("\n")
        values = list(parse_json_lines(lines, str(path)))
        if values and values[0][1] == {"digest": digest}:
            for where, value in values[1:]:
                if not isinstance(value.get("target"), str):
                    raise UserError(f"{where}: not a target; delete the file to write it again")
                texts.append(value["target"])
        elif any(path.parent.glob("checkpoints/*")):
            raise FolderError(
                f"{path.parent}: its teacher or data has changed since the run began; restore it, "
                "or choose another folder"
            )
        if len(texts) > count:
            raise UserError(f"{path}: has more targets than records; delete it to write it again")
    if end != "" or not texts:
        lines = [json.dumps({"digest": digest}), *map(_line, texts)]
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(f"{line}\n" for line in lines))
    return texts


def _append(path: Path, texts: Sequence[str]) -> None:
    with write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{_line(text)}\n" for text in texts))


def _line(text: str) -> str:
    return json.dumps({"target": text}, ensure_ascii=False)
