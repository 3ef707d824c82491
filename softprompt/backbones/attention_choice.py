"""The choice between XLA's attention and flash attention."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from softprompt.backbones.attention import Source, attend, causal_mask
from softprompt.backbones.flash import AttentionName, FlashName, Kernel, flash_attend, kernel_of
from softprompt.errors import UserError, reason_of

ATTENTIONS = ("auto", *get_args(AttentionName))

_PLATFORMS = {"cudnn": ("gpu", "cuda"), "pallas": ("tpu",)}
_DEVICES = {"cudnn": "an NVIDIA GPU", "pallas": "a TPU"}


def choose_attention(requested: str, arch: Any, dtype: str, mesh: Mesh | None) -> AttentionName:
    """Choose the implementation of attention.

    Args:
      requested: `xla`, `cudnn`, `pallas`, or `auto`, which takes a flash kernel if one can be used
        here.
      arch: the architecture of the backbone.
      dtype: the dtype of parameters and activations.
      mesh: the mesh, or None.

    Raises:
      UserError: if `requested` is unknown, or is a kernel that cannot be used here.
    """
    if requested not in ATTENTIONS:
        raise UserError(f"attention {requested!r} is not one of {', '.join(ATTENTIONS)}")
    for name in get_args(FlashName):
        if requested not in (name, "auto"):
            continue
        reason = reason_against(name, arch, dtype, mesh, jax.local_devices()[0])
        reason = reason or compare_with_xla(arch, dtype, kernel_of(name))
        if reason is None:
            return name
        if requested == name:
            raise UserError(f"attention {name}: {reason}; use auto or xla")
    return "xla"


def planned_attention(requested: str, arch: Any, dtype: str, mesh: Mesh) -> AttentionName:
    """Return the attention for a mesh of devices that need not be here.

    Only a run can find out whether `auto` selects a kernel. A plan assumes that it selects XLA.

    Args:
      requested, arch, dtype: as in `choose_attention`.
      mesh: the devices. A mesh of one device counts as none.

    Raises:
      UserError: if a kernel is requested that cannot be used on the devices.
    """
    name = next((name for name in get_args(FlashName) if name == requested), None)
    if name is None:
        return "xla"
    several = mesh if mesh.size > 1 else None
    if reason := reason_against(name, arch, dtype, several, mesh.devices.flat[0]):
        raise UserError(f"attention {name}: {reason}; use auto or xla")
    return name


def reason_against(
    name: FlashName, arch: Any, dtype: str, mesh: Mesh | None, device: jax.Device
) -> str | None:
    """Return why a kernel cannot compute a model's attention, or None if nothing is known.

    Args:
      name, arch, dtype, mesh: as in `choose_attention`.
      device: one of the devices.
    """
    if not hasattr(arch, "attention_softcap"):
        return "it supports only causal models"
    if name == "cudnn" and mesh is not None:
        return "it cannot be divided over a mesh"
    is_right = device.platform in _PLATFORMS[name]
    if name == "cudnn":
        is_right = is_right and "NVIDIA" in device.device_kind.upper()
    if not is_right:
        return f"it needs {_DEVICES[name]}, and the device here is {device.device_kind!r}"
    if name == "cudnn" and arch.attention_softcap is not None:
        return "it does not support the soft-caps of this model"
    if name == "cudnn" and dtype != "bfloat16":
        return f"it needs compute.dtype bfloat16, not {dtype}"
    return None


def compare_with_xla(arch: Any, dtype: str, kernel: Kernel) -> str | None:
    """Compare flash attention with `attend` on small examples: outputs and gradients.

    Args:
      arch: the architecture whose heads and soft-cap are used.
      dtype: the dtype of queries, keys and values.
      kernel: the flash kernel to test.

    Returns:
      What went wrong, or None if the two agree.
    """
    length, virtual = 160, 20  # more than one block of a kernel
    scale, softcap = arch.head_size**-0.5, arch.attention_softcap
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), dtype)

    own = [draw(2, length, arch.num_kv_heads, arch.head_size) for _ in "kv"]
    prefix = [draw(virtual, arch.num_kv_heads, arch.head_size) for _ in "kv"]
    arrays = draw(2, length, arch.num_heads, arch.head_size), *own, *prefix
    positions = jnp.arange(length)[None] + virtual

    def plain(window, queries, keys, values, prefix_keys, prefix_values):
        own = Source(keys, values, causal_mask(positions, positions, window))
        visible = causal_mask(positions, jnp.arange(virtual)[None], window)
        before = Source(prefix_keys[None], prefix_values[None], visible)
        return attend(queries, [own, before], scale=scale, softcap=softcap)

    def flash(window, queries, keys, values, *prefix):
        options = {"scale": scale, "softcap": softcap, "window": window}
        return flash_attend(queries, keys, values, prefix, kernel=kernel, **options)

    def run(form, window):
        @jax.jit
        def outputs_and_gradients(*arrays):
            mixed, pull = jax.vjp(lambda *arrays: form(window, *arrays), *arrays)
            return [mixed, *pull(mixed)]

        return jax.device_get(outputs_and_gradients(*arrays))

    for window in (None, 100):
        try:
            results = list(zip(run(flash, window), run(plain, window), strict=True))
        except Exception as error:  # compiler and driver raise many types
            return f"a test run failed ({reason_of(error)})"
        for ours, theirs in results:
            ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
            if not np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max():
                return "a test run disagreed with XLA"
    return None
