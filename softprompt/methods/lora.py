"""LoRA (Hu et al. 2021, arXiv:2106.09685).

Axis letters: L layers, R rank.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import translate

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.backbones.layers import Linear, LowRankAddition
from softprompt.backbones.loading import Backbone
from softprompt.errors import UserError
from softprompt.methods.method import Method, copied


class LoRA(Method):
    """Low-rank additions to weight matrices of the backbone's layers.

    Args:
      matrices: by the path of a `Linear`, `down` `[L, in, R]` and `up` `[L, R, out]`.
      scales: by path, the factor of `down @ up`.
      dropout: share of their inputs that are set to zero while `apply` is given a key.
      opening: see `Method`.
    """

    trainable = nnx.LoRAParam

    def __init__(
        self,
        matrices: Mapping[str, tuple[jax.Array, jax.Array]],
        scales: Mapping[str, float],
        dropout: float = 0.0,
        opening: jax.Array | Sequence[int] = (),
    ):
        super().__init__(opening)
        self.matrices = nnx.Dict(
            {
                path: nnx.Dict(down=nnx.LoRAParam(down), up=nnx.LoRAParam(up))
                for path, (down, up) in matrices.items()
            }
        )
        self.scales, self.dropout = tuple(scales.items()), dropout

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """The backbone with the additions beside its matrices."""
        backbone = copied(backbone)
        linears = matrices_of(backbone)
        for number, (path, scale) in enumerate(self.scales):
            down, up = (self.matrices[path][side][...] for side in ("down", "up"))
            keys = None
            if key is not None and self.dropout:
                keys = jax.random.split(jax.random.fold_in(key, number), len(down))
            linears[path].low_rank = LowRankAddition(down, up, scale, self.dropout, keys)
        return backbone

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """`down` and `up` of every path."""
        return {
            f"{path}.{side}": self.matrices[path][side][...]
            for path, _ in self.scales
            for side in ("down", "up")
        }

    def merge(self, backbone: Backbone) -> Backbone:
        """A backbone of the same function with no additions: new matrices in their place.

        The given one keeps its own, so there is nothing to undo.

        Raises:
          UserError: if its matrices are held as int8.
        """
        backbone = copied(backbone)
        linears = matrices_of(backbone)
        for path, scale in self.scales:
            if linears[path].scale is not None:
                raise UserError("LoRA cannot be merged into int8 matrices; load the base without")
            kernel = linears[path].kernel
            down, up = (self.matrices[path][side][...] for side in ("down", "up"))
            change = scale * jnp.einsum("lir,lro->lio", down, up)
            kernel.set_value((kernel[...].astype(jnp.float32) + change).astype(kernel.dtype))
        return backbone


def matrices_of(backbone: Backbone) -> dict[str, Linear]:
    """The stacked matrices `[L, in, out]` of a backbone's layers, by path."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_graph(backbone)
        if isinstance(module, Linear) and module.kernel.ndim == 3
    }


def find_targets(backbone: Backbone, patterns: Sequence[str]) -> list[str]:
    """Paths of the matrices that patterns such as `attention.query` or `*` name.

    Those of a mixture's experts are not among them, its router is.

    Raises:
      UserError: if a pattern names none.
    """
    paths = sorted(matrices_of(backbone))
    found = []
    for pattern in patterns:
        matches = re.compile(rf"(.+\.)?{translate(pattern)}").fullmatch
        named = [path for path in paths if matches(path)]
        if not named:
            raise UserError(f"lora.targets: {pattern!r} names none of {', '.join(paths)}")
        found += named
    return sorted(set(found))


def first_matrices(
    backbone: Backbone, paths: Sequence[str], rank: int, key: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Matrices to start from: `down` uniform in ±in**-0.5 as in `peft`, `up` zero.

    (Hu et al. draw `down` from a normal distribution.)
    """
    matrices, linears = {}, matrices_of(backbone)
    for path, one in zip(paths, jax.random.split(key, len(paths)), strict=True):
        layers, inputs, outputs = linears[path].kernel.shape
        bound = inputs**-0.5
        down = jax.random.uniform(one, (layers, inputs, rank), minval=-bound, maxval=bound)
        matrices[path] = down, jnp.zeros((layers, rank, outputs))
    return matrices
