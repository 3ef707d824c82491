"""What the fields of a dataset hold, for a first guess at the task."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.data.records import Record
from softprompt.errors import UserError

MOST_LABELS = 50
"""The most values of a field that can be labels."""
_LONGEST_LABEL = 60  # characters
_ENOUGH = 0.5  # of the records have text in a field that is of use


@dataclasses.dataclass
class Column:
    """One field over all records.

    Attributes:
      name: the field.
      values: how often each text occurs; at most `MOST_LABELS` + 1 different ones are counted.
      lengths: number of characters of each record that has text in this field.
      numeric: whether all of these texts are numbers.
      whole: whether all of these texts are whole numbers.
      conversations: number of records with a list of messages in this field. `lengths` has the
        characters of their last messages.
      records: number of all records.
    """

    name: str
    values: Counter[str] = dataclasses.field(default_factory=Counter)
    lengths: list[int] = dataclasses.field(default_factory=list)
    numeric: bool = True
    whole: bool = True
    conversations: int = 0
    records: int = 0

    @property
    def useful(self) -> bool:
        """Whether enough records have text in this field, and not all the same text."""
        return (
            len(self.values) > 1
            and not self.conversations
            and len(self.lengths) >= _ENOUGH * self.records
        )

    @property
    def has_conversations(self) -> bool:
        """Whether enough records have messages in this field."""
        return self.conversations >= max(1, _ENOUGH * self.records)

    @property
    def complete(self) -> bool:
        """Whether all records have text in this field."""
        return len(self.lengths) == self.records

    @property
    def has_labels(self) -> bool:
        """Whether there are few different texts, all short, that occur twice on average."""
        few = 2 <= len(self.values) <= MOST_LABELS and 2 * len(self.values) <= len(self.lengths)
        return few and max(self.lengths) <= _LONGEST_LABEL and (self.whole or not self.numeric)

    def typical_length(self) -> int:
        """Return the number of characters that 95 % of the texts do not exceed."""
        return sorted(self.lengths)[math.ceil(0.95 * len(self.lengths)) - 1]

    def add(self, text: str) -> None:
        """Count the text of one more record."""
        self.lengths.append(len(text))
        if text in self.values or len(self.values) <= MOST_LABELS:
            self.values[text] += 1
        self.numeric = self.numeric and _is_a(float, text)
        self.whole = self.whole and _is_a(int, text)


def columns_of(records: Sequence[Record]) -> list[Column]:
    """Return the fields of all records, in the order in which they first occur."""
    columns: dict[str, Column] = {}
    for record in records:
        for name, value in record.fields.items():
            column = columns.setdefault(str(name), Column(str(name)))
            if _are_messages(value):
                column.conversations += 1
                column.lengths.append(len(str(value[-1]["content"])))
                continue
            try:
                column.add(record.text(name))
            except UserError:  # not text, or empty
                continue
    for column in columns.values():
        column.records = len(records)
    return list(columns.values())


def _are_messages(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in value)


def _is_a(kind: Any, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True
