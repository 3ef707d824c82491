"""What a method is: it says what backbone and what prefix to run.

Axis letters: S tokens of the opening.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.backbones.loading import Backbone, Prefix


class Constant(nnx.Variable):
    """An array that no method learns."""


class Method(nnx.Module):
    """The base of all methods, and by itself the hard prompt, of which nothing is learned.

    Attributes:
      opening: `[S]`, ids that every row begins with, virtual tokens among them or not. They
        are run once, and become the prefix or the end of it.
      span: `[1, 2]`, from which of these up to which there are any, or None: all. The others
        are padding, see `SoftPrompt.padded`.
    """

    trainable: Any = False  # the filter for what the step updates

    def __init__(self, opening: jax.Array | Sequence[int] = ()):
        self.opening = Constant(jnp.asarray(opening, jnp.int32))
        self.span: Constant | None = nnx.data(None)

    def apply(
        self, backbone: Backbone, key: jax.Array | None = None
    ) -> tuple[Backbone, Prefix | None]:
        """What to run: a backbone, and what stands in front of every row.

        Args:
          backbone: the frozen one, which stays as it is.
          key: for what is random in training.
        """
        backbone = self.adapt(backbone, key)
        return backbone, self.make_prefix(backbone)

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """The first half of `apply`."""
        return backbone

    def make_prefix(self, backbone: Backbone) -> Prefix | None:
        """The second half of `apply`, given what the first half returned."""
        if not self.opening.size:
            return None
        prefix = backbone.prefill(backbone.embedding(self.opening[...]))
        return prefix if self.span is None else dataclasses.replace(prefix, spans=self.span[...])

    def folded(self) -> "Method":
        """The same function in the form that is saved."""
        return self

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """What is saved of a folded method, by name.

        Args:
          backbone: the one it was trained on; of use only if that is what was trained.
        """
        return {}


class FullFineTuning(Method):
    """Every parameter of the backbone is learned."""

    trainable = nnx.Param

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """The backbone's parameters by their paths."""
        return parameters_of(backbone)


def copied(backbone: Backbone) -> Backbone:
    """New modules and variables that hold the same arrays, for a method to change."""
    graphdef, state = nnx.split(backbone)
    return nnx.merge(graphdef, jax.tree.map(lambda array: array, state))


def parameters_of(backbone: Backbone) -> dict[str, jax.Array]:
    """A backbone's parameters by their paths."""
    flat = nnx.to_flat_state(nnx.state(backbone, nnx.Param))
    return {".".join(map(str, path)): variable[...] for path, variable in flat}


def with_parameters(backbone: Backbone, arrays: Mapping[str, jax.Array]) -> Backbone:
    """A backbone of the same structure that has other parameters, as `parameters_of` gives them."""
    backbone = copied(backbone)
    for path, variable in nnx.to_flat_state(nnx.state(backbone, nnx.Param)):
        variable.set_value(arrays[".".join(map(str, path))])
    return backbone
