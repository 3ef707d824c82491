"""Experiments: the schema. `experiment_file.py` reads it from YAML."""

from string import Formatter
from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )


class Data(Section):
    """Where the records are: `.jsonl` or `.csv` files, or `hub:NAME#SPLIT`."""

    train: str
    validation: str
    test: str | None = None


class Template(Section):
    """How a record becomes text; `{field}` stands for a field of the record.

    Attributes:
      input: what the model reads.
      target: what it shall write behind it.
      max_tokens: longest input plus target; the longest field of a longer one is cut at
        its end. By default what the model's context leaves beside the prompt.
    """

    input: str
    target: str = "{label}"
    max_tokens: Annotated[int, Field(ge=2)] | None = None

    @pydantic.field_validator("input", "target")
    @classmethod
    def _has_fields(cls, template: str) -> str:
        if not template_fields(template):
            raise ValueError("has no {field} to fill in")
        return template


class Compute(Section):
    """How the frozen base model is held and run.

    Attributes:
      dtype: of parameters and activations (norms, softmax and loss are float32).
      int8: hold the weight matrices as int8, with a scale for each output channel.
      attention: `auto` takes `cudnn` where it can be had and `xla` elsewhere.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    int8: bool = False
    attention: Literal["auto", "xla", "cudnn"] = "auto"


class Prompt(Section):
    """The soft prompt.

    Attributes:
      length: number of virtual tokens, k.
      init: where the initial vectors come from: `vocabulary` (embeddings of tokens drawn
        from the 5,000 of lowest id), `random` (normal, with the embedding table's mean
        and spread), `text` (embeddings of `init_text`, repeated or cut), or `labels`
        (one vector for each verbalizer, then as `vocabulary`).
      init_text: for `init: text`.
    """

    length: Annotated[int, Field(ge=1)] = 20
    init: Literal["vocabulary", "random", "text", "labels"] = "vocabulary"
    init_text: str | None = None

    @pydantic.model_validator(mode="after")
    def _init_text_fits(self) -> Self:
        if (self.init == "text") != bool(self.init_text):
            raise ValueError("init: text and init_text need each other")
        return self


class Optimizer(Section):
    """The update rule; `learning_rate` is the peak, reached after `warmup_steps`.

    sgd has a momentum of 0.9. `clip_norm` bounds the norm of the whole gradient.
    """

    name: Literal["adamw", "adafactor", "sgd", "lion"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0


class Training(Section):
    """`batch_size` examples a pass, `accumulate` passes an update, `steps` updates."""

    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 16
    accumulate: Annotated[int, Field(ge=1)] = 1
    log_every: Annotated[int, Field(ge=1)] = 10


class Evaluation(Section):
    """When to look at the validation data, and what decides which prompt is the best.

    Attributes:
      every: steps between evaluations; one more follows the last step.
      examples: how many validation examples to use, from the first on; all by default.
      metric: `accuracy` (higher is better) or `loss` (lower is better).
      patience: stop after so many evaluations without a better one.
      batch_size: examples a pass.
    """

    every: Annotated[int, Field(ge=1)] = 100
    examples: Annotated[int, Field(ge=1)] | None = None
    metric: Literal["accuracy", "loss"] = "loss"
    patience: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32


class Checkpoints(Section):
    """Full states are saved at every evaluation, and every `every` steps if set."""

    every: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[int, Field(ge=1)] = 2


class Experiment(Section):
    """One experiment file, resolved: all that a run depends on."""

    name: str
    base: str
    compute: Compute = Compute()
    method: Literal["prompt"] = "prompt"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: Data
    template: Template
    verbalizer: Annotated[dict[str, str], Field(min_length=2)] | None = None
    prompt: Prompt = Prompt()
    optimizer: Optimizer = Optimizer()
    training: Training
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.verbalizer is None:
            if self.evaluation.metric == "accuracy":
                raise ValueError("evaluation.metric: accuracy needs a verbalizer")
            if self.prompt.init == "labels":
                raise ValueError("prompt.init: labels needs a verbalizer")
        elif len(template_fields(self.template.target)) != 1:
            raise ValueError("template.target: with a verbalizer it must have one {field}")
        elif len(set(self.verbalizer.values())) < len(self.verbalizer):
            raise ValueError("verbalizer: two labels have the same text")
        return self


def template_fields(template: str) -> list[str]:
    """The fields of a template, in order; `ValueError` if it is malformed."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"not a valid template ({error}); write {{{{ for a brace") from error
    fields = []
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if not field.isidentifier() or spec or conversion:
            raise ValueError(f"{{{field}}} is not a field name; write {{{{ for a brace")
        if field not in fields:
            fields.append(field)
    return fields
