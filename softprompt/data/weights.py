"""Weights of examples, read from a field of their records.

Axis letters: N examples.
"""

import math
from collections.abc import Iterable

import numpy as np

from softprompt.data.examples import Example
from softprompt.data.records import Record
from softprompt.errors import UserError, shortened


def example_weights(examples: Iterable[Example], field: str | None) -> np.ndarray | None:
    """Return the weight of each example, float32 `[N]`, or None if there is no field.

    Args:
      examples: N examples.
      field: the field of their records that holds a number of at least 0, or None.

    Raises:
      UserError: if a record has no such number, or all are 0.
    """
    if field is None:
        return None
    weights = np.array([_weight(example.record, field) for example in examples], np.float32)
    if not weights.any():
        raise UserError(f"objective.weights: field {field!r} is 0 in all training records")
    return weights


def _weight(record: Record, field: str) -> float:
    """Return the weight of a record. In a .csv file, a number is text."""
    text = record.text(field)
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < 1e30:
        raise UserError(
            f"{record.where}: field {field!r} is {shortened(text)}; a weight is a number of at "
            "least 0"
        )
    return weight
