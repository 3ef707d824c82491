"""Likely mistakes in a template, its verbalizer or the training data, which are worth a warning."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from softprompt.data.examples import Dataset, Example
from softprompt.data.task import Task
from softprompt.data.template import fill, label_texts

_LOOKED_AT = 100  # examples whose texts are compared


def template_mistakes(task: Task, examples: Sequence[Example]) -> Iterator[str]:
    """Yield likely mistakes in the text of examples, one line each.

    Args:
      task: the task that made the examples.
      examples: at least one. The first hundred are compared.
    """
    examples = examples[:_LOOKED_AT]
    if not task.template.messages and not task.template.text:
        yield from _spaces(task, examples)
    if task.labels:
        yield from _beginnings(task, examples[0].candidates)
    begin = task.base.tokenizer.bos_token_id
    ids = [token for token in (*task.opening, *examples[0].input) if token >= 0]
    if begin is not None and ids[:2] == [begin, begin]:
        yield (
            f"a row begins with two beginning-of-text tokens ({task.base.tokenizer.bos_token}); "
            "the tokenizer adds one, so remove the other from the template"
        )


def data_mistakes(task: Task, training: Dataset) -> Iterator[str]:
    """Yield likely mistakes in the training data as a whole, one line each."""
    if training.truncated > len(training) / 2:
        yield (
            f"{training.truncated} of {len(training)} training examples are truncated; raise "
            "template.max_tokens or shorten the template"
        )
    missing = set(range(len(task.labels))) - set(np.unique(training.answers).tolist())
    for number in sorted(missing):
        yield (
            f"label {task.labels[number]!r} of the verbalizer never occurs in the training data; "
            "remove it or check the data"
        )


def _spaces(task: Task, examples: Sequence[Example]) -> Iterator[str]:
    """Yield at most one line about the space between an input and its target."""
    last = task.pieces[-1]
    if not isinstance(last, str):  # special tokens or virtual tokens come before the target
        return
    for example in examples:
        before = fill(last, example.record)[0]
        for name, text in _target_texts(task, example).items():
            if before.endswith(" ") and text.startswith(" "):
                yield (
                    f"{example.record.where}: the input ends with a space and {name} begins with "
                    "one, so the model reads two; remove one of them"
                )
                return
            if text.startswith("  "):
                yield f"{example.record.where}: {name} begins with two spaces; remove one of them"
                return
    if last.endswith(" ") and not task.template.chat:
        target = "the texts of the verbalizer" if task.labels else "template.target"
        yield (
            "template.input ends with a space, but most tokenizers join a space with the word "
            f"after it; move it to the beginning of {target}"
        )


def _target_texts(task: Task, example: Example) -> Mapping[str, str]:
    """Return the texts that may follow an input, each with a name for messages."""
    target = task.template.target
    if not task.verbalizer:
        return {"the target": fill(target, example.record)[0]}
    texts = label_texts(task.template, task.verbalizer)
    return {f"the text of label {label!r}": text for label, text in texts.items()}


def _beginnings(task: Task, candidates: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield a line for each label whose tokens another label's begin with."""
    for i, short in enumerate(candidates):
        for j, long in enumerate(candidates):
            if i != j and list(long[: len(short)]) == list(short):
                yield (
                    f"the text of label {task.labels[j]!r} begins with the text of label "
                    f"{task.labels[i]!r}, so it is never more probable; use other texts"
                )
