"""The section `objective` of an experiment: what training minimizes.

The descriptions are also the configuration reference of the documentation.
"""

from typing import Any, Literal, Self

import pydantic
from pydantic import Field

from softprompt.experiment.sections import PathText, Section
from softprompt.experiment.templates import template_fields

PreferenceLoss = Literal["dpo", "ipo", "normalized"]

_SETTINGS = {  # of each objective
    "cross_entropy": {"label_smoothing", "weights"},
    "preference": {"loss", "beta"},
    "distill": {"temperature", "teacher"},
}
_BETA = {"dpo": 0.1, "ipo": 0.1, "normalized": 5.0}


class TeacherSettings(Section):
    """The teacher of `objective: distill`: a better model than the student, or one that reads more.

    Without `run` and `base`, it is the base model of the student. `context`, `shots`, `input` and
    `base` can be combined.
    """

    context: PathText | None = Field(
        default=None,
        description="Text file that the teacher reads in the place of the virtual tokens.",
    )
    shots: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Number of solved training examples, drawn by the seed, that the teacher "
        "reads.",
    )
    input: str | None = Field(
        default=None,
        description="Template of the input that the teacher reads instead of `template.input`. The "
        "targets are the same.",
    )
    run: PathText | None = Field(
        default=None,
        description="Run folder of a trained teacher with the same base model. It reads each "
        "record with its own template and prompt.",
    )
    base: PathText | None = Field(
        default=None,
        description="Base model of the teacher, with the same vocabulary as the student's.",
    )
    writes_targets: bool = Field(
        default=False,
        description="Whether the teacher writes the targets of the training and validation data "
        "before training. It decodes greedily, with the other settings of the section "
        "`generation`. The run folder keeps the targets.",
    )
    top_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Number of the teacher's most likely tokens that the run folder stores for "
        "each target before training. The loss then treats all other tokens as one, and training "
        "steps do not run the teacher. `null`: the teacher reads each batch.",
    )

    @pydantic.field_validator("input")
    @classmethod
    def _check_fields(cls, template: str | None) -> str | None:
        if template is not None and not template_fields(template):
            raise ValueError("has no {field} to fill in")
        return template

    @pydantic.model_validator(mode="after")
    def _require_more(self) -> Self:
        """Require something that makes the teacher differ from the student."""
        names = ("context", "shots", "input", "base")
        given = [name for name in names if getattr(self, name)]
        if self.run is not None and given:
            raise ValueError(f"a run uses its own template and prompt; remove {given[0]} or run")
        if self.run is None and not given:
            raise ValueError(
                "set context, shots, input, run or base, so that the teacher differs from the "
                "student"
            )
        return self


class ObjectiveSettings(Section):
    """What training minimizes. `objective: preference` stands for `objective: {name: preference}`.

    `cross_entropy` reads `label_smoothing` and `weights`, `preference` reads `loss` and `beta`, and
    `distill` reads `temperature` and `teacher`.
    """

    name: Literal["cross_entropy", "preference", "distill"] = Field(
        default="cross_entropy",
        description="`cross_entropy` learns the targets. `preference` learns to prefer the field "
        "`chosen` of a record to its field `rejected`, given its field `prompt`. `distill` learns "
        "the distributions of a teacher at the targets.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the target probability that is divided over the whole vocabulary.",
    )
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="Field of a training record with its weight, a number of at least 0. A record "
        "of weight 2 counts as two records. `null`: all records count as one.",
    )
    loss: PreferenceLoss = Field(
        default="dpo",
        description="`dpo`, `ipo`, or `normalized`: DPO with log-probabilities per token.",
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="How closely the model stays to the base model. The default is 0.1 for `dpo` "
        "and `ipo` and 5 for `normalized`.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=1_000_000,
        description="The logits of teacher and student are divided by it.",
    )
    teacher: TeacherSettings | None = None
    custom: bool = Field(
        default=False,
        description="Whether Python code passed the loss to `train`. The rest of the section then "
        "only decides what the loss receives: weights, pairs of answers, or a teacher.",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_values(cls, values: Any) -> Any:
        """Read the name alone, and fill in the default of `beta`."""
        values = {"name": values} if isinstance(values, str) else values
        if not isinstance(values, dict) or values.get("name") != "preference":
            return values
        beta = _BETA.get(str(values.get("loss", "dpo")))
        return values | {"beta": beta} if values.get("beta") is None else values

    @pydantic.model_validator(mode="after")
    def _check_names(self) -> Self:
        """Reject settings of other objectives."""
        for owner, names in _SETTINGS.items():
            for name in sorted(names):
                value = getattr(self, name)
                if owner != self.name and value != type(self).model_fields[name].default:
                    raise ValueError(f"{name} belongs to {owner}, not to {self.name}")
        if self.name == "distill" and self.teacher is None:
            raise ValueError("distill needs a teacher, such as teacher: {context: manual.txt}")
        return self
