"""cuDNN's flash attention on NVIDIA GPUs, and the choice between it and plain XLA.

It serves rows of one sequence each, as all training batches are. Unlike plain attention
it wants queries, keys and values in one piece: the prefix's keys are copied for each row,
and a dummy query stands for each, so that its own causal mask and window fit. Beside the
scores that it never writes to memory, that is little.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.backbones.attention import Source, attend, causal_mask
from softprompt.errors import UserError

ATTENTIONS = ("auto", "xla", "cudnn")


def flash_attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Causal attention of rows `[B, T, H, h]` to themselves, and to a prefix if there is one.

    Args:
      queries: `[B, T, H, h]`.
      keys, values: `[B, T, K, h]`.
      prefix: keys and values `[P, K, h]` that stand in front of every row.
      scale: factor of the scores.
      window: number of positions a query sees, its own included; None: all before it.
      implementation: of `jax.nn.dot_product_attention`.

    Returns:
      `[B, T, H, h]`.
    """
    virtual = 0
    if prefix is not None:
        virtual, rows = len(prefix[0]), len(keys)
        queries = jnp.pad(queries, [(0, 0), (virtual, 0), (0, 0), (0, 0)])
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(before, (rows, *before.shape)), own], axis=1)
            for before, own in zip(prefix, (keys, values), strict=True)
        )
    mixed = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return mixed[:, virtual:]


def choose_attention(asked: str, arch, dtype: str) -> Literal["xla", "cudnn"]:
    """`xla` or `cudnn`, for `asked` of `ATTENTIONS`.

    cuDNN is taken where it is asked for or `auto`, and a trial run of it agrees with XLA.

    Raises:
      UserError: if cuDNN is asked for and cannot be had, or `asked` is neither.
    """
    if asked not in ATTENTIONS:
        raise UserError(f"attention {asked!r} is not one of {', '.join(ATTENTIONS)}")
    if asked == "xla":
        return "xla"
    hindrance = _hindrance(arch, dtype)
    if hindrance and asked == "cudnn":
        raise UserError(f"attention cudnn: {hindrance}; use auto or xla")
    return "xla" if hindrance else "cudnn"


def _hindrance(arch, dtype: str) -> str | None:
    """Why cuDNN's attention cannot be used, or None if it can."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind.upper():
        return f"it needs an NVIDIA GPU, and the device here is {device.device_kind!r}"
    if not hasattr(arch, "attention_softcap"):
        return "it is for causal models"
    if arch.attention_softcap is not None:
        return "it knows no soft-caps, which this model has"
    if dtype != "bfloat16":
        return f"it needs compute.dtype bfloat16, not {dtype}"
    return trial(arch, "cudnn")


def trial(arch, implementation: Literal["cudnn", "xla"]) -> str | None:
    """Run attention of an architecture's sizes forward and backward, and compare with `attend`.

    Returns:
      What went wrong, or None.
    """
    scale, window = arch.head_size**-0.5, 24
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    own = [draw(2, 32, arch.num_kv_heads, arch.head_size) for _ in range(2)]
    arrays = draw(2, 32, arch.num_heads, arch.head_size), *own
    prefix = draw(16, *own[0].shape[2:]), draw(16, *own[0].shape[2:])
    places = jnp.arange(32)[None] + 16

    def plain(queries, keys, values):
        own = Source(keys, values, causal_mask(places, places, window))
        before = Source(*prefix, visible=causal_mask(places, jnp.arange(16)[None], window))
        return attend(queries, [own, before], scale=scale)

    def flash(queries, keys, values):
        arguments = {"scale": scale, "window": window, "implementation": implementation}
        return flash_attend(queries, keys, values, prefix, **arguments)

    def run(form):
        mixed, pull = jax.vjp(form, *arrays)
        return jax.device_get([mixed, *pull(mixed)])

    try:
        results = list(zip(run(flash), run(plain), strict=True))
    except Exception as error:  # of whatever the compiler or the driver does not like
        return f"a trial run failed ({str(error).splitlines()[0]})"
    for ours, theirs in results:
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
        if not np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max():
            return "a trial run disagreed with XLA"
    return None
