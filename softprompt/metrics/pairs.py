"""The predictions and references that all metrics of free text go through, one by one."""

from collections.abc import Iterator, Sequence

from softprompt.errors import UserError
from softprompt.runtime.progress import Progress

References = Sequence[str | Sequence[str]]
"""For each prediction a text, or a list of texts that are all correct."""

MOST_CHARACTERS = 500_000


def pairs(
    name: str,
    predictions: Sequence[str],
    references: References,
    progress: Progress,
    most_words: int | None = None,
) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the number of each prediction, from 1, the prediction, and its references.

    Args:
      name: the metric, for messages.
      predictions, references: N each.
      progress: shows how many predictions are done.
      most_words: the largest number of words of a text, if the metric has one.

    Raises:
      UserError: if a text is too long.
    """
    with progress(name, len(predictions), "texts") as bar:
        for number, (prediction, reference) in enumerate(
            zip(predictions, references, strict=True), 1
        ):
            texts = [reference] if isinstance(reference, str) else list(reference)
            where = f"metric {name}: prediction {number} or its reference"
            for text in (prediction, *texts):
                if len(text) > MOST_CHARACTERS:
                    raise UserError(
                        f"{where} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are "
                        "supported"
                    )
                if most_words is not None and (words := len(text.split())) > most_words:
                    raise UserError(
                        f"{where} has {words:,} words; at most {most_words:,} are supported"
                    )
            yield number, prediction, texts
            bar.advance()
