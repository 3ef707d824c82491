"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scalings.

Every scaling comes down to other frequencies and a factor, so that is all a decoder
knows. Axis letters: B batch, T tokens, h head size.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.errors import UserError

SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer.

    Attributes:
      frequencies: radians a position, one for each pair of rotated dimensions. Fewer
        than h / 2 leave the last dimensions of a head as they are; 0 rotates nothing.
      factor: of the rotated queries and keys.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0

    @property
    def still(self) -> "Rope":
        """The same sizes, but nothing rotated."""
        return Rope((0.0,) * len(self.frequencies))


def angles(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for positions `[B, T]`, each float32 `[B, T, 1, len(frequencies)]`."""
    turned = positions[..., None, None].astype(jnp.float32) * np.array(rope.frequencies, np.float32)
    return jnp.cos(turned) * rope.factor, jnp.sin(turned) * rope.factor


def rotate(heads: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn `[B, T, heads, h]` by `angles`; dimension i pairs with i + len(frequencies)."""
    cosines, sines = (part.astype(heads.dtype) for part in angles)
    half = cosines.shape[-1]
    first, second, rest = jnp.split(heads, [half, 2 * half], axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate([*turned, rest] if rest.size else turned, axis=-1)


def make_rope(parameters: Mapping[str, Any], head_size: int, context_length: int) -> Rope:
    """A `Rope` from a config's rope parameters.

    Args:
      parameters: with `rope_theta`, and as the case may be `rope_type`,
        `partial_rotary_factor` and the parameters of a scaling. The formulas are those of
        transformers' `modeling_rope_utils.py`.
      head_size: h.
      context_length: most tokens the model takes.

    Raises:
      UserError: for a scaling that is not supported.
    """
    scaling = parameters.get("rope_type", parameters.get("type", "default"))
    if scaling not in SCALINGS:
        raise UserError(
            f"rope type {scaling!r} is not supported (supported: {', '.join(map(repr, SCALINGS))})"
        )
    theta = float(parameters["rope_theta"])
    rotated = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    frequencies = theta ** (-np.arange(0, rotated, 2) / rotated)
    factor = 1.0
    if scaling == "linear":
        frequencies = frequencies / parameters["factor"]
    elif scaling == "llama3":
        frequencies = _llama3(frequencies, parameters, context_length)
    elif scaling == "yarn":
        frequencies, factor = _yarn(frequencies, theta, parameters, context_length)
    elif scaling == "longrope":
        frequencies, factor = _longrope(frequencies, parameters, context_length)
    return Rope(tuple(frequencies.tolist()), float(factor))


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any], context: int) -> np.ndarray:
    """Low frequencies divided by a factor, high ones kept, a blend between (Llama 3.1)."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters.get("original_max_position_embeddings", context)
    turns = original * frequencies / (2 * math.pi)  # in the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / parameters["factor"])


def _yarn(
    frequencies: np.ndarray, theta: float, parameters: Mapping[str, Any], context: int
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): as llama3, by dimension instead of turns."""
    original = parameters.get("original_max_position_embeddings", context)
    scale = parameters.get("factor") or context / original
    rotated = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns in the original context."""
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    width = (high - low) or 0.001
    kept = 1 - np.clip((np.arange(len(frequencies)) - low) / width, 0, 1)

    def temperature(by: float) -> float:
        return 0.1 * by * math.log(scale) + 1 if scale > 1 else 1.0

    factor = parameters.get("attention_factor")
    if factor is None:
        one, other = parameters.get("mscale", 0), parameters.get("mscale_all_dim", 0)
        factor = temperature(one) / temperature(other) if one and other else temperature(1)
    return frequencies * (kept + (1 - kept) / scale), factor


def _longrope(
    frequencies: np.ndarray, parameters: Mapping[str, Any], context: int
) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753) within the original context.

    Its long factors, for texts beyond, would change the keys of what came before, so a
    model with this scaling is offered with its original context (see `families.py`).
    """
    original = parameters["original_max_position_embeddings"]
    scale = parameters.get("factor") or context / original
    factor = parameters.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    short = np.array(parameters["short_factor"], np.float64)
    if short.shape != frequencies.shape:
        raise ValueError(f"{len(short)} short factors for {len(frequencies)} frequencies")
    return frequencies / short, factor
