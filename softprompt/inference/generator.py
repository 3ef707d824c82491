"""A bank of prompts on one base model, in which every input of a batch names its own prompt."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt.backbones.loading import Base, load_base
from softprompt.data.records import Record
from softprompt.data.task import make_task
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings, TemplateSettings
from softprompt.generation.engine import Engine, Generated, Request
from softprompt.inference.prompt import Input, TrainedPrompt, changed, load_prompt
from softprompt.methods.method import Method
from softprompt.methods.zero_shot import ZeroShot
from softprompt.runtime.bars import bars_in_notebooks
from softprompt.runtime.progress import Progress

Prompt = TrainedPrompt | Method | str | Path  # whatever can be added to the bank


class Generator:
    """Generates text with the prompts of a bank, or with the base model alone.

    Inputs whose prompts are pure prefixes (soft prompts and prefix tuning) share batches on the
    frozen base model. Up to rounding, each gets the text that it gets alone. Methods that change
    the model (LoRA, DePT, full fine-tuning) and templates with virtual tokens inside the text
    run in batches of their own.

    Prefixes stay on the device between calls. Programs are compiled per shape of a batch, and
    no shape depends on the bank: adding or removing a prompt compiles nothing.

    Args:
      base: the base model, or its name.
      prompts: the bank: name -> a trained prompt, a run's folder, or a method such as a
        `SoftPrompt`.

    Raises:
      UserError: see `add`.

    Examples:
      >>> generator = Generator("smollm2-135m-instruct", {"summarize": "runs/summarize"})
      >>> generator
      Generator('smollm2-135m-instruct', prompts=['summarize'])
      >>> texts = ["A tool that shows the manual of a command.", "The capital of France is"]
      >>> results = generator.generate(texts, ["summarize", None], max_new_tokens=24)
      >>> summary = results[0].text
    """

    def __init__(self, base: Base | str, prompts: Mapping[str, Prompt] | None = None):
        self.base = base if isinstance(base, Base) else load_base(base)
        self._bank: dict[str, TrainedPrompt] = {}
        task = make_task(self.base, TemplateSettings(input="{text}"), None)
        self._no_prompt = TrainedPrompt.from_method(ZeroShot(), self.base, task)
        for name, prompt in (prompts or {}).items():
            self.add(name, prompt)

    def __repr__(self) -> str:
        return f"Generator({self.base.name!r}, prompts={self.prompts})"

    @property
    def prompts(self) -> list[str]:
        """The names of the prompts in the bank."""
        return list(self._bank)

    def add(self, name: str, prompt: Prompt) -> None:
        """Add a prompt to the bank.

        Args:
          name: the name by which inputs choose it.
          prompt: a trained prompt, a run's folder, or a method, which reads the input `{text}`.

        Raises:
          UserError: if the name is taken, or the prompt was trained on another base model.
        """
        if name in self._bank:
            raise UserError(f"a prompt named {name!r} already exists; remove it first")
        trained = self._trained(prompt)
        if trained.base.fingerprint != self.base.fingerprint:
            raise UserError(
                f"prompt {name!r}: it was trained on the base model {trained.base.name!r}, "
                f"which is not {self.base.name!r}"
            )
        if trained.base.compute != self.base.compute:
            raise UserError(
                f"prompt {name!r}: its base model was loaded with other `compute` settings"
            )
        self._bank[name] = trained

    def _trained(self, prompt: Prompt) -> TrainedPrompt:
        if isinstance(prompt, TrainedPrompt):
            return prompt
        if isinstance(prompt, Method):
            return TrainedPrompt.from_method(prompt, self.base)
        return load_prompt(prompt, self.base)

    def remove(self, name: str) -> None:
        """Remove a prompt from the bank; raises `UserError` if it is not there."""
        self._prompt(name)
        del self._bank[name]

    def generate(
        self,
        inputs: Sequence[Input],
        prompts: str | Sequence[str | None] | None,
        batch_size: int = 32,
        *,
        progress: Progress = bars_in_notebooks,
        **settings: Any,
    ) -> list[Generated]:
        """Generate text for each input.

        Args:
          inputs: texts, or mappings of field names to texts where a template has several
            fields.
          prompts: for each input the name of its prompt, or None for the base model alone,
            which reads the text as it is; or one name (or None) for all inputs.
          batch_size: the maximum number of inputs in a batch; reduced if the device runs out
            of memory.
          progress: shows how many inputs are done.
          settings: fields of `GenerationSettings`, the same for all inputs.

        Returns:
          The results, in the order of the inputs.

        Raises:
          UserError: if a prompt is not in the bank, an input is empty or lacks a field, or the
            context window is too short.
        """
        if isinstance(inputs, str | Mapping | Record):
            raise UserError("give a list of inputs, not one")
        names = [prompts] * len(inputs) if prompts is None or isinstance(prompts, str) else prompts
        if len(names) != len(inputs):
            raise UserError(f"{len(inputs)} inputs but {len(names)} prompt names; give one each")
        generation = changed(GenerationSettings(), settings)
        chosen = [self._prompt(name) for name in names]
        requests: dict[int, Request] = {}
        for indices in _grouped(map(id, chosen)):
            prompt = chosen[indices[0]]
            records = [prompt.record(inputs[i], f"input {i + 1}") for i in indices]
            requests.update(zip(indices, prompt.requests(records, generation), strict=True))
        backbones = [self.base.backbone if p.is_prefix else p.backbone for p in chosen]
        distinct = {id(prompt): prompt for prompt in chosen}
        stopping = {key: p.stopping(generation) for key, p in distinct.items()}
        settings_of = [stopping[id(prompt)] for prompt in chosen]
        keys = zip(map(id, backbones), (tuple(each.stop) for each in settings_of), strict=True)
        results: dict[int, Generated] = {}
        for indices in _grouped(keys):
            first = indices[0]
            engine = Engine(backbones[first], self.base.tokenizer, settings_of[first])
            generated = engine.generate(
                [requests[i] for i in indices], batch_size, progress=progress
            )
            results.update(zip(indices, generated, strict=True))
        return [results[i] for i in range(len(inputs))]

    def stream(self, text: Input, prompt: str | None, **settings: Any) -> Iterator[str]:
        """Generate text for one input and yield pieces of it as soon as they are final.

        Args:
          text: the input, as for `generate`.
          prompt: the name of its prompt, or None for the base model alone.
          settings: fields of `GenerationSettings`.
        """
        return self._prompt(prompt).stream(
            text, **changed(GenerationSettings(), settings).model_dump()
        )

    def _prompt(self, name: str | None) -> TrainedPrompt:
        if name is None:
            return self._no_prompt
        if name not in self._bank:
            known = ", ".join(map(repr, self._bank)) or "none"
            raise UserError(f"there is no prompt {name!r} in the bank; it has {known}")
        return self._bank[name]


def _grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """The indices of equal keys, group by group."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())
