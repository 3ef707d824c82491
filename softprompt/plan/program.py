"""The training step of an experiment as shapes, without any array.

Axis letters: B batch, T tokens, M target positions, P virtual tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softprompt.backbones.attention_choice import planned_attention
from softprompt.backbones.backbone import Backbone
from softprompt.backbones.batch import Batch
from softprompt.backbones.flash import AttentionName
from softprompt.backbones.loading import Base, backbone_shapes
from softprompt.data.layout import Layout, PackedShape
from softprompt.data.top_tokens import TopTokens
from softprompt.errors import UserError
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import Experiment
from softprompt.experiment.templates import template_fields, template_pieces
from softprompt.methods.method import Method
from softprompt.objectives.teacher import Teacher
from softprompt.parallel.mesh import ROWS, Axes, axis_size
from softprompt.parallel.sharding import with_shardings
from softprompt.training.optimizers import Optimizer
from softprompt.training.state import program_of
from softprompt.training.step import split, train_step

_RANDOM = {"init": "random", "init_text": None, "init_prompts": None}


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The size of a training batch.

    Attributes:
      rows: B, the rows of a step.
      tokens: T, the tokens of each row, without the opening that all rows share.
      targets: M, the tokens of each row that carry loss.
    """

    rows: int
    tokens: int
    targets: int

    def packed(self, packs: int) -> PackedShape:
        """Return the shape of the batch if it is divided into packs."""
        rows = self.rows // packs
        sizes = rows * self.tokens, rows * self.targets
        return PackedShape(packs, rows, *sizes, self.tokens, self.targets)


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """The arguments of `train_step` as shapes. With a mesh they have shardings.

    Attributes:
      trainable, opt_state, frozen, batch, key: the arguments that are arrays.
      static: the static arguments.
    """

    trainable: Any
    opt_state: Any
    frozen: Any
    batch: Batch
    key: Any
    static: Mapping[str, Any]

    def trace(self) -> Any:
        """Trace `train_step`: the result has a `jaxpr`, and `lower()` for compiling."""
        arrays = self.trainable, self.opt_state, self.frozen, self.batch, self.key
        return train_step.trace(*arrays, **self.static)


def step_program(
    experiment: Experiment,
    config: Mapping[str, Any],
    archs: Sequence[Any],
    rows: BatchShape,
    mesh: Mesh | None,
) -> StepProgram:
    """Return the step of an experiment.

    The method is built as for training, except that virtual tokens start from random vectors:
    the initial values do not change the program, and other initial values need a tokenizer. The
    text that the teacher of distillation reads first is left out, because its length is unknown.

    Args:
      experiment: what would be trained.
      config: the content of the base model's `config.json`.
      archs: the architecture that `config` describes. If the teacher has another base model, its
        architecture comes second.
      rows: the shape of a batch.
      mesh: the mesh, or None for one device.

    Raises:
      UserError: if the method trains nothing, or does not fit the base model.
    """
    experiment = _with_random_vectors(experiment)
    kind = method_class(experiment.method)
    backbone, *others = (_backbone(experiment, arch, mesh) for arch in archs)

    def build(backbone: Backbone) -> Method:
        no_tokenizer: Any = None
        base = Base(experiment.base, "", config, backbone, no_tokenizer, experiment.compute)
        return kind.build(experiment, base, opening(experiment), ())

    method = nnx.eval_shape(build, backbone)
    teacher, top_tokens = _teacher(experiment, (others or [backbone])[0])
    graphdef, trainable, frozen = split(method, backbone, teacher)
    if not jax.tree.leaves(trainable):
        raise UserError(f"method {experiment.method} trains nothing, so there is no step to plan")
    static = program_of(experiment, graphdef, opening(experiment))
    opt_state = jax.eval_shape(Optimizer(experiment).init, trainable)
    branching = experiment.objective.name == "preference" and not backbone.separate_targets
    batch = Layout(backbone.separate_targets, branching).lay_out(
        [], rows.packed(experiment.training.accumulate * axis_size(mesh, ROWS))
    )
    if top_tokens is not None:
        batch = top_tokens.beside(batch, [])
    key = jax.eval_shape(lambda: jax.random.key(0))
    trainable, opt_state, frozen = with_shardings((trainable, opt_state, frozen), mesh)
    batch, key = _shapes(batch, mesh, ROWS), _shapes(key, mesh)
    return StepProgram(trainable, opt_state, frozen, batch, key, static)


def _teacher(experiment: Experiment, backbone: Backbone) -> tuple[Teacher | None, TopTokens | None]:
    """Return the teacher that the step runs, or the stored tokens that the step reads instead."""
    settings = experiment.objective.teacher
    if settings is None:
        return None, None
    if settings.top_tokens is not None:
        return None, TopTokens.empty(np.zeros(0, int), settings.top_tokens)
    return Teacher(backbone), None  # without a tokenizer, the text that it reads first is not known


def _backbone(experiment: Experiment, arch: Any, mesh: Mesh | None) -> Backbone:
    """Return a backbone without weights that has the `compute` settings of an experiment."""
    compute = experiment.compute
    attention: AttentionName = "xla"
    if mesh is not None:
        attention = planned_attention(compute.attention, arch, compute.dtype, mesh)
    return backbone_shapes(
        arch, dtype=compute.dtype, quantize=compute.quantize, attention=attention, mesh=mesh
    )


def opening(experiment: Experiment) -> list[int]:
    """Return the ids of the virtual tokens if every row begins with them, and else nothing.

    The opening of a real run also has the text before the first field. Without a tokenizer, its
    length is unknown, so it counts among the tokens of the rows.
    """
    before, *after = template_pieces(experiment.template.input)
    in_rows = bool(after and template_fields(before))
    kind = method_class(experiment.method)
    if in_rows or kind.tasks(experiment):
        return []
    return [~i for i in range(kind.virtual_tokens(experiment)[0])]


def _with_random_vectors(experiment: Experiment) -> Experiment:
    sections = {
        name: getattr(experiment, name).model_copy(update=_RANDOM) for name in ("prompt", "prefix")
    }
    return experiment.model_copy(update=sections)


def _shapes(arrays: Any, mesh: Mesh | None, *axes: Axes) -> Any:
    """Return the shapes of arrays whose first axes the given axes of a mesh divide."""
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), arrays
    )
