"""Examples as text that shows exactly what the model reads and which tokens carry loss."""

import itertools
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from softprompt.data.examples import Example
from softprompt.data.task import Task

LEGEND = "loss on ⟦…⟧; · is a space, ⏎ a line break, ⇥ a tab"
"""What the marks in `shown_example` mean."""

UNKNOWN = "?"
"""The text that `shown_example` shows for an unknown target."""

_MARKS = {" ": "·", "\n": "⏎\n", "\t": "⇥"}


def shown_example(task: Task, example: Example) -> str:
    """Return an example as the model reads it in training.

    The text is decoded from the tokens, with the virtual tokens and the special tokens in it.

    Args:
      task: the task that made the example.
      example: an example. Without an answer, its target is shown as `UNKNOWN`.
    """
    inputs = [*task.opening, *example.input]
    begin = len(task.opening)
    parts, end = [], 0
    for start, stop in example.earlier:
        parts.append(_text(task, inputs[end : begin + start]))
        parts.append(f"⟦{_text(task, inputs[begin + start : begin + stop])}⟧")
        end = begin + stop
    parts.append(_text(task, inputs[end:]))
    if task.base.backbone.separate_targets:
        parts.append("\ndecoder: ")
    unknown = example.answer is None
    parts.append(f"⟦{UNKNOWN if unknown else _text(task, _target(example))}⟧")
    return "".join(parts)


def counts_of(task: Task, example: Example) -> str:
    """Return the token counts of an example as text. An unknown target is not counted."""
    virtual = sum(token < 0 for token in (*task.opening, *example.input))
    targets = _target(example)
    total = len(task.opening) + len(example.input) + len(targets)
    parts = [f"{total} tokens"]
    if virtual:
        parts.append(f"{virtual} of them virtual")
    parts.append(f"{len(targets) + example.earlier_targets} with loss")
    if example.truncated:
        parts.append("truncated")
    return ", ".join(parts)


def _target(example: Example) -> Sequence[int]:
    return () if example.answer is None else example.candidates[example.answer]


def _text(task: Task, ids: Sequence[int]) -> str:
    """Return ids as text with visible spaces; runs of virtual tokens as one word."""
    return "".join(_runs(task.base.tokenizer, ids))


def _runs(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> Iterator[str]:
    for virtual, run in itertools.groupby(ids, lambda token: token < 0):
        tokens = list(run)
        if virtual:
            yield f"<{len(tokens)} virtual token{'s' if len(tokens) > 1 else ''}>"
        else:
            yield visible(_decoded(tokenizer, tokens))


def visible(text: str) -> str:
    """Return a text with marks for spaces, and with other characters that do not print escaped."""
    return "".join(_MARKS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Return ids as text. Many tokenizers leave out a space at the start, so a letter precedes."""

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    letter = tokenizer("a", add_special_tokens=False).input_ids
    start, text = decoded(letter), decoded([*letter, *ids])
    return text.removeprefix(start) if text.startswith(start) else decoded(ids)
