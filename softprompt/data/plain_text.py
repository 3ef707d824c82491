"""Plain text: documents as rows of a limited length, in which every token is a target."""

from collections.abc import Callable, Iterator, Sequence

from softprompt.backbones.formats.tokenizer import encode_ids
from softprompt.backbones.loading import Base
from softprompt.data.examples import Example
from softprompt.data.records import Record
from softprompt.data.template import end_of_text, special_tokens
from softprompt.errors import UserError


def document_rows(
    base: Base,
    records: Sequence[Record],
    texts: Sequence[str],
    before: Callable[[Record], list[int]],
    max_tokens: int,
) -> Iterator[Example]:
    """Encode documents with the model's start and end tokens, and divide them into rows.

    A row begins with the last token of the row before it, so that every token is predicted once.
    Only the start tokens, or without them the first token of a document, are not predicted.

    Args:
      base: the base model.
      records: N records.
      texts: the document of each record.
      before: the ids that the rows of a record begin with, such as virtual tokens.
      max_tokens: the most ids of a row.

    Raises:
      UserError: if the tokenizer cannot encode a document, or `max_tokens` is too small.
    """
    start, end = special_tokens(base.tokenizer)[0], end_of_text(base.tokenizer)
    encoded = encode_ids(base.tokenizer, texts)
    for record, ids in zip(records, encoded, strict=True):
        tokens, opening = [*start, *ids, end], before(record)
        base.require_embeddings(tokens, record.where)
        size = max_tokens - len(opening)
        given = max(len(start), 1)  # tokens of the first row that are not predicted
        if size <= given:
            raise UserError(
                f"{record.where}: a row of {max_tokens} tokens has no space for text after "
                f"{len(opening) + given} others; raise template.max_tokens"
            )
        for begin in range(0, len(tokens) - 1, size - 1):
            row = tokens[begin : begin + size]
            yield Example([*opening, *row[:given]], [row[given:]], 0, record, truncated=False)
            given = 1
