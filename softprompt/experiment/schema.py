"""Experiments: the schema. `experiment_file.py` reads it from YAML."""

from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from softprompt.experiment.methods import METHODS, method_class, require_method
from softprompt.experiment.metric_names import LABEL_METRICS, MODEL_METRICS, metric_values
from softprompt.experiment.templates import template_fields, template_pieces


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )


class DataSettings(Section):
    """Where the records are: `.jsonl` or `.csv` files, or `hub:NAME#SPLIT`."""

    train: str
    validation: str
    test: str | None = None


class TemplateSettings(Section):
    """How a record becomes text; `{field}` stands for a field of the record.

    Attributes:
      input: what the model reads. `{prompt}` in it is the place of the virtual tokens,
        which by default stand in front of everything.
      target: what it shall write behind it.
      chat: whether `input` is what a user says in the chat template of the base model.
      system: what the chat template says of the system's part.
      max_tokens: longest input plus target; the longest field of a longer one is cut at
        its end. By default what the model's context leaves beside the prompt.
    """

    input: str
    target: str = "{label}"
    chat: bool = False
    system: str | None = None
    max_tokens: Annotated[int, Field(ge=2)] | None = None

    @pydantic.field_validator("input", "target")
    @classmethod
    def _has_fields(cls, template: str) -> str:
        if not template_fields(template):
            raise ValueError("has no {field} to fill in ({prompt} is the place of the soft prompt)")
        return template

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.system is not None:
            template_fields(self.system)
            if not self.chat:
                raise ValueError("system needs chat: true")
        written = (self.system or "", self.input)
        if sum(len(template_pieces(part)) - 1 for part in written) > 1:
            raise ValueError("{prompt} stands in it twice")
        if "{prompt}" in self.target:
            raise ValueError("target: the soft prompt stands in the input")
        return self


