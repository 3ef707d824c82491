"""Many prompts on one base model: every row of a batch names its own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class Generator:
    """Writes on from inputs with the prompts of a bank, or with none.

    Rows whose prompts are prefixes (soft prompts and prefix tuning) share batches on the one
    frozen model; up to rounding the results are those of each row alone. Rows of methods that
    change the model (LoRA, DePT, full fine-tuning), or whose virtual tokens stand in the text,
    are run in batches of their own. Programs are compiled by the shapes of batches, whatever is
    in the bank: to add or remove a prompt compiles nothing.

    Args:
      base: the base model, or its name.
      prompts: trained prompts, or folders of runs, by the names to call them by.

    Raises:
      UserError: see `add`.
    """

    def __init__(
        self, base: Base | str, prompts: Mapping[str, TrainedPrompt | str | Path] | None = None
    ):
        self.base = base if isinstance(base, Base) else load_base(base)
        self._bank: dict[str, TrainedPrompt] = {}
        task = make_task(self.base, TemplateSettings(input="{text}"), None)
        self._alone = TrainedPrompt(self.base, Method(), self.base.backbone, None, task, {})
        for name, prompt in (prompts or {}).items():
            self.add(name, prompt)

    @property
    def prompts(self) -> list[str]:
        """The names in the bank."""
        return list(self._bank)

    def add(self, name: str, prompt: TrainedPrompt | str | Path) -> None:
        """Put a prompt into the bank.

        Raises:
          UserError: if there is one of this name, or it was trained on another base model.
        """
        if name in self._bank:
            raise UserError(f"there is a prompt {name!r} already; remove it first")
        if not isinstance(prompt, TrainedPrompt):
            prompt = load_prompt(prompt, self.base)
        if prompt.base.fingerprint != self.base.fingerprint:
            raise UserError(
                f"prompt {name!r}: for the base model {prompt.base.name!r}, not {self.base.name!r}"
            )
        if prompt.base.compute != self.base.compute:
            raise UserError(f"prompt {name!r}: its base model is held in another way (`compute`)")
        self._bank[name] = prompt

    def remove(self, name: str) -> None:
        """Take a prompt out of the bank; `UserError` if it is not there."""
        self._prompt(name)
        del self._bank[name]

    def generate(
        self,
        inputs: Sequence[Input],
        prompts: str | Sequence[str | None] | None,
        batch_size: int = 32,
        **settings: Any,
    ) -> list[Generated]:
        """What the model writes behind each input.

        Args:
          inputs: texts, or fields by name where a prompt's template has more than one.
          prompts: the name of each input's prompt, or None for the base model alone, which
            reads the text as it is; or one for all of them.
          batch_size: texts at a time; fewer if the device has no memory for as many.
          settings: see `GenerationSettings`; the same for all rows.

        Raises:
          UserError: if there is no such prompt, an input is empty or lacks a field, or the
            model has no room.
        """
        if isinstance(inputs, str | Mapping | Record):
            raise UserError("give a list of inputs, not one")
        names = [prompts] * len(inputs) if prompts is None or isinstance(prompts, str) else prompts
        if len(names) != len(inputs):
            raise UserError(f"{len(inputs)} inputs and {len(names)} names of prompts")
        how = changed(GenerationSettings(), settings)
        bank = [self._prompt(name) for name in names]
        requests: dict[int, Request] = {}
        for numbers in _grouped(map(id, bank)):
            prompt = bank[numbers[0]]
            records = [prompt.record(inputs[i], f"input {i + 1}") for i in numbers]
            requests.update(zip(numbers, prompt.requests(records, how), strict=True))
        backbones = [self.base.backbone if p.is_prefix else p.backbone for p in bank]
        results: dict[int, Generated] = {}
        for numbers in _grouped(map(id, backbones)):
            engine = Engine(backbones[numbers[0]], self.base.tokenizer, how)
            written = engine.generate([requests[i] for i in numbers], batch_size)
            results.update(zip(numbers, written, strict=True))
        return [results[i] for i in range(len(inputs))]

    def stream(self, text: Input, prompt: str | None, **settings: Any) -> Iterator[str]:
        """Pieces of what the model writes behind an input, as they are written."""
        return self._prompt(prompt).stream(
            text, **changed(GenerationSettings(), settings).model_dump()
        )

    def _prompt(self, name: str | None) -> TrainedPrompt:
        if name is None:
            return self._alone
        if name not in self._bank:
            known = ", ".join(map(repr, self._bank)) or "none"
            raise UserError(f"there is no prompt {name!r} in the bank; it has {known}")
        return self._bank[name]


def _grouped(keys: Iterable[int]) -> list[list[int]]:
    """Numbers of the keys that are equal, group by group."""
    groups: dict[int, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())
