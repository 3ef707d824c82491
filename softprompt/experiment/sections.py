"""Sections of an experiment that all methods share: their keys, defaults and limits.

The descriptions are also the configuration reference of the documentation.
"""

from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from softprompt.errors import shortened
from softprompt.experiment.metric_names import MODEL_METRICS, OBJECTIVE_METRICS, metric_values
from softprompt.experiment.templates import (
    PROMPT_FIELD,
    template_fields,
    template_pieces,
    written_field,
)


class Section(pydantic.BaseModel):
    """A section of an experiment. Unknown keys and values of the wrong type are rejected."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )


LARGEST_FLOAT32 = 3.4e38


def require_path(path: str) -> str:
    """Reject text that cannot be a path. `reading` has already expanded the `~` of known users."""
    if "\0" in path:
        raise ValueError("a path cannot contain NUL")
    if path.startswith("~"):
        raise ValueError("the home folder of this user is unknown; write the whole path")
    return path


PathText = Annotated[str, pydantic.AfterValidator(require_path)]


class TemplateSettings(Section):
    """How a record becomes text.

    `{field}` is replaced by a field of the record, and so is `{record[field]}`, which also allows
    names such as `prompt` and names with spaces. Without `input`, `messages` and `text`, a record
    has the fields `prompt` and `completion`.

    Examples:
      >>> template = TemplateSettings(input="Review: {text} Sentiment:", target=" {label}")
      >>> template.chat
      False
    """

    input: str = Field(
        default=PROMPT_FIELD,
        description="Text that the model reads. `{prompt}` marks the position of the virtual "
        "tokens; by default they come first.",
    )
    target: str = Field(
        default="{label}",
        description="Text that the model learns to generate. Without `input`, the default is "
        "`{completion}`. With `objective: preference`, it is `{chosen}`, after a space if `input` "
        "ends in literal text.",
    )
    messages: str | None = Field(
        default=None,
        min_length=1,
        description="Field with a conversation, a list of `{role: ..., content: ...}`. The base "
        "model's chat template writes it, and every assistant turn is a target. It replaces "
        "`input` and `target`.",
    )
    text: str | None = Field(
        default=None,
        min_length=1,
        description="Field with plain text. All of it is the target. It replaces `input` and "
        "`target`.",
    )
    chat: bool = Field(
        default=False,
        description="Wrap `input` as a user message in the base model's chat template.",
    )
    system: str | None = Field(
        default=None, description="System message of the chat; it needs `chat: true`."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=2,
        le=10_000_000,
        description="Limit for the tokens of an input and its target together, not counting those "
        "that every input begins with. The longest field of a longer input is truncated; a longer "
        "conversation loses its first turns; a longer plain text is divided into rows. The "
        "default is the rest of the context window.",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in(cls, tree: Any) -> Any:
        """Set the input and the target that `messages` and `text` replace."""
        if not isinstance(tree, dict):
            return tree
        tree = {key: value for key, value in tree.items() if value is not None}
        formats = [name for name in ("input", "messages", "text") if name in tree]
        if not formats:
            return {"target": "{completion}", **tree}
        kind = formats[-1]
        if kind == "input" or not isinstance(tree[kind], str):
            return tree
        replaced = {"input", "target", "chat", "messages"} & {*tree} - {kind}
        if given := [name for name in sorted(replaced) if tree[name]]:
            raise ValueError(
                f"{kind} cannot be used with {given[0]}; leave it out, or set it to null"
            )
        field = written_field(tree[kind])
        return {**tree, "input": field, "target": field}

    @pydantic.model_serializer(mode="wrap")
    def _written(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the input and the target that `messages` and `text` set."""
        values = handler(self)
        if self.messages or self.text:
            return {k: v for k, v in values.items() if k not in ("input", "target")}
        return values

    @pydantic.field_validator("input", "target")
    @classmethod
    def _check_fields(cls, template: str) -> str:
        if not template_fields(template):
            raise ValueError(
                "has no {field} to fill in ({prompt} marks where the soft prompt goes)"
            )
        return template

    @pydantic.model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.system is not None:
            template_fields(self.system)
            if not self.chat:
                raise ValueError("system needs chat: true")
        texts = (self.system or "", self.input)
        if sum(len(template_pieces(text)) - 1 for text in texts) > 1:
            raise ValueError("{prompt} may occur only once")
        if "{prompt}" in self.target:
            raise ValueError(
                "target: {prompt} may occur only in the input; write {record[prompt]} for a field"
            )
        return self


class TrainingSettings(Section):
    """Length of training and size of a step."""

    steps: int = Field(ge=1, le=1_000_000_000, description="Number of updates.")
    batch_size: int = Field(
        default=16, ge=1, le=100_000, description="Examples per forward and backward pass."
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Passes per update. An update averages the gradients of `batch_size` times "
        "`accumulate` examples.",
    )
    log_every: int = Field(
        default=10,
        ge=1,
        le=1_000_000_000,
        description="Steps between two records of the training loss in `metrics.jsonl`.",
    )