class ComputeSettings(Section):
    """How the frozen base model is held and run.

    Attributes:
      dtype: of parameters and activations (norms, softmax and loss are float32).
      int8: hold the weight matrices as int8, with a scale for each output channel.
      attention: `auto` takes `cudnn` where it can be had and `xla` elsewhere.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    int8: bool = False
    attention: Literal["auto", "xla", "cudnn"] = "auto"


class InitializationSettings(Section):
    """Where the first values of virtual tokens come from.

    Attributes:
      init: `vocabulary` (embeddings of tokens drawn from the `init_top` of lowest id),
        `random` (normal, with the embedding table's mean and `init_scale` times its
        spread), `text` (embeddings of `init_text`, repeated or cut), `labels` (one vector
        for each verbalizer, then as `vocabulary`), or `prompts` (the mean of trained
        soft prompts of the same length).
      init_text: for `init: text`.
      init_prompts: for `init: prompts`: folders of runs.
    """

    init: Literal["vocabulary", "random", "text", "labels", "prompts"] = "vocabulary"
    init_top: Annotated[int, Field(ge=1)] = 5000
    init_scale: Annotated[float, Field(ge=0)] = 1.0
    init_text: str | None = None
    init_prompts: Annotated[list[str], Field(min_length=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _init_fits(self) -> Self:
        for init in ("text", "prompts"):
            if (self.init == init) != bool(getattr(self, f"init_{init}")):
                raise ValueError(f"init: {init} and init_{init} need each other")
        return self


class PromptSettings(InitializationSettings):
    """The soft prompt.

    Attributes:
      length: number of virtual tokens, k.
      reparametrization: what the vectors are made from while they are trained: `mlp` or
        `lstm` (P-tuning), `residual`, `low_rank`, or `multitask`, a prompt for each of
        several tasks: one that they share times a matrix of rank 1.
      size: of the network's hidden layer, or the rank; see docs/methods.md.
      tasks: for `multitask`: what `task_field` of a record may say.
    """

    length: Annotated[int, Field(ge=1)] = 20
    reparametrization: Literal["mlp", "lstm", "residual", "low_rank", "multitask"] | None = None
    size: Annotated[int, Field(ge=1)] | None = None
    tasks: Annotated[list[str], Field(min_length=1)] | None = None
    task_field: str = "task"

    @pydantic.model_validator(mode="after")
    def _reparametrization_fits(self) -> Self:
        if (self.reparametrization == "multitask") != bool(self.tasks):
            raise ValueError("reparametrization: multitask and tasks need each other")
        if self.tasks and len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: one is named twice")
        if self.size is not None and self.reparametrization in (None, "multitask"):
            raise ValueError("size is that of a reparametrization mlp, lstm, residual or low_rank")
        return self


class PrefixSettings(InitializationSettings):
    """Prefix tuning; its first keys and values are what the model makes of `init`.

    Attributes:
      length: number of virtual tokens.
      size: of the hidden layer of the network that the change of keys and values comes
        from while it is trained; None: they are trained themselves.
    """

    length: Annotated[int, Field(ge=1)] = 20
    size: Annotated[int, Field(ge=1)] | None = None


class DePTSettings(Section):
    """DePT's offsets of the input embeddings; its short prompt is that of `prompt`.

    Attributes:
      rank: of the matrix of offsets.
      positions: how many tokens of an input have one.
      learning_rate: of the offsets; that of the prompt is the optimizer's.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    positions: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class LoRASettings(Section):
    """LoRA's low-rank additions to weight matrices.

    Attributes:
      rank: r.
      alpha: the additions are multiplied by alpha / rank.
      dropout: share of the additions' inputs that are set to zero in training.
      targets: which matrices, as patterns of their paths in the backbone, such as
        `attention.query`, `feed_forward.*` or `*`; a path's beginning may be left out.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[list[str], Field(min_length=1)] = ["attention.query", "attention.value"]


class OptimizerSettings(Section):
    """The update rule; `learning_rate` is the peak, reached after `warmup_steps`.

    By default it is that of the method. sgd has a momentum of 0.9. `clip_norm` bounds the norm
    of the whole gradient.
    """

    name: Literal["adamw", "adafactor", "sgd", "lion"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-2
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0


class TrainingSettings(Section):
    """`batch_size` examples a pass, `accumulate` passes an update, `steps` updates."""

    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 16
    accumulate: Annotated[int, Field(ge=1)] = 1
    log_every: Annotated[int, Field(ge=1)] = 10


class ScoringSettings(Section):
    """How the label of an input is chosen, by the log-probabilities of the verbalizers.

    Attributes:
      normalize: divide each by its number of tokens.
      calibrate: a text without content, such as `N/A`, in place of an input's fields; the
        log-probabilities behind it are subtracted (Zhao et al. 2021, arXiv:2102.09690).
    """

    normalize: bool = False
    calibrate: Annotated[str, Field(pattern=r"\S")] | None = None


class GenerationSettings(Section):
    """How text is written.

    Attributes:
      max_new_tokens: where to stop if the end-of-text token does not come before.
      temperature: tokens are drawn, their logits divided by it; None or 0: the likeliest is taken.
      top_k, top_p, min_p: draw only from the k likeliest tokens; from the likeliest that have
        the share p together; from those with this share of the likeliest's probability.
      repetition_penalty: makes tokens that were read or written less likely, if above 1.
      beams: of beam search; 1: none.
      length_penalty: of beam search: log-probabilities are divided by the length to this power.
      samples: texts for each input: draws, or the best of the beams.
      seed: of the draws.
      stop: texts that end what is written, and are left out.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=1e-3)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    beams: Annotated[int, Field(ge=1)] = 1
    length_penalty: Annotated[float, Field(ge=-4, le=4)] = 1.0
    samples: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    stop: list[Annotated[str, Field(min_length=1)]] = []

    @pydantic.field_validator("temperature", mode="before")
    @classmethod
    def _zero_draws_nothing(cls, temperature: Any) -> Any:
        return None if temperature == 0 else temperature

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.temperature is None:
            for name in ("top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs a temperature")
            if self.samples > self.beams:
                raise ValueError("samples: more than one need a temperature, or as many beams")
        elif self.beams > 1:
            raise ValueError("beams: beam search takes no temperature")
        return self


