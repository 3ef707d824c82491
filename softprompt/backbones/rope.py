"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scalings.

Each scaling method changes only the frequencies and one factor, so a decoder needs nothing
else. Axis letters: B batch, T tokens, h head size.
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
    """The rotary embedding of a layer.

    Attributes:
      frequencies: radians per position, one for each pair of rotated dimensions. If there are
        fewer than h / 2, the last dimensions of each head are not rotated.
      factor: multiplies the rotated queries and keys.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0

    @property
    def identity(self) -> "Rope":
        """A rotary embedding of the same size that rotates nothing."""
        return Rope((0.0,) * len(self.frequencies))


def angles(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines for positions `[B, T]`: float32 `[B, T, 1, len(frequencies)]`."""
    radians = positions[..., None, None].astype(jnp.float32) * np.array(
        rope.frequencies, np.float32
    )
    return jnp.cos(radians) * rope.factor, jnp.sin(radians) * rope.factor


def rotate(heads: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `[B, T, heads, h]` by `angles`. Dimension i pairs with i + len(frequencies)."""
    cosines, sines = (part.astype(heads.dtype) for part in angles)
    half = cosines.shape[-1]
    first, second, rest = jnp.split(heads, [half, 2 * half], axis=-1)
    rotated = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate([*rotated, rest] if rest.size else rotated, axis=-1)


def make_rope(parameters: Mapping[str, Any], head_size: int, context_length: int) -> Rope:
    """Make a `Rope` from the rope parameters of a config.

    The formulas are those in transformers' `modeling_rope_utils.py`.

    Args:
      parameters: has `rope_theta`, and optionally `rope_type`, `partial_rotary_factor` and the
        parameters of a scaling method.
      head_size: h.
      context_length: the context window in tokens.

    Raises:
      UserError: if the scaling method is not supported.
    """
    scaling = parameters.get("rope_type", parameters.get("type", "default"))
    if scaling not in SCALINGS:
        raise UserError(
            f"rope type {scaling!r} is not supported (supported: {', '.join(map(repr, SCALINGS))})"
        )
    theta = float(parameters["rope_theta"])
    rotated = int(head_size * parameters.get("partial_rotary_factor", 1.0))
    if rotated <= 0:
        raise ValueError("a rotary embedding that rotates no dimension")
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
    """Divide low frequencies by a factor, keep high ones, blend in between (Llama 3.1)."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if low >= high:
        raise ValueError(f"low_freq_factor {low} and high_freq_factor {high}")
    original = parameters.get("original_max_position_embeddings", context)
    turns = original * frequencies / (2 * math.pi)  # in the original context window
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / parameters["factor"])


def _yarn(
    frequencies: np.ndarray, theta: float, parameters: Mapping[str, Any], context: int
) -> tuple[np.ndarray, float]:
    """Scale by YaRN (Peng et al. 2023, arXiv:2309.00071): `_llama3` with limits by dimension."""
    original = parameters.get("original_max_position_embeddings", context)
    scale = parameters.get("factor") or context / original
    rotated = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """Return the dimension that makes this many turns in the original context window."""
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    width = (high - low) or 0.001
    kept = 1 - np.clip((np.arange(len(frequencies)) - low) / width, 0, 1)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(scale) + 1 if scale > 1 else 1.0

    factor = parameters.get("attention_factor")
    if factor is None:
        scales = parameters.get("mscale", 0), parameters.get("mscale_all_dim", 0)
        factor = temperature(1)
        if all(scales):
            factor = temperature(scales[0]) / temperature(scales[1])
    return frequencies * (kept + (1 - kept) / scale), factor


def _longrope(
    frequencies: np.ndarray, parameters: Mapping[str, Any], context: int
) -> tuple[np.ndarray, float]:
    """Scale by LongRoPE (Ding et al. 2024, arXiv:2402.13753) within the original context window.

    For longer texts, LongRoPE uses other factors, which would change the keys of tokens already
    read. Models with this scaling therefore keep their original context window (`families.py`).
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
