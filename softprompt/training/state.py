"""The state of a run: `TrainState` holds its arrays, `RunState` the rest. A checkpoint has both."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.loading import Backbone
from softprompt.experiment.schema import Experiment
from softprompt.methods.method import Method
from softprompt.objectives.choice import objective_of
from softprompt.objectives.model import Model
from softprompt.objectives.teacher import Teacher
from softprompt.parallel.sharding import place, shardings, with_shardings
from softprompt.runtime.finite import names_not_finite
from softprompt.training.custom import AS_WRITTEN, Custom
from softprompt.training.optimizers import Optimizer
from softprompt.training.step import Frozen, split


@dataclasses.dataclass
class RunState:
    """The state of a run apart from its arrays. Every checkpoint holds it as JSON.

    Attributes:
      base, examples, objective: digests of the base model, of the tokenized data, and of the other
        inputs of the objective (see `Prepared.objective_digest`; empty if there are none, and in
        checkpoints of earlier versions). A run resumes only if they are unchanged.
      optimizer: see `optimizer_record`; empty for the optimizer of the experiment.
      ended: whether a callback has ended the run.
      step: number of updates made.
      data: state of the iterator over training batches.
      evaluated: the last step that was evaluated, or -1.
      best_step, best_metrics: step and validation metrics of the best evaluation so far.
      stale: number of evaluations since the best one.
      records: number of records in `metrics.jsonl`.
      losses, padding: loss and share of padding of each step since the last record of the
        training loss.
      seconds: time spent on this run.
      step_seconds: time spent on its steps alone.
      logged_seconds: `step_seconds` at that record.
    """

    base: str
    examples: str
    objective: str = ""
    optimizer: dict[str, str] = dataclasses.field(default_factory=dict)
    step: int = 0
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluated: int = -1
    best_step: int = 0
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    stale: int = 0
    ended: bool = False
    records: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    padding: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    step_seconds: float = 0.0
    logged_seconds: float = 0.0


class TrainState:
    """The arrays of a run: what is trained, what is frozen, and the state of the optimizer.

    Args:
      experiment: its sections `objective`, `optimizer` and `training` and its seed are used.
      method: the method before training.
      backbone: the frozen backbone.
      teacher: the teacher of distillation, if any.
      padded_length: pad the prompt to this many virtual tokens while it trains, so that
        the trials of a sweep share a compiled program. Ignored if the method cannot be
        padded. Saved arrays are not padded.
      custom: replaces the objective, the optimizer, or both.

    Attributes:
      trainable, opt_state, frozen: the arguments of `train_step`.
      program: the static arguments of `train_step`.
      key: random key of the run.
      padded_length: see above; None if the prompt is not padded.
    """

    def __init__(
        self,
        experiment: Experiment,
        method: Method,
        backbone: Backbone,
        teacher: Teacher | None = None,
        padded_length: int | None = None,
        custom: Custom = AS_WRITTEN,
    ):
        self._optimizer = Optimizer(experiment, custom.optimizer)
        graphdef, trainable, frozen = split(method, backbone, teacher)
        self._unpadded = graphdef, jax.eval_shape(lambda: trainable), frozen
        self.padded_length = None
        if padded_length is not None and method.can_be_padded(backbone):
            self.padded_length = padded_length
            graphdef, trainable, frozen = split(method.padded(padded_length), backbone, teacher)
        opening = np.asarray(method.opening[...]).tolist()
        self.program = program_of(experiment, graphdef, opening, custom)
        self._mesh = backbone.mesh
        self.trainable, self.frozen = place(trainable, self._mesh), frozen
        init, numbers = self._optimizer.rule.init, self._optimizer.numbers
        if self._mesh is not None:  # so that each device makes only its own part
            shapes = jax.eval_shape(init, self.trainable, *numbers)
            init = jax.jit(init, out_shardings=shardings(shapes, self._mesh))
        self.opt_state = init(self.trainable, *numbers)
        self.key = jax.random.key(experiment.seed)

    @property
    def arrays(self) -> tuple[nnx.State, Any, Frozen]:
        """The first three arguments of `train_step`."""
        return self.trainable, self.opt_state, self.frozen

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters, without padding."""
        return sum(x.size for x in jax.tree.leaves(self._unpadded[1]))

    def learning_rate(self, step: int) -> float | None:
        """The learning rate of a step, counted from 0; None for a custom optimizer."""
        return self._optimizer.learning_rate(step)

    def names_not_finite(self) -> list[str]:
        """The paths of the trainable arrays and of the optimizer's arrays with infinity or NaN."""
        names = ("method", "backbone")  # what `split` divided
        trainable = {names[number]: part for number, part in nnx.as_pure(self.trainable).items()}
        return names_not_finite({**trainable, "optimizer": self.opt_state})

    def model(self) -> Model:
        """The model as it is now, padded as in training."""
        return Model(*nnx.merge(self.program["graphdef"], self.trainable, *self.frozen))

    def unpadded_model(self, trainable: nnx.State | None = None) -> Model:
        """The model without padding.

        Args:
          trainable: the trainable state to use; the current one by default.
        """
        graphdef, shapes, frozen = self._unpadded
        trainable = self.trainable if trainable is None else trainable
        return Model(*nnx.merge(graphdef, resize(trainable, shapes), *frozen))

    def saved_shapes(self) -> tuple[nnx.State, Any]:
        """Return the shapes of what `saved_arrays` returns, and how a mesh divides them."""
        init = self._optimizer.init
        shapes = jax.eval_shape(lambda x: (x, init(x)), self._unpadded[1])
        return with_shardings(shapes, self._mesh)

    def saved_arrays(self) -> tuple[nnx.State, Any]:
        """Return the trainable and the optimizer state as a checkpoint holds them."""
        return resize((self.trainable, self.opt_state), self.saved_shapes())

    def restore(self, saved: tuple[nnx.State, Any]) -> None:
        """Restore what `saved_arrays` returned."""
        resized = resize(saved, (self.trainable, self.opt_state))
        self.trainable, self.opt_state = place(resized, self._mesh)


def program_of(
    experiment: Experiment, graphdef: Any, opening: Sequence[int], custom: Custom = AS_WRITTEN
) -> dict[str, Any]:
    """Return the static arguments of `train_step`.

    Args:
      experiment: its sections `objective`, `optimizer` and `training` are used.
      graphdef: what `split` returned.
      opening: the ids that every row begins with.
      custom: replaces the objective, the optimizer, or both.
    """
    objective = custom.objective
    if objective is None:
        objective = objective_of(experiment.objective, opening)
    return {
        "graphdef": graphdef,
        "optimizer": Optimizer(experiment, custom.optimizer).rule,
        "objective": objective,
        "accumulate": experiment.training.accumulate,
    }


def resize(tree: Any, like: Any) -> Any:
    """Cut arrays at the end, or pad them with zeros, to the shapes of other arrays."""

    def fit(array: jax.Array, shape: Any) -> jax.Array:
        if array.shape == shape.shape:
            return array
        # On the host: on a device every length would be compiled separately.
        cut = np.asarray(array)[tuple(map(slice, shape.shape))]
        more = [(0, want - have) for want, have in zip(shape.shape, cut.shape, strict=True)]
        return jnp.asarray(np.pad(cut, more))

    return jax.tree.map(fit, tree, like)
