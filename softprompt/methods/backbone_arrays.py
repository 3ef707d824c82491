"""The arrays of a backbone: copy it, replace its parameters, list its matrices.

Axis letters: L layers.
"""

from collections.abc import Mapping

import jax
from flax import nnx

from softprompt.backbones.layers import Linear
from softprompt.backbones.loading import Backbone


def copied(backbone: Backbone) -> Backbone:
    """Return new modules and variables that hold the same arrays.

    A method changes the copy, and the frozen backbone stays as it is. No array is duplicated.
    """
    graphdef, state = nnx.split(backbone)
    return nnx.merge(graphdef, jax.tree.map(lambda array: array, state))


def parameters_of(backbone: Backbone) -> dict[str, jax.Array]:
    """Return the parameters of a backbone by their paths."""
    flat = nnx.to_flat_state(nnx.state(backbone, nnx.Param))
    return {".".join(map(str, path)): variable[...] for path, variable in flat}


def with_parameters(backbone: Backbone, arrays: Mapping[str, jax.Array]) -> Backbone:
    """Return a copy of a backbone with other parameters.

    Args:
      backbone: it is not changed.
      arrays: new values by path, see `parameters_of`. The other parameters stay as they are.
    """
    backbone = copied(backbone)
    for path, variable in nnx.to_flat_state(nnx.state(backbone, nnx.Param)):
        name = ".".join(map(str, path))
        if name in arrays:
            variable.set_value(arrays[name])
    return backbone


def matrices_of(backbone: Backbone) -> dict[str, Linear]:
    """Return the modules that hold a matrix of every layer, stacked as `[L, in, out]`, by path."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(backbone)
        if isinstance(module, Linear) and module.kernel.ndim == 3
    }