class ScoringSettings(Section):
    """How the label of an input is chosen from the log-probabilities of the labels' texts."""

    normalize: bool = Field(
        default=False,
        description="Divide each log-probability by the number of tokens of the label's text.",
    )
    calibrate: str | None = Field(
        default=None,
        pattern=r"\S",
        description="Content-free text, such as `N/A`. The log-probabilities that the model gives "
        "with this text in every field are subtracted (Zhao et al. 2021, arXiv:2102.09690).",
    )


class GenerationSettings(Section):
    """How text is generated."""

    max_new_tokens: int = Field(
        default=64,
        ge=1,
        le=1_000_000,
        description="Maximum number of generated tokens; an end-of-text token ends a text early.",
    )
    temperature: float | None = Field(
        default=None,
        ge=1e-3,
        le=1_000_000,
        description="Sample with the logits divided by this. `null` or 0 selects greedy decoding.",
    )
    top_k: int | None = Field(
        default=None, ge=1, lt=2**31, description="Sample from the k most probable tokens only."
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Nucleus sampling: keep the smallest set of tokens with at least this total "
        "probability.",
    )
    min_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Keep the tokens with at least this fraction of the highest probability.",
    )
    repetition_penalty: float | None = Field(
        default=None,
        ge=1e-6,
        le=1_000_000,
        description="A value above 1 makes tokens of the input and of the generated text less "
        "probable; with an encoder-decoder, those of the generated text.",
    )
    beams: int = Field(
        default=1, ge=1, le=1000, description="Beams of beam search; 1 for no beam search."
    )
    length_penalty: float = Field(
        default=1.0,
        ge=-4,
        le=4,
        description="Beam search divides log-probabilities by the length raised to this power.",
    )
    samples: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Texts per input: independent samples, or the best beams.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of sampling.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        max_length=1000,
        description="Texts at which generation ends; they are removed from the output.",
    )

    @pydantic.field_validator("temperature", mode="before")
    @classmethod
    def _zero_is_greedy(cls, temperature: Any) -> Any:
        return None if temperature == 0 else temperature

    @pydantic.model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.temperature is None:
            for name in ("top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs a temperature")
            if self.samples > self.beams:
                raise ValueError(
                    "samples: several samples need a temperature or at least that many beams"
                )
        elif self.beams > 1:
            raise ValueError("beams: beam search cannot use a temperature")
        return self


class EvaluationSettings(Section):
    """When to evaluate, and the metric that selects the best prompt."""

    every: int = Field(
        default=100,
        ge=1,
        le=1_000_000_000,
        description="Steps between evaluations. The last step is always evaluated.",
    )
    examples: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Number of validation examples to evaluate, from the first. `null` for all.",
    )
    metrics: list[str] = Field(
        default=[],
        max_length=100,
        description="Additional metrics for the predicted labels or the generated texts.",
    )
    metric: str = Field(
        default="loss",
        description="The metric that selects the best prompt: `loss`, `perplexity`, "
        "`accuracy`, or a value of one of `metrics`, such as `rougeL.f1` or `bleu`. With "
        "`objective: preference` also `objective_loss`, `preference_accuracy`, `reward_margin` or "
        "`kl`, and with `objective: distill` also `objective_loss` or `agreement`. The default is "
        "`accuracy` with a verbalizer, and without one `objective_loss` for these two objectives "
        "and `loss` for `cross_entropy`.",
    )
    stem: bool = Field(default=False, description="Stem English words before ROUGE compares them.")
    samples: int = Field(
        default=32,
        ge=0,
        le=1_000_000_000,
        description="For free text: number of validation examples, counted from the first, for "
        "which texts are generated, measured and saved. On the test data, "
        "texts are generated for all examples unless this is 0.",
    )
    forgetting: bool = Field(
        default=False,
        description="Measure at the end of the run how much the best prompt raises the loss on "
        "plain text that comes with the package, in nats per token. Only for causal base models.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Stop early after this many evaluations without an improvement.",
    )
    batch_size: int = Field(default=32, ge=1, le=100_000, description="Examples per forward pass.")

    @pydantic.field_validator("metrics")
    @classmethod
    def _check_names(cls, names: list[str]) -> list[str]:
        for name in names:
            metric_values(name)
        return names

    @pydantic.model_validator(mode="after")
    def _check_metric(self) -> Self:
        measured = [
            *MODEL_METRICS,
            "accuracy",
            *(v for name in self.metrics for v in metric_values(name)),
        ]
        measured += [name for names in OBJECTIVE_METRICS.values() for name in names]
        if self.metric not in measured:
            known = ", ".join(dict.fromkeys(measured))
            raise ValueError(f"metric: {shortened(self.metric)} is not one of {known}")
        return self


class CheckpointSettings(Section):
    """When the full state of a run is saved. Every evaluation saves a checkpoint."""

    every: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Number of steps between additional checkpoints.",
    )
    keep: int = Field(
        default=2,
        ge=1,
        le=1_000_000,
        description="Number of most recent checkpoints to keep. The best one is always kept.",
    )
