"""The functions of a decoder's layers: the tokens that they read, and what these attend to.

Axis letters: D hidden, H query heads, K key-value heads, h head size, L layers, G packs,
N tokens of a pack, M tokens to compute outputs for, P virtual tokens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from softprompt.backbones.architecture import Architecture, LayerKind
from softprompt.backbones.attention import Source, attend
from softprompt.backbones.flash import Kernel, flash_attend
from softprompt.backbones.rope import angles
from softprompt.backbones.tokens import Take, Tokens, same
from softprompt.parallel.mesh import ROWS, divide
from softprompt.parallel.sharding import gather_layer

Layer = Callable[[jax.Array, Any], tuple[jax.Array, tuple[jax.Array, jax.Array]]]
KeysValues = tuple[jax.Array, jax.Array]


class LayerFunctions:
    """Makes the functions of layers that read the same tokens. All layers run in one scan.

    Args:
      arch: the architecture.
      mesh: the devices that the parameters are divided over; None for one device.
      positions: of all tokens that a layer reads, including those before the rows.
      groups: by name, the tokens that can be attended to. "row" are the rows' own tokens.
      kernel: computes attention of all tokens; None for XLA.
    """

    def __init__(
        self,
        arch: Architecture,
        mesh: Mesh | None,
        positions: jax.Array,
        groups: Mapping[str, Tokens],
        kernel: Kernel | None,
    ):
        self._mesh, self._groups, self._kernel = mesh, groups, kernel
        self._scores: dict[str, Any] = {
            "scale": arch.attention_scale or arch.head_size**-0.5,
            "softcap": arch.attention_softcap,
        }
        self._kinds = kinds_of(arch)
        self._rotary = self._by_kind(lambda kind: kind.rope and angles(kind.rope, positions))

    def function_for(self, *queries: Tokens, select: Take = same) -> Layer:
        """Return the function that computes the outputs of a layer for some tokens.

        It takes hidden states `[G, P + N, D]`, and the block, the number of the kind and the stored
        keys and values of the layer. It returns hidden states `[G, M, D]`, and the keys and values
        of the tokens that the layer reads.

        Args:
          queries: the groups of these tokens.
          select: takes these tokens from all that the layer reads.
        """
        masks_by_kind = [self._by_kind(partial(self._masks, queries=group)) for group in queries]

        def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, KeysValues]:
            block, kind, stored = inputs
            block, x = gather_layer(block, self._mesh), divide(x, self._mesh, ROWS)
            rotary, masks = jax.tree.map(lambda a: a[kind], (self._rotary, masks_by_kind))

            def attention(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
                own = {
                    name: (group.to_rows(keys), group.to_rows(values))
                    for name, group in self._groups.items()
                    if name not in stored
                }
                if self._kernel is not None and select is same:
                    (group,) = queries
                    return self._with_kernel(self._kernel, q, group, kind, own["row"], stored)
                outputs = [
                    self._with_xla(q, group, visible, own | stored)
                    for group, visible in zip(queries, masks, strict=True)
                ]
                return jnp.concatenate(outputs, axis=1)

            return block(x, rotary, attention, select)

        return layer

    def _by_kind(self, function: Callable[[LayerKind], Any]) -> Any:
        """Stack the results of a function for each kind of layer."""
        return jax.tree.map(lambda *each: jnp.stack(each), *map(function, self._kinds))

    def _masks(self, kind: LayerKind, queries: Tokens) -> dict[str, jax.Array | None]:
        """Return a mask of the tokens of each group that the queries attend to; None for all."""
        has_windows = any(kind.window for kind in self._kinds)
        return {
            name: None
            if keys.is_whole and keys is not queries and not has_windows
            else queries.mask(keys, kind.window)
            for name, keys in self._groups.items()
            if name != "row" or queries is not self._groups.get("opening")
        }

    def _with_kernel(
        self,
        kernel: Kernel,
        q: jax.Array,
        group: Tokens,
        kind: jax.Array,
        own: KeysValues,
        stored: Mapping[str, KeysValues],
    ) -> jax.Array:
        """Compute attention of all rows with a kernel of flash attention."""
        flash = partial(flash_attend, kernel=kernel, **self._scores)
        forms = [partial(flash, window=k.window, mesh=self._mesh) for k in self._kinds]
        shared = jax.tree.map(lambda array: array[0], stored.get("prefix"))
        mixed = jax.lax.switch(kind, forms, group.to_rows(q), *own, shared)
        return group.from_rows(mixed)

    def _with_xla(
        self,
        q: jax.Array,
        group: Tokens,
        visible: Mapping[str, jax.Array | None],
        arrays: Mapping[str, KeysValues],
    ) -> jax.Array:
        """Compute attention of a group of tokens to all groups that it attends to."""
        sources = [Source(*arrays[name], mask) for name, mask in visible.items()]
        return group.from_rows(attend(group.to_rows(q), sources, **self._scores))


def kinds_of(arch: Architecture) -> list[LayerKind]:
    """Return the different kinds of layers."""
    return list(dict.fromkeys(arch.layers))
