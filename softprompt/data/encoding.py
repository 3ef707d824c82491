"""Encoding of many records: batches for the tokenizer, and inputs that are too long."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Encoding

from softprompt.data.records import Record
from softprompt.data.template import Spans
from softprompt.errors import UserError

_BATCH_RECORDS = 2048  # with fewer, the tokenizer's threads wait for each other
_BATCH_CHARACTERS = 2**20  # a token of an encoded text takes some hundred bytes


def record_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Divide records into batches that keep the threads of a tokenizer busy."""
    batch: list[Record] = []
    characters = 0
    try:
        for record in records:
            batch.append(record)
            characters += sum(len(v) for v in record.fields.values() if isinstance(v, str))
            if len(batch) == _BATCH_RECORDS or characters > _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except UserError:  # the next record cannot be read
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def truncated_input(
    parts: Sequence[list[int] | tuple[Encoding, Spans]], max_tokens: int, where: str
) -> list[int]:
    """Return the ids of an input, truncated at the end of its longest field.

    Args:
      parts: ids, or an encoded text with the characters of its fields. They have more than
        `max_tokens` tokens.
      max_tokens: the number of tokens to return.
      where: names the record in error messages.
    """
    tokens: list[int] = []
    for part in parts:
        tokens += part if isinstance(part, list) else part[0].ids
    excess = len(tokens) - max_tokens
    start = 0
    longest, removable = -1, np.array([], int)  # characters and token indices of a field
    for part in parts:
        if isinstance(part, list):
            start += len(part)
            continue
        encoding, spans = part
        starts, ends = np.array(encoding.offsets or [(0, 0)]).T
        for begin, end in spans:
            if end - begin > longest:
                (inside,) = np.nonzero((starts >= begin) & (ends <= end) & (ends > starts))
                longest, removable = end - begin, start + inside
        start += len(encoding.ids)
    if len(removable) <= excess:
        raise UserError(
            f"{where}: {len(tokens)} tokens, {excess} too many, and its longest field "
            f"has only {len(removable)}; shorten the template or raise template.max_tokens"
        )
    return np.delete(tokens, removable[-excess:]).tolist()