class EvaluationSettings(Section):
    """When to look at the validation data, and what decides which prompt is the best.

    Attributes:
      every: steps between evaluations; one more follows the last step.
      examples: how many validation examples to use, from the first on; all by default.
      metrics: more of them, of predicted labels or written texts; see `metrics/named.py`.
      metric: the one that decides: `loss`, `accuracy`, or a value of one of `metrics`, such
        as `rougeL.f1` or `bleu`.
      stem: whether ROUGE compares English words without their endings.
      samples: for free text: of how many validation examples, the first ones, texts are
        written, measured and kept in `samples.jsonl`.
      patience: stop after so many evaluations without a better one.
      batch_size: examples a pass.
    """

    every: Annotated[int, Field(ge=1)] = 100
    examples: Annotated[int, Field(ge=1)] | None = None
    metrics: list[str] = []
    metric: str = "loss"
    stem: bool = False
    samples: Annotated[int, Field(ge=0)] = 32
    patience: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32

    @pydantic.field_validator("metrics")
    @classmethod
    def _are_known(cls, names: list[str]) -> list[str]:
        for name in names:
            metric_values(name)
        return names

    @pydantic.model_validator(mode="after")
    def _metric_is_measured(self) -> Self:
        measured = ["loss", "accuracy", *(v for name in self.metrics for v in metric_values(name))]
        if self.metric not in measured:
            raise ValueError(f"metric: {self.metric!r} is none of {', '.join(measured)}")
        return self


class CheckpointSettings(Section):
    """Full states are saved at every evaluation, and every `every` steps if set."""

    every: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[int, Field(ge=1)] = 2


class Experiment(Section):
    """One experiment file, resolved: all that a run depends on.

    Of the sections `prompt`, `prefix`, `dept` and `lora` a method reads its own. `shots`
    training examples, drawn by the seed, stand in front of every input as text.
    """

    name: str
    base: str
    compute: ComputeSettings = ComputeSettings()
    method: Annotated[str, pydantic.AfterValidator(require_method)] = "prompt"
    shots: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataSettings
    template: TemplateSettings
    verbalizer: Annotated[dict[str, str], Field(min_length=2)] | None = None
    prompt: PromptSettings = PromptSettings()
    prefix: PrefixSettings = PrefixSettings()
    dept: DePTSettings = DePTSettings()
    lora: LoRASettings = LoRASettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    scoring: ScoringSettings = ScoringSettings()
    generation: GenerationSettings = GenerationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _method_has_a_learning_rate(cls, tree: Any) -> Any:
        """Fill in the default learning rate of the method if the file gives none."""
        optimizer, method = tree.get("optimizer", {}), tree.get("method", "prompt")
        if not isinstance(optimizer, dict) or optimizer.get("learning_rate") is not None:
            return tree
        rate = method_class(method).default_learning_rate if str(method) in METHODS else None
        return tree | {"optimizer": optimizer | {"learning_rate": rate}} if rate else tree

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.verbalizer is None:
            self._free_text_fits()
            for method in ("prompt", "prefix"):
                if getattr(self, method).init == "labels":
                    raise ValueError(f"{method}.init: labels needs a verbalizer")
        elif len(template_fields(self.template.target)) != 1:
            raise ValueError("template.target: with a verbalizer it must have one {field}")
        elif len(set(self.verbalizer.values())) < len(self.verbalizer):
            raise ValueError("verbalizer: two labels have the same text")
        if self.scoring.calibrate and self.prompt.tasks:
            raise ValueError("scoring.calibrate is not for a prompt of several tasks")
        method_class(self.method).check(self)
        return self

    def _free_text_fits(self) -> None:
        evaluation = self.evaluation
        for key, names in (("metric", [evaluation.metric]), ("metrics", evaluation.metrics)):
            for name in names:
                if name in LABEL_METRICS:
                    raise ValueError(f"evaluation.{key}: {name} needs a verbalizer")
        if evaluation.metric not in MODEL_METRICS and not evaluation.samples:
            raise ValueError(f"evaluation.metric: {evaluation.metric} needs evaluation.samples")
        if self.scoring != ScoringSettings():
            raise ValueError("scoring needs a verbalizer")
