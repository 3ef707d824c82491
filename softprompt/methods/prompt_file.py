"""The schema of `prompt.json`. The method checks the arrays: see `Method.saved_form`."""

from typing import Annotated, Self

import pydantic
from pydantic import Field

from softprompt.experiment.methods import require_method
from softprompt.experiment.schema import (
    ComputeSettings,
    GenerationSettings,
    ScoringSettings,
    TemplateSettings,
)
from softprompt.experiment.templates import template_fields

Size = Annotated[int, Field(ge=1, lt=2**31)]


class _Checked(pydantic.BaseModel):
    """Other keys are allowed: a method adds its own, and later versions may add more."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class BaseModelOfPrompt(_Checked):
    """The base model that a prompt was trained on.

    Attributes:
      name: the name it was loaded by.
      fingerprint: see `Base`.
      compute: how it was stored and run.
    """

    name: str = Field(min_length=1)
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    compute: ComputeSettings


class Versions(_Checked):
    """The versions of packages that wrote a prompt.

    Attributes:
      softprompt: the version of this package.
    """

    softprompt: str


class PromptFile(_Checked):
    """The content of `prompt.json` that all methods share.

    Attributes:
      method: the name of the method.
      virtual_tokens: number of virtual tokens in an input.
      arrays: the shapes of the learned arrays by name; empty if the base model determines them.
      base: the base model.
      template: the template of the experiment.
      verbalizer: label -> text; None for free text.
      demonstrations: input and target of the solved examples before every input.
      tasks: names of the tasks that have virtual tokens of their own.
      task_field: the field of a record that names its task.
      experiment: the name of the experiment.
      step: the number of training steps.
      validation: metrics on the validation data, by name.
      scoring: how the prompt labels inputs.
      generation: how the prompt generates text.
      versions: the versions of packages.
    """

    method: Annotated[str, pydantic.AfterValidator(require_method)]
    virtual_tokens: int = Field(ge=0, lt=2**31)
    arrays: dict[str, list[Size]] = {}
    base: BaseModelOfPrompt
    template: TemplateSettings
    verbalizer: dict[str, str] | None = Field(min_length=1)
    demonstrations: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    tasks: list[str]
    task_field: str
    experiment: str
    step: int = Field(ge=0, lt=2**63)
    validation: dict[str, float]
    scoring: ScoringSettings = ScoringSettings()
    generation: GenerationSettings = GenerationSettings()
    versions: Versions

    @pydantic.model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.verbalizer and len(template_fields(self.template.target)) != 1:
            raise ValueError("template.target: with a verbalizer it must have one {field}")
        return self
