"""A base model that has read a text and writes after it."""

import dataclasses
from collections.abc import Sequence

from softprompt.backbones.loading import Base, Prefix
from softprompt.data.records import Record
from softprompt.data.task import Task, make_task
from softprompt.data.teacher import opening_with
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings, TemplateSettings
from softprompt.generation.engine import Engine, Request
from softprompt.objectives.teacher import read


@dataclasses.dataclass(frozen=True)
class Reading:
    """A base model that has read a text.

    Attributes:
      text: the text.
      task: its opening contains the text.
      prefix: the keys and values of the opening.
    """

    text: str
    task: Task
    prefix: Prefix

    @classmethod
    def of(cls, base: Base, template: TemplateSettings, text: str) -> "Reading":
        """Return a base model that has read a text instead of the virtual tokens of a template."""
        ids = base.tokenizer(text, add_special_tokens=False).input_ids
        marked = make_task(base, template, None, virtual_tokens=1)
        opening = opening_with(ids, marked)
        task = dataclasses.replace(marked, opening=opening)
        return cls(text, task, read(base.backbone, opening))

    def generate(
        self,
        questions: Sequence[str],
        settings: GenerationSettings,
        batch_size: int,
        *,
        begins: Sequence[str] = (),
        seeds: Sequence[int | None] = (),
    ) -> list[tuple[str, bool]]:
        """Return the text that the model writes after each question, and whether the text ended.

        Args:
          questions: questions for the model.
          settings: the settings of the generation.
          batch_size: maximum number of questions in a batch.
          begins: the beginning of each text, which is not part of the result; empty for none.
          seeds: the seed of each text; empty to use the seed of the settings.
        """
        base, task = self.task.base, self.task
        settings = task.stopping(settings, trained=False)
        task = task.for_generation(settings.max_new_tokens, self.prefix.length)
        records = [Record({"question": text}, "question") for text in questions]
        examples = list(task.examples(records, with_answer=False))
        if any(example.truncated for example in examples):
            if task.max_tokens == task.template.max_tokens:
                raise UserError(
                    f"template.max_tokens {task.max_tokens}: too few for a question; raise it"
                )
            raise UserError(f"base {base.name!r}: its context window is too short for a question")
        begun = [
            [*example.input, *base.tokenizer(begin, add_special_tokens=False).input_ids]
            for example, begin in zip(examples, begins or [""] * len(examples), strict=True)
        ]
        requests = [
            Request(tokens, self.prefix, task.opening, seed)
            for tokens, seed in zip(begun, seeds or [None] * len(begun), strict=True)
        ]
        results = Engine(base.backbone, base.tokenizer, settings).generate(requests, batch_size)
        return [(result.text, result.ended[0]) for result in results]
