"""Flash attention by cuDNN on NVIDIA GPUs, and the choice between it and XLA.

Flash attention is used for batches in which each row is a single sequence, as in all training
batches. cuDNN needs all keys of a row in one array, and its causal mask and window assume one
query per key. Therefore the keys of the prefix are copied for each row, with one dummy query for
each key. The copies take far less memory than the attention scores, which are never stored.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from softprompt.backbones.attention import Source, attend, causal_mask
from softprompt.errors import UserError, reason_of

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
    """Compute causal attention of each row to itself and to a prefix.

    Args:
      queries: `[B, T, H, h]`.
      keys, values: `[B, T, K, h]`.
      prefix: keys and values `[P, K, h]` shared by all rows, or None.
      scale: the factor of the scores.
      window: the number of positions a query attends to, including its own; None for all.
      implementation: the one that `jax.nn.dot_product_attention` uses.

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


def choose_attention(
    requested: str, arch, dtype: str, mesh: Mesh | None
) -> Literal["xla", "cudnn"]:
    """Choose the implementation of attention.

    Args:
      requested: `xla`, `cudnn`, or `auto`, which takes cuDNN if it can be used here.
      arch: the architecture of the backbone.
      dtype: the dtype of parameters and activations.
      mesh: the mesh, or None.

    Raises:
      UserError: if `requested` is unknown, or is `cudnn` and cuDNN cannot be used here.
    """
    if requested not in ATTENTIONS:
        raise UserError(f"attention {requested!r} is not one of {', '.join(ATTENTIONS)}")
    if requested == "xla":
        return "xla"
    reason = _reason_against_cudnn(arch, dtype, mesh)
    if reason and requested == "cudnn":
        raise UserError(f"attention cudnn: {reason}; use auto or xla")
    return "xla" if reason else "cudnn"


def _reason_against_cudnn(arch, dtype: str, mesh: Mesh | None) -> str | None:
    """Return why cuDNN's attention cannot be used, or None if it can."""
    if mesh is not None:
        return "it cannot be divided over a mesh"
    device = jax.devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind.upper():
        return f"it needs an NVIDIA GPU, and the device here is {device.device_kind!r}"
    if not hasattr(arch, "attention_softcap"):
        return "it supports only causal models"
    if arch.attention_softcap is not None:
        return "it does not support the soft-caps of this model"
    if dtype != "bfloat16":
        return f"it needs compute.dtype bfloat16, not {dtype}"
    return compare_with_xla(arch, "cudnn")


def compare_with_xla(arch, implementation: Literal["cudnn", "xla"]) -> str | None:
    """Compare outputs and gradients of `flash_attend` with those of `attend` on a small example.

    Args:
      arch: the architecture whose head sizes are used.
      implementation: the implementation of `flash_attend` to test.

    Returns:
      What went wrong, or None if the two agree.
    """
    scale, window = arch.head_size**-0.5, 24
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    own = [draw(2, 32, arch.num_kv_heads, arch.head_size) for _ in range(2)]
    arrays = draw(2, 32, arch.num_heads, arch.head_size), *own
    prefix = draw(16, *own[0].shape[2:]), draw(16, *own[0].shape[2:])
    positions = jnp.arange(32)[None] + 16

    def plain(queries, keys, values):
        own = Source(keys, values, causal_mask(positions, positions, window))
        before = Source(*prefix, visible=causal_mask(positions, jnp.arange(16)[None], window))
        return attend(queries, [own, before], scale=scale)

    def flash(queries, keys, values):
        arguments = {"scale": scale, "window": window, "implementation": implementation}
        return flash_attend(queries, keys, values, prefix, **arguments)

    def run(form):
        @jax.jit
        def outputs_and_gradients(*arrays):
            mixed, pull = jax.vjp(form, *arrays)
            return [mixed, *pull(mixed)]

        return jax.device_get(outputs_and_gradients(*arrays))

    try:
        results = list(zip(run(flash), run(plain), strict=True))
    except Exception as error:  # compiler and driver raise many types
        return f"a test run failed ({reason_of(error)})"
    for ours, theirs in results:
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
        if not np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max():
            return "a test run disagreed with XLA"
    return None
