"""The text of generated tokens, and where it ends."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast


class AnswerText:
    """Turns the ids of an answer into its text, which ends before the first stop text.

    Args:
      tokenizer: the base model's.
      stop: stop texts. They are not part of the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop

    def text(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Return the text of ids, and whether an end-of-text token or a stop text ended it."""
        ended = bool(ids) and ids[-1] == self._tokenizer.eos_token_id
        text = str(self._tokenizer.decode(ids[:-1] if ended else ids))
        places = [(text.find(stop), len(stop)) for stop in self._stop]
        complete = [(place + size, place) for place, size in places if place >= 0]
        return (text[: min(complete)[1]], True) if complete else (text, ended)

    def needed(self, ids: Sequence[int], new: int) -> int:
        """Return how many of the last `new` ids belong to an answer that has ended."""
        before = len(ids) - new
        ends = (count for count in range(1, new) if self.text(ids[: before + count])[1])
        return next(ends, new)

    def final(self, text: str) -> str:
        """Return the part of an unfinished text that later tokens cannot change."""
        return text[: len(text) - self._uncertain(text)]

    def _uncertain(self, text: str) -> int:
        """Return the number of characters at the end that may still change."""
        known = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the end may be a part of a character
        longest = 0
        for stop in self._stop:
            for length in range(1, min(len(stop), len(known)) + 1):
                if known.endswith(stop[:length]):
                    longest = max(longest, length)
        return len(text) - len(known) + longest
