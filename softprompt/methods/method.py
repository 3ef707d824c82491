"""The interface of a method: what to run, and how to build, save, load and export it.

To add a method, write a subclass of `Method` in a file of its own, and add a line to the table
in `softprompt/experiment/methods.py`; see docs/adding-a-method.md.

Axis letters: S tokens of the opening, P virtual tokens, D hidden, L layers, K key-value heads,
h head size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.loading import Backbone, Base, Prefix
from softprompt.backbones.opening import Opening, computed
from softprompt.errors import UserError, shortened
from softprompt.experiment.schema import Experiment

Axes = Sequence[int | str]
Adapter = tuple[dict[str, np.ndarray], dict[str, Any]]  # tensors, and keys of adapter_config.json


class Constant(nnx.Variable):
    """An array that is never trained."""


def _show_repr(self, path, subtree_renderer):
    """Show the short text of `repr` in notebooks, where NNX would show all arrays."""
    from treescope.rendering_parts import text

    return text(repr(self))


class PromptParam(nnx.Param):
    """A trained array of a soft prompt or a prefix.

    As an NNX filter, the class selects what is learned, such as the vectors `[P, D]` of a
    `SoftPrompt` or the keys and values `[L, P, K, h]` of `PrefixTuning`.

    Examples:
      >>> prompt = SoftPrompt(jnp.zeros((20, 576)))
      >>> prompt.vectors
      PromptParam(float32[20, 576])
      >>> graphdef, learned, frozen = nnx.split(prompt, PromptParam, ...)
    """

    def __repr__(self) -> str:
        value = self.get_value()
        if not hasattr(value, "shape"):  # `jax.tree.map` can put anything in an array's place
            return f"{type(self).__name__}({value!r})"
        return f"{type(self).__name__}({value.dtype}{list(value.shape)})"

    __treescope_repr__ = _show_repr


class OffsetParam(PromptParam):
    """A trained array whose learning rate is that of `Method.offsets_learning_rate`."""


class Method(nnx.Module):
    """What is learned, and how it changes what the model computes.

    Class attributes and class methods describe the method: its default learning rate, its checks,
    and how it is built from an experiment or loaded from a file. An instance holds the learned
    arrays. The defaults in this class describe a method that learns nothing.

    Args:
      opening: `[S]`, the ids that every row begins with. Virtual token i has the id `~i`, a
        negative number. The opening is run once and becomes the prefix, or the end of it.

    Attributes:
      name: the value of `method:` in an experiment, and the key in the table of methods.
      label: the name in reports and model cards.
      default_learning_rate: used if the experiment gives none; None if nothing is trained.
      size_settings: the settings that determine how many parameters are trained.
      trainable: the NNX filter that selects what the training step updates, in the method and
        in the backbone.
      is_pure_prefix: whether the prefix holds everything learned, provided that all virtual
        tokens are in the opening. Rows with different prompts can then share a batch.
      adapter_holds_opening: whether a `peft` adapter of the method includes the opening. If not,
        every input of the adapter must start with the text of the opening.
      keeps_backbone: whether the frozen backbone stays as it is, so that an objective can compare
        with it.
      span: `[1, 2]`, start and end of the part of the opening that is not padding, see `padded`.
        None if there is no padding.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    default_learning_rate: ClassVar[float | None] = None
    size_settings: ClassVar[Sequence[str]] = ()
    trainable: ClassVar[Any] = False
    is_pure_prefix: ClassVar[bool] = False
    adapter_holds_opening: ClassVar[bool] = True
    keeps_backbone: ClassVar[bool] = True

    def __init__(self, opening: jax.Array | Sequence[int] = ()):
        if isinstance(opening, jax.Array):
            self.opening = Constant(opening.astype(jnp.int32))
        else:  # `jnp.asarray` would compile a program
            self.opening = Constant(jax.device_put(np.array(opening, np.int32)))
        self.span: Constant | None = nnx.data(None)

    # From an experiment.

    @classmethod
    def check(cls, experiment: Experiment) -> None:
        """Raise a `ValueError` if settings of an experiment contradict each other."""

    @classmethod
    def virtual_tokens(cls, experiment: Experiment) -> tuple[int, int]:
        """Return how many virtual tokens an experiment asks for.

        Returns:
          The number of virtual tokens that the template places, and the number of others,
          which come before the opening (as in prefix tuning).
        """
        return 0, 0

    @classmethod
    def initial_prompts(cls, experiment: Experiment) -> Sequence[str]:
        """Return the run folders of the trained prompts that training starts from."""
        return ()

    @classmethod
    def offsets_learning_rate(cls, experiment: Experiment) -> float | None:
        """Return the learning rate of arrays of type `OffsetParam`, if the method has any."""
        return None

    @classmethod
    def varying_settings(cls, experiment: Experiment) -> Mapping[str, set[str]]:
        """Return the settings of the method in which trials that share a program may differ.

        They do not change the compiled training step. A length may be among them if prompts
        can be padded to one length; see `padded`.

        Returns:
          For each section the names of these settings.
        """
        return {}

    @classmethod
    def tasks(cls, experiment: Experiment) -> Sequence[str]:
        """Return the names of the tasks that have virtual tokens of their own."""
        return ()

    @classmethod
    def build(
        cls,
        experiment: Experiment,
        base: Base,
        opening: Sequence[int],
        given: Sequence[jax.Array] = (),
    ) -> "Method":
        """Make the method of an experiment as it is before training.

        Args:
          experiment: its seed determines all random values.
          base: the base model.
          opening: `[S]`, see the class.
          given: vectors that training can start from: the vectors `[P, D]` of each of the
            `initial_prompts`. If there are none, the embeddings of the tokens that the teacher of
            distillation reads first.

        Raises:
          UserError: if the settings do not fit the base model.
        """
        return cls(opening)

    # What runs.

    def apply(
        self, backbone: Backbone, key: jax.Array | None = None
    ) -> tuple[Backbone, Prefix | Opening | None]:
        """Return the backbone to run, and what every row begins with.

        Args:
          backbone: the frozen one; it is not changed.
          key: for random numbers in training, such as dropout; None outside of training.
        """
        backbone = self.adapt(backbone, key)
        return backbone, self.beginning(backbone)

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """Return the backbone to run."""
        return backbone

    def beginning(self, backbone: Backbone) -> Prefix | Opening | None:
        """Return what every row begins with, given what `adapt` returned.

        This is the learned prefix, if there is one, followed by the opening.
        """
        prefix = self.learned_prefix(backbone)
        if not self.opening.size:
            return prefix
        spans = None if self.span is None else self.span[...]
        return backbone.opening(backbone.embedding(self.opening[...]), prefix, spans)

    def learned_prefix(self, backbone: Backbone) -> Prefix | None:
        """Return the prefix that is learned, given what `adapt` returned."""
        return None

    def make_prefix(self, backbone: Backbone) -> Prefix | None:
        """Return the prefix that has the same effect as `beginning`.

        It is computed once and used for many batches.
        """
        return computed(backbone, self.beginning(backbone))

    # Padding, so that prompts of different lengths have the same shapes.

    def can_be_padded(self, backbone: Backbone) -> bool:
        """Return whether `padded` works on this backbone."""
        return False

    def padded(self, length: int) -> "Method":
        """Return a method that computes the same, with arrays for `length` virtual tokens."""
        raise ValueError(f"{type(self).__name__} cannot be padded")

    # Saving and loading.

    def folded(self) -> "Method":
        """Return the form of the method that is saved. It computes the same."""
        return self

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """Return the arrays of a folded method that are saved, by name.

        Args:
          backbone: the backbone after training.
        """
        return {}

    def description(self, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Return the keys of `prompt.json` that describe these arrays of a folded method."""
        return {"arrays": {name: list(array.shape) for name, array in arrays.items()}}

    @classmethod
    def saved_form(cls, description: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
        """Return the shapes and types of the saved arrays, by name.

        Args:
          description: the content of `prompt.json`.
          backbone: the frozen backbone of the base model.

        Raises:
          ValueError: if the description does not fit the method or the backbone.
        """
        shapes = description.get("arrays", {})
        axes = cls.saved_axes(description, backbone)
        if axes is not None:
            require_axes(shapes, axes)
        return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    @classmethod
    def saved_axes(
        cls, description: Mapping[str, Any], backbone: Backbone
    ) -> Mapping[str, Axes] | None:
        """Return the axes that the saved arrays must have, by name; None to allow any.

        An axis is a size, or a name for any size. Axes of one name have the same size.

        Args:
          description: the content of `prompt.json`.
          backbone: the frozen backbone of the base model.

        Raises:
          ValueError: if the description does not fit the method or the backbone.
        """
        return None

    @classmethod
    def saved_virtual_tokens(cls, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """Return the same numbers as `virtual_tokens`, from the shapes of the saved arrays."""
        return 0, 0

    @classmethod
    def load(
        cls,
        arrays: Mapping[str, jax.Array],
        description: Mapping[str, Any],
        opening: jax.Array | Sequence[int],
    ) -> "Method":
        """Make a trained method from what was saved.

        Args:
          arrays: as returned by `arrays`.
          description: with the keys that `description` returned.
          opening: `[S]`, as in training.
        """
        return cls(opening)

    def restore(self, backbone: Backbone, arrays: Mapping[str, jax.Array]) -> Backbone:
        """Return the backbone as it was after training.

        Args:
          backbone: the frozen backbone of the base model.
          arrays: the saved arrays.
        """
        return backbone

    def plain_vectors(self) -> jax.Array | None:
        """Return the learned vectors `[P, D]` if nothing else was learned, otherwise None."""
        return None

    # Exports.

    def peft_adapter(self, base: Base, prefix: Prefix | None) -> Adapter:
        """Return the `peft` adapter of the method.

        Args:
          base: the base model.
          prefix: the one that `apply` returned.

        Raises:
          UserError: if `peft` has no adapter that computes the same.
        """
        raise UserError(f"method {self.name} has no equivalent in peft")

    def peft_prefix(self, base: Base, prefix: Prefix | None) -> Adapter:
        """Return the whole prefix, text in the opening included, as a PREFIX_TUNING adapter.

        Arguments and errors are the same as for `peft_adapter`.
        """
        raise UserError(f"method {self.name} cannot be written as a prefix")

    def merge_into(self, backbone: Backbone, adapted: Backbone) -> tuple[Backbone, np.ndarray]:
        """Return a plain model that computes the same as the method.

        Args:
          backbone: the frozen backbone of the base model.
          adapted: the backbone that `apply` returned.

        Returns:
          A backbone, and vectors `[P, D]` to add to its vocabulary as new tokens.

        Raises:
          UserError: if no plain model computes the same.
        """
        raise UserError(f"method {self.name} cannot be merged into a plain model")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    __treescope_repr__ = _show_repr


def require_axes(shapes: Mapping[str, Sequence[int]], axes: Mapping[str, Axes]) -> None:
    """Require that arrays have the axes that `Method.saved_axes` returned.

    Args:
      shapes: the shapes of the arrays, by name.
      axes: their axes, by name.

    Raises:
      ValueError: names the first array that has other axes.
    """
    sizes: dict[int | str, int] = {}
    for name in sorted(shapes.keys() | axes.keys()):
        shape, expected = shapes.get(name), axes.get(name)
        if shape is None:
            raise ValueError(f"arrays: {name} is missing")
        if expected is None:
            raise ValueError(f"arrays: {shortened(name)} is not an array of the method")
        pairs = zip(expected, shape, strict=False)
        wanted = [sizes.setdefault(a, n) if isinstance(a, str) else a for a, n in pairs]
        if len(shape) != len(expected) or list(shape) != wanted:
            raise ValueError(f"arrays: {name} has shape {shortened(shape)}, not {list(expected)}")
