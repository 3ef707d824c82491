"""The chunks of a document that the questions of a study are about."""

from collections.abc import Sequence

CHUNK_TOKENS = 384  # maximum, approximately


def chunks_of(document: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Divide a document into chunks that end where a paragraph, a line or a sentence ends.

    Args:
      document: the text.
      offsets: begin and end of each token of the document, in characters.

    Returns:
      Begin and end of each chunk, in characters.
    """
    count = -(-len(offsets) // CHUNK_TOKENS)
    chunks, begin, first = [], 0, 0
    for left in range(count, 0, -1):
        end = len(document)
        if left > 1:  # divide the tokens that are left evenly among the chunks that are left
            most = first + (len(offsets) - first) // left
            end = _last_break(document, begin, offsets[most][0])
        chunks.append((begin, end))
        begin = end
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > begin), len(offsets))
    return [(begin, end) for begin, end in chunks if document[begin:end].strip()]


def _last_break(text: str, begin: int, end: int) -> int:
    """Return where the last paragraph, line, sentence or word in the second half of a part ends."""
    for mark in ("\n\n", "\n", ". ", " "):
        found = text.rfind(mark, begin + (end - begin) // 2, end)
        if found >= 0:
            return found + len(mark)
    return end
