"""The file of a study: one question per line, and its settings in a file beside it."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO

import pydantic

from softprompt.errors import UserError
from softprompt.experiment.reading import differences
from softprompt.files.json_files import checked, parse_json, read_json
from softprompt.files.reading import MEBIBYTE, read_bytes
from softprompt.files.writing import require_writable, write_errors, write_file
from softprompt.inference.study import Study, StudyQuestion
from softprompt.runtime.progress import Progress, silent

_LARGEST = 256 * MEBIBYTE


class _Line(pydantic.BaseModel):
    """The schema of a line."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    question: str
    answer: str
    kind: str
    chunk: int


def write_study(study: Study, path: Path, progress: Progress = silent) -> int:
    """Write the questions of a study to a JSON Lines file, or go on with an interrupted one.

    Every batch is written as soon as it is done. If the process ends, the next call continues, and
    the file becomes the same as without the interruption.

    Args:
      study: the study.
      path: the file. The file beside it, with the suffix `.study.json`, holds the settings.
      progress: shows how many questions are done.

    Returns:
      The number of questions that existed already.

    Raises:
      UserError: if the file belongs to other settings or to something else, is damaged, or cannot
        be written, or if another process writes it.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: a study writes JSON Lines; choose a name that ends in .jsonl")
    require_writable(path)
    with write_errors(path), path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another process is writing it") from None
        _require_settings(study, path)
        done = _read_done(study, file, path)
        total = study.batches()[-1].stop
        with progress("study", total, "questions", done=len(done)) as bar:
            for batch in study.write(done):
                for each in batch:
                    line = json.dumps(each._asdict(), ensure_ascii=False)
                    file.write(f"{line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
                bar.advance(len(batch))
    return len(done)


def _require_settings(study: Study, path: Path) -> None:
    """Write the settings of a new study; require that an existing one has the same."""
    settings = path.with_suffix(".study.json")
    if not path.stat().st_size:
        text = json.dumps(study.description, indent=2, ensure_ascii=False)
        with write_errors(settings):
            write_file(settings, f"{text}\n")
    elif not settings.exists():
        raise UserError(
            f"{path}: exists already, and {settings.name} is not beside it; choose another file"
        )
    elif changes := differences(read_json(settings), study.description):
        raise UserError(
            f"{path}: was written with other settings ({'; '.join(changes)}); choose another file"
        )


def _read_done(study: Study, file: IO[bytes], path: Path) -> list[StudyQuestion]:
    """Return the questions of all complete batches, and remove the rest of the file."""
    # What a killed process left of a line comes last.
    *lines, _ = read_bytes(path, _LARGEST).split(b"\n")
    done = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text") from None
        done.append(StudyQuestion(**checked(_Line, parse_json(text, where), where).model_dump()))
    stops = [batch.stop for batch in study.batches()]
    if len(done) > stops[-1]:
        raise UserError(f"{path}: has {len(done)} lines, more than the {stops[-1]} questions")
    complete = max((stop for stop in stops if stop <= len(done)), default=0)
    file.truncate(sum(len(line) + 1 for line in lines[:complete]))
    return done[:complete]
