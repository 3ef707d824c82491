"""The rows of a teacher that go with the student's rows and have the same targets.

Axis letters: N examples, G packs.
"""

import dataclasses
from collections.abc import Container, Sequence

import numpy as np

from softprompt.backbones.batch import Batch
from softprompt.data.examples import Dataset
from softprompt.data.layout import Layout, PackedShape, grown, multiple_of_8
from softprompt.errors import UserError


class TeacherRows:
    """Lays out the rows of a teacher beside batches of the student's rows.

    Args:
      student: N examples.
      teacher: the same N examples as the teacher reads them.
      separate_targets: whether both backbones read targets separately from the input.

    Raises:
      UserError: if the targets of teacher and student have different lengths.
    """

    def __init__(self, student: Dataset, teacher: Dataset, separate_targets: bool):
        self._examples = teacher
        own, others = teacher.lengths, student.lengths
        if not np.array_equal(own.targets, others.targets):
            raise _other_targets()
        self._layout = Layout.of(own, separate_targets)
        self._lengths = self._layout.row_lengths(own)
        self._student_lengths = Layout.of(others, separate_targets).row_lengths(others)

    def beside(
        self, batch: Batch, packs: Sequence[np.ndarray], filled: Container[int] | None = None
    ) -> Batch:
        """Return a batch together with the rows that the teacher reads.

        The shape of these rows depends only on the batch and its examples.

        Args:
          batch: rows of the student.
          packs: the numbers of the examples in each pack.
          filled: see `Layout.lay_out`.

        Raises:
          UserError: if the targets differ.
        """
        members = self._student_lengths <= batch.row_length
        share = self._lengths[members].sum() / self._student_lengths[members].sum()
        usual = multiple_of_8(int(batch.tokens.shape[1] * share) + 1)
        needed = max((int(self._lengths[pack].sum()) for pack in packs), default=0)
        shape = PackedShape(
            packs=batch.tokens.shape[0],
            rows=batch.lengths.shape[1],
            tokens=grown(usual, needed),
            targets=batch.targets.shape[1],
            row_length=multiple_of_8(int(self._lengths[members].max())),
            row_targets=batch.row_targets,
        )
        examples = [[self._examples[int(number)] for number in pack] for pack in packs]
        rows = self._layout.lay_out(examples, shape, filled)
        if not np.array_equal(rows.targets, batch.targets):
            raise _other_targets()
        return dataclasses.replace(batch, teacher=rows)


def _other_targets() -> UserError:
    return UserError(
        "objective.teacher: the target tokens of the teacher differ from the student's; use a "
        "teacher with the same template.target, verbalizer and tokenizer"
    )
