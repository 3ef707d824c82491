"""Files of predictions, scored and compared."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from softprompt.data.records import read_records
from softprompt.errors import UserError
from softprompt.metrics.named import measure
from softprompt.metrics.scores import Difference, Scores, paired_test


@dataclasses.dataclass(frozen=True)
class Answers:
    """Predictions, and for each a reference, or several of which any will do."""

    predictions: Sequence[str]
    references: Sequence[str | Sequence[str]]


def read_answers(path: str) -> Answers:
    """Read `{"prediction": ..., "reference": ...}` a line; other keys do not matter.

    Raises:
      UserError: with file and line, if one of them is missing or no text.
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
            raise UserError(f"{record.where}: 'prediction' is no text")
        listed = reference if isinstance(reference, list) else [reference]
        if not listed or not all(isinstance(text, str) for text in listed):
            raise UserError(f"{record.where}: 'reference' is neither a text nor a list of texts")
        predictions.append(prediction)
        references.append(reference)
    return Answers(predictions, references)


def compare_answers(
    ours: Answers, theirs: Answers, metrics: Sequence[str], *, stem: bool
) -> tuple[dict[str, Scores], dict[str, Difference]]:
    """Scores of others' answers to the same examples, and by how much ours differ from them.

    Raises:
      UserError: if the references of the two are not the same.
    """
    if ours.references != theirs.references:
        raise UserError("the two files do not have the same references in the same order")
    own = measure(metrics, ours.predictions, ours.references, stem=stem)
    other = measure(metrics, theirs.predictions, theirs.references, stem=stem)
    differences: dict[str, Difference] = {}
    for name, scores in own.items():
        differences |= paired_test(scores, other[name])
    return other, differences
