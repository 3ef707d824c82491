"""What a run has before its first step: base model, examples and method."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from softprompt.backbones.loading import Base, load_base
from softprompt.data.examples import Dataset
from softprompt.data.records import Record, read_records
from softprompt.data.task import Task, make_examples, make_task
from softprompt.data.template import draw_demonstrations
from softprompt.errors import UserError
from softprompt.experiment.schema import Experiment
from softprompt.inference.prompt import load_prompt
from softprompt.methods.making import make_method, virtual_tokens
from softprompt.methods.method import Method
from softprompt.methods.soft_prompt import SoftPrompt
from softprompt.runtime.progress import Progress, silent

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `Preparation` made of an experiment.

    Attributes:
      base: the base model.
      task: what turns records into examples.
      examples: by split, of all data that the experiment names.
      method: as it is before training.
      seconds: that it took.
    """

    base: Base
    task: Task
    examples: Mapping[str, Dataset]
    method: Method
    seconds: float


class Preparation:
    """Prepares experiments; what follows one another in several is read once.

    Of base models the last one is kept, and of data the last examples of each split.
    """

    def __init__(self, progress: Progress = silent) -> None:
        self._progress = progress
        self._bases: dict[str, Base] = {}
        self._records: dict[str, Sequence[Record]] = {}
        self._examples: dict[str, tuple[Any, Any, Dataset]] = {}

    def prepare(self, experiment: Experiment) -> Prepared:
        """Read an experiment's data, load its base model, and make its method.

        Raises:
          UserError: if the experiment, its data or its base model will not do.
        """
        began = time.monotonic()
        sources = experiment.data.model_dump(exclude_none=True)
        self._records = {
            source: self._records.get(source) or read_records(source) for source in sources.values()
        }
        records = {split: self._records[source] for split, source in sources.items()}
        base = self._base(experiment)
        texts = experiment.template, experiment.verbalizer
        shown = draw_demonstrations(*texts, records["train"], experiment.shots, experiment.seed)
        virtual, before = virtual_tokens(experiment)
        task = make_task(
            base,
            *texts,
            shown,
            virtual_tokens=virtual,
            prefix_length=before,
            tasks=experiment.prompt.tasks or () if virtual else (),
            task_field=experiment.prompt.task_field,
        )
        examples = {split: self._examples_of(task, part, split) for split, part in records.items()}
        if not task.labels and experiment.evaluation.samples:
            task.for_generation(experiment.generation.max_new_tokens, before + len(task.opening))
        method = make_method(experiment, base, task.opening, _initial_prompts(experiment, base))
        return Prepared(base, task, examples, method, time.monotonic() - began)

    def _base(self, experiment: Experiment) -> Base:
        wanted = experiment.model_dump_json(include={"base", "compute"})
        if wanted not in self._bases:
            self._bases.clear()  # before another takes its place in memory
            self._examples.clear()
            began = time.monotonic()
            base = load_base(experiment.base, **experiment.compute.model_dump())
            _log.info(
                f"base {base.name}: loaded in {time.monotonic() - began:.1f} s, "
                f"{base.compute.dtype}{', int8 matrices' if base.compute.int8 else ''}, "
                f"{base.compute.attention} attention"
            )
            self._bases[wanted] = base
        return self._bases[wanted]

    def _examples_of(self, task: Task, records: Sequence[Record], split: str) -> Dataset:
        """The examples, as they were made before if nothing that they depend on has changed.

        A longer opening leaves less room, which matters if there is not enough.
        """
        about = dataclasses.replace(task, opening=(), max_tokens=0, virtual_tokens=0)
        if split in self._examples and None not in task.pieces:
            before, source, examples = self._examples[split]
            longest = (examples.lengths.input + examples.lengths.longest).max()
            fit = not examples.truncated and longest <= task.max_tokens
            if before == about and source is records and fit:
                return examples
        examples = make_examples(task, records, split, self._progress)
        self._examples[split] = about, records, examples
        return examples


def _initial_prompts(experiment: Experiment, base: Base) -> list[jax.Array]:
    """The trained prompts that what is learned starts from."""
    settings = {
        "prompt": experiment.prompt,
        "dept": experiment.prompt,
        "prefix": experiment.prefix,
    }.get(experiment.method)
    vectors = []
    for path in settings.init_prompts or () if settings else ():
        trained = load_prompt(path, base).method
        if not isinstance(trained, SoftPrompt):
            raise UserError(f"init_prompts: {path} is no soft prompt")
        vectors.append(trained.vectors[...])
    return vectors
