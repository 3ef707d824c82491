"""The schema of experiments. `reading` reads it from YAML."""

from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from softprompt.experiment.compute_settings import ComputeSettings
from softprompt.experiment.data_settings import DataSettings
from softprompt.experiment.method_settings import (
    DePTSettings,
    LoRASettings,
    PrefixSettings,
    PromptSettings,
)
from softprompt.experiment.methods import METHODS, method_class, require_method
from softprompt.experiment.metric_names import LABEL_METRICS, MODEL_METRICS, OBJECTIVE_METRICS
from softprompt.experiment.objective_settings import ObjectiveSettings
from softprompt.experiment.optimizer_settings import OptimizerSettings
from softprompt.experiment.sections import (
    CheckpointSettings,
    EvaluationSettings,
    GenerationSettings,
    PathText,
    ScoringSettings,
    Section,
    TemplateSettings,
    TrainingSettings,
)
from softprompt.experiment.templates import preferred_answer, template_fields

_OF_MODEL = {*MODEL_METRICS, *(n for names in OBJECTIVE_METRICS.values() for n in names)}


def _require_folder_name(name: str) -> str:
    plain = name.isprintable() and name.strip() == name and not {*"/\\"} & {*name}
    if not plain or name.startswith(".") or not 0 < len(name.encode()) <= 200:
        raise ValueError(
            "must be the name of a folder: at most 200 bytes of printable characters, "
            "without slashes, a leading dot, or spaces at either end"
        )
    return name


