"""Score and compare files of predictions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from softprompt.data.formats import LONGEST_LINE
from softprompt.data.records import read_records
from softprompt.errors import UserError
from softprompt.files.json_lines import parse_json_lines
from softprompt.files.writing import require_writable
from softprompt.metrics.named import measure
from softprompt.metrics.scores import Difference, Scores, paired_test
from softprompt.runtime.progress import Progress, silent


@dataclasses.dataclass(frozen=True)
class Answers:
    """The predictions of one system and their references.

    Attributes:
      predictions: N texts.
      references: for each prediction a text, or a list of texts that are all correct.
    """

    predictions: Sequence[str]
    references: Sequence[str | Sequence[str]]


def read_answers(path: str) -> Answers:
    """Read a file with a line `{"prediction": ..., "reference": ...}` per example.

    Other keys are ignored.

    Raises:
      UserError: with file and line, if one of the keys is missing or is not text.
    """
    if Path(path).suffix != ".jsonl":
        raise UserError(f"{path}: predictions are read from a .jsonl file")
    predictions: list[str] = []
    references: list[str | Sequence[str]] = []
    for record in read_records(path):
        for key in ("prediction", "reference"):
            if key not in record.fields:
                raise UserError(f"{record.where}: has no {key!r}")
        prediction, reference = record.fields["prediction"], record.fields["reference"]
        if not isinstance(prediction, str):
            raise UserError(f"{record.where}: 'prediction' is not text")
        listed = reference if isinstance(reference, list) else [reference]
        if not listed or not all(isinstance(text, str) for text in listed):
            raise UserError(f"{record.where}: 'reference' is neither a text nor a list of texts")
        predictions.append(prediction)
        references.append(reference)
    return Answers(predictions, references)


def require_output(path: Path) -> None:
    """Check that predictions can be written to a file, before long work that makes them.

    Earlier predictions may be replaced; another file may not.

    Raises:
      UserError: if the file cannot be written, or holds something other than predictions.
    """
    require_writable(path)
    if path.exists() and path.stat().st_size and not _holds_predictions(path):
        raise UserError(f"{path}: exists and does not hold predictions; choose another file")


def _holds_predictions(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(LONGEST_LINE).decode(errors="replace")
    try:
        return all("prediction" in fields for _, fields in parse_json_lines([line], str(path)))
    except UserError:
        return False


def compare_answers(
    ours: Answers,
    theirs: Answers,
    metrics: Sequence[str],
    *,
    stem: bool,
    progress: Progress = silent,
) -> tuple[dict[str, Scores], dict[str, Difference]]:
    """Compare two systems on the same examples.

    Args:
      ours, theirs: answers of the two systems, in the same order.
      metrics: names of the metrics.
      stem: whether ROUGE stems English words.
      progress: shows how many predictions are done.

    Returns:
      Their scores by metric, and by value name the differences, ours minus theirs.

    Raises:
      UserError: if the references of the two systems differ.
    """
    if ours.references != theirs.references:
        raise UserError("the two files do not have the same references in the same order")
    own = measure(metrics, ours.predictions, ours.references, stem=stem, progress=progress)
    other = measure(metrics, theirs.predictions, theirs.references, stem=stem, progress=progress)
    differences: dict[str, Difference] = {}
    for name, scores in own.items():
        differences |= paired_test(scores, other[name])
    return other, differences
