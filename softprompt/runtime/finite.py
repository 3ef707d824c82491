"""Infinity and NaN: they are neither saved nor loaded nor shown as results."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.errors import UserError


class NotFiniteError(UserError):
    """A value that must be a number is infinite or NaN."""


def model_not_finite(what: str) -> NotFiniteError:
    """Return the error for infinite or NaN results of a model, such as `logits`."""
    return NotFiniteError(
        f"the model gives infinite or NaN {what}: the learned values or the base model's weights "
        "are too large"
    )


def names_not_finite(arrays: Any) -> list[str]:
    """Return the paths of the arrays in a pytree that hold infinity or NaN."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _is_finite(leaf)
    ]


def _is_finite(array: Any) -> bool:
    if isinstance(array, jax.Array) and len(array.sharding.device_set) > 1:
        return bool(_all_finite(array))  # this process may not have all of it
    return bool(np.isfinite(array).all())


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def require_finite(arrays: Any, where: str) -> None:
    """Check that all arrays of a pytree are finite.

    Args:
      arrays: the pytree. Arrays of integers are always finite.
      where: the place of the arrays, for the error message.

    Raises:
      NotFiniteError: names the arrays that are not.
    """
    if names := names_not_finite(arrays):
        more = f" and {len(names) - 3} more" if names[3:] else ""
        raise NotFiniteError(f"{where}: infinite or NaN values in {', '.join(names[:3])}{more}")