class Experiment(Section):
    """One experiment with all its settings: everything that a run depends on.

    Each method reads its own section among `prompt`, `prefix`, `dept` and `lora`.

    Examples:
      >>> experiment = load_experiment("experiments/sentiment.yaml", ["seed=1"])
      >>> experiment.seed
      1
      >>> experiment.template.target
      '{label}'
    """

    name: Annotated[str, pydantic.AfterValidator(_require_folder_name)] = Field(
        description="Name of the experiment, and of its run folder. The default is the name of "
        "the file."
    )
    base: PathText = Field(
        description="Base model: a short name, the id of a model on the Hugging Face Hub, a model "
        "directory or a GGUF file."
    )
    compute: ComputeSettings = ComputeSettings()
    method: Annotated[str, pydantic.AfterValidator(require_method)] = Field(
        default="prompt",
        description="What is trained: a soft prompt (`prompt`), a prefix of keys and values "
        "(`prefix`), a prompt with offsets (`dept`), low-rank additions to weights (`lora`), all "
        "weights (`full`), or nothing (`none`).",
    )
    shots: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Number of solved training examples, drawn by the seed, that are written "
        "before every input.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of the initial values, the order of the data, dropout, and the choice of "
        "shots and of shares of the data.",
    )
    data: DataSettings
    template: TemplateSettings = TemplateSettings()
    verbalizer: dict[str, str] | None = Field(
        default=None,
        min_length=2,
        description='Text of each label, such as `{yes: " yes", no: " no"}`. `null` for free text.',
    )
    prompt: PromptSettings = PromptSettings()
    prefix: PrefixSettings = PrefixSettings()
    dept: DePTSettings = DePTSettings()
    lora: LoRASettings = LoRASettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    scoring: ScoringSettings = ScoringSettings()
    generation: GenerationSettings = GenerationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()

    def __repr__(self) -> str:
        return f"Experiment({self.name!r}, method {self.method}, base {self.base!r})"

    __str__ = __repr__

    @pydantic.model_validator(mode="before")
    @classmethod
    def _set_learning_rate(cls, tree: Any) -> Any:
        """Fill in the default learning rate of the method if the file gives none."""
        optimizer, method = tree.get("optimizer", {}), tree.get("method", "prompt")
        if not isinstance(optimizer, dict) or optimizer.get("learning_rate") is not None:
            return tree
        if optimizer.get("name") == "custom":
            return tree
        rate = method_class(method).default_learning_rate if str(method) in METHODS else None
        return tree | {"optimizer": optimizer | {"learning_rate": rate}} if rate else tree

    @pydantic.model_validator(mode="before")
    @classmethod
    def _set_answer(cls, tree: Any) -> Any:
        """Fill in the default target of `objective: preference`."""
        objective, template = tree.get("objective"), tree.get("template", {})
        name = objective.get("name") if isinstance(objective, dict) else objective
        if name != "preference" or not isinstance(template, dict):
            return tree
        if any(template.get(key) is not None for key in ("target", "messages", "text")):
            return tree
        return tree | {"template": template | {"target": preferred_answer(template)}}

    @pydantic.model_validator(mode="after")
    def _set_metric(self) -> Self:
        """Choose the metric that decides unless the file names one."""
        given, default = self.evaluation.model_fields_set, "loss"
        if self.verbalizer is not None:
            default = "accuracy"
        elif self.objective.name in OBJECTIVE_METRICS and not self.objective.custom:
            default = "objective_loss"
        if "metric" not in given and default != self.evaluation.metric:
            values = {**dict(self.evaluation), "metric": default}
            evaluation = EvaluationSettings.model_construct(given, **values)
            self.__dict__["evaluation"] = evaluation  # an experiment is frozen
        return self

    @pydantic.model_validator(mode="after")
    def _check_parts(self) -> Self:
        self._check_format()
        if self.verbalizer is None:
            self._check_free_text()
            for method in ("prompt", "prefix"):
                if getattr(self, method).init == "labels":
                    raise ValueError(f"{method}.init: labels needs a verbalizer")
        elif len(template_fields(self.template.target)) != 1:
            raise ValueError("template.target: with a verbalizer it must have one {field}")
        elif len(set(self.verbalizer.values())) < len(self.verbalizer):
            raise ValueError("verbalizer: two labels have the same text")
        teacher = self.objective.teacher
        for method in ("prompt", "prefix"):
            reads_text = teacher is not None and (teacher.context or teacher.shots)
            if getattr(self, method).init == "teacher" and not reads_text:
                raise ValueError(
                    f"{method}.init: teacher needs objective.teacher with context or shots"
                )
        if self.prompt.tasks:
            for key, is_set in (
                ("scoring.calibrate", self.scoring.calibrate),
                ("evaluation.forgetting", self.evaluation.forgetting),
            ):
                if is_set:
                    raise ValueError(f"{key} cannot be used with prompt.tasks")
        self._check_objective()
        method_class(self.method).check(self)
        return self

    def continuing(self, run: "Experiment") -> "Experiment":
        """Return this experiment with the metric that decides in an older run of it.

        A metric that the file names is kept. The default was different in earlier versions.

        Args:
          run: the experiment of the run, from its `config.yaml`.
        """
        if "metric" in self.evaluation.model_fields_set:
            return self
        return self.with_metric(run.evaluation.metric)

    def with_metric(self, metric: str) -> "Experiment":
        """Return this experiment with another metric that decides."""
        evaluation = self.evaluation.model_copy(update={"metric": metric})
        return self.model_copy(update={"evaluation": evaluation})

    def _check_format(self) -> None:
        """Check what only a template with an input can have, or one that answers."""
        template, evaluation = self.template, self.evaluation
        for kind in ("messages", "text"):
            if getattr(template, kind) is not None:
                if self.verbalizer is not None:
                    raise ValueError(f"verbalizer cannot be used with template.{kind}")
                if self.shots:
                    raise ValueError(f"shots cannot be used with template.{kind}")
        if template.text is not None:
            for name in (evaluation.metric, *evaluation.metrics):
                if name not in _OF_MODEL:
                    raise ValueError(
                        f"evaluation: template.text is measured by loss and perplexity, not {name}"
                    )

    def _check_objective(self) -> None:
        name, metric = self.objective.name, self.evaluation.metric
        owners = [owner for owner, names in OBJECTIVE_METRICS.items() if metric in names]
        if self.objective.custom and owners and metric != "objective_loss":
            raise ValueError(
                f"evaluation.metric: {metric} is not measured with a custom objective; use "
                "objective_loss"
            )
        if not self.objective.custom and owners and name not in owners:
            raise ValueError(f"evaluation.metric: {metric} needs objective: {' or '.join(owners)}")
        if name != "cross_entropy" and not method_class(self.method).keeps_backbone:
            raise ValueError(
                f"objective: {name} needs the unchanged base model; choose another method than "
                f"{self.method}, such as lora"
            )
        if self.objective.teacher is not None and self.objective.teacher.writes_targets:
            self._check_written_targets()
        if name != "preference":
            return
        if self.verbalizer is not None:
            raise ValueError("objective: preference learns from free text, without a verbalizer")
        if "chosen" not in template_fields(self.template.target):
            raise ValueError(
                "template.target: objective preference reads the answers from the fields chosen "
                'and rejected; write target: "{chosen}"'
            )

    def _check_written_targets(self) -> None:
        name, generation = "objective.teacher.writes_targets", self.generation
        if self.verbalizer is not None:
            raise ValueError(f"{name} cannot be used with a verbalizer")
        if self.template.text is not None:
            raise ValueError(f"{name} cannot be used with template.text, which has no answers")
        if self.template.messages is None and len(template_fields(self.template.target)) != 1:
            raise ValueError(f"{name} needs a template.target with one {{field}}")
        if generation.temperature is not None or generation.samples > 1:
            raise ValueError(
                f"{name}: targets are decoded greedily; remove temperature and samples"
            )

    def _check_free_text(self) -> None:
        evaluation = self.evaluation
        for key, names in (("metric", [evaluation.metric]), ("metrics", evaluation.metrics)):
            for name in names:
                if name in LABEL_METRICS:
                    raise ValueError(f"evaluation.{key}: {name} needs a verbalizer")
        if evaluation.metric not in _OF_MODEL and not evaluation.samples:
            raise ValueError(f"evaluation.metric: {evaluation.metric} needs evaluation.samples")
        if self.scoring != ScoringSettings():
            raise ValueError("scoring needs a verbalizer")
