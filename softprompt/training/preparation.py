"""What a run has before its first step: base model, examples and method."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax

from softprompt.backbones.loading import Base, load_base
from softprompt.config import Experiment
from softprompt.console import say
from softprompt.data.examples import Example, make_examples
from softprompt.data.records import read_records
from softprompt.data.task import Task, draw_demonstrations, make_task
from softprompt.errors import UserError
from softprompt.inference.prompt import load_prompt
from softprompt.methods.making import make_method, virtual_tokens
from softprompt.methods.method import Method
from softprompt.methods.soft_prompt import SoftPrompt


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` made of an experiment.

    Attributes:
      base: the base model.
      task: what turns records into examples.
      examples: by split, of all data that the experiment names.
      method: as it is before training.
    """

    base: Base
    task: Task
    examples: Mapping[str, Sequence[Example]]
    method: Method


def prepare(experiment: Experiment) -> Prepared:
    """Read an experiment's data, load its base model, and make its method.

    Raises:
      UserError: if the experiment, its data or its base model will not do.
    """
    began = time.monotonic()
    sources = experiment.data.model_dump(exclude_none=True)
    records = {split: read_records(source) for split, source in sources.items()}
    base = load_base(experiment.base, **experiment.compute.model_dump())
    compute = base.compute
    say(
        f"base {base.name}: loaded in {time.monotonic() - began:.1f} s, {compute.dtype}"
        f"{', int8 matrices' if compute.int8 else ''}, {compute.attention} attention"
    )
    texts = experiment.template, experiment.verbalizer
    shown = draw_demonstrations(*texts, records["train"], experiment.shots, experiment.seed)
    virtual, before = virtual_tokens(experiment)
    task = make_task(
        base,
        *texts,
        shown,
        virtual_tokens=virtual,
        before=before,
        tasks=experiment.prompt.tasks or () if virtual else (),
        task_field=experiment.prompt.task_field,
    )
    examples = {split: make_examples(task, part, split) for split, part in records.items()}
    if not task.labels and experiment.evaluation.samples:
        task.with_room(experiment.generation.max_new_tokens, before + len(task.opening))
    method = make_method(experiment, base, task.opening, _initial_prompts(experiment, base))
    return Prepared(base, task, examples, method)


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
