"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

Axis letters: L layers, R rank.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import translate
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from softprompt.backbones.layers import LowRankAddition
from softprompt.backbones.loading import Backbone, Base, Prefix
from softprompt.backbones.quantization import kind_of
from softprompt.errors import UserError, shortened
from softprompt.experiment.schema import Experiment
from softprompt.experiment.sections import LARGEST_FLOAT32
from softprompt.methods.backbone_arrays import copied, matrices_of
from softprompt.methods.method import Adapter, Axes, Method
from softprompt.methods.peft_layout import stored_modules


class LoRA(Method):
    """Low-rank additions to weight matrices of the backbone's layers.

    Args:
      matrices: by the path of a matrix in the backbone, `down` `[L, in, R]` and `up`
        `[L, R, out]`.
      scales: by path, the factor of `down @ up`.
      dropout: the share of an addition's inputs that are set to zero in training, that is, when
        `apply` is given a key.
      opening: see `Method`.

    Examples:
      >>> base = load_base("smollm2-135m-instruct")
      >>> layers, size, rank = len(base.backbone.arch.layers), base.backbone.arch.hidden_size, 8
      >>> down = 0.01 * jax.random.normal(jax.random.key(0), (layers, size, rank))
      >>> up = jnp.zeros((layers, rank, size))
      >>> path = "layers.attention.query"
      >>> method = LoRA({path: (down, up)}, {path: 2.0})
      >>> method
      LoRA(rank 8, 1 matrices per layer)
      >>> merged = method.merge(base.backbone)
    """

    name: ClassVar[str] = "lora"
    label: ClassVar[str] = "LoRA"
    default_learning_rate: ClassVar[float | None] = 3e-3
    size_settings: ClassVar[Sequence[str]] = ("lora.rank",)
    trainable: ClassVar[Any] = nnx.LoRAParam
    adapter_holds_opening: ClassVar[bool] = False

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

    @classmethod
    def build(
        cls,
        experiment: Experiment,
        base: Base,
        opening: Sequence[int],
        given: Sequence[jax.Array] = (),
    ) -> "LoRA":
        """Start from the matrices of `initial_matrices`, so that all additions are zero."""
        lora, key = experiment.lora, jax.random.key(experiment.seed)
        paths = find_targets(base.backbone, lora.targets)
        matrices = initial_matrices(base.backbone, paths, lora.rank, key)
        return cls(matrices, dict.fromkeys(paths, lora.alpha / lora.rank), lora.dropout, opening)

    def adapt(self, backbone: Backbone, key: jax.Array | None = None) -> Backbone:
        """Return a backbone that computes the additions beside its matrices."""
        backbone = copied(backbone)
        linears = matrices_of(backbone)
        for number, (path, scale) in enumerate(self.scales):
            down, up = self._pair(path)
            keys = None
            if key is not None and self.dropout:
                keys = jax.random.split(jax.random.fold_in(key, number), len(down))
            linears[path].low_rank = LowRankAddition(down, up, scale, self.dropout, keys)
        return backbone

    def merge(self, backbone: Backbone) -> Backbone:
        """Return a backbone of the same function whose new matrices include the additions.

        The given backbone keeps its matrices, so there is nothing to undo.

        Raises:
          UserError: if its matrices are quantized.
        """
        backbone = copied(backbone)
        linears = matrices_of(backbone)
        for path, scale in self.scales:
            if kind := kind_of(linears[path].kernel):
                raise UserError(
                    f"LoRA cannot be merged into {kind} matrices; load the base model without "
                    "quantize"
                )
            kernel, (down, up) = linears[path].kernel, self._pair(path)
            change = scale * jnp.einsum("lir,lro->lio", down, up)
            kernel.set_value((kernel[...].astype(jnp.float32) + change).astype(kernel.dtype))
        return backbone

    def arrays(self, backbone: Backbone) -> dict[str, jax.Array]:
        """Return `<path>.down` and `<path>.up` of every path."""
        return {
            f"{path}.{side}": self.matrices[path][side][...]
            for path, _ in self.scales
            for side in ("down", "up")
        }

    def description(self, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Return the shapes and the scales."""
        return super().description(arrays) | {"scales": dict(self.scales)}

    @classmethod
    def saved_axes(cls, description: Mapping[str, Any], backbone: Backbone) -> Mapping[str, Axes]:
        """Return the axes of `<path>.down` and `<path>.up` of every path in `scales`."""
        scales, linears = description.get("scales"), matrices_of(backbone)
        if not isinstance(scales, dict) or not all(map(_is_float32, scales.values())):
            raise ValueError(f"scales: must be float32 numbers by path, not {shortened(scales)}")
        axes: dict[str, Axes] = {}
        for path in scales:
            if path not in linears:
                raise ValueError(f"scales: the base model has no matrix {shortened(path)}")
            layers, inputs, outputs = linears[path].shape
            rank = f"R of {path}"
            axes |= {f"{path}.down": (layers, inputs, rank), f"{path}.up": (layers, rank, outputs)}
        return axes

    @classmethod
    def load(
        cls,
        arrays: Mapping[str, jax.Array],
        description: Mapping[str, Any],
        opening: jax.Array | Sequence[int],
    ) -> "LoRA":
        """Make the additions from the arrays and the key `scales` of the description."""
        scales = description["scales"]
        matrices = {path: (arrays[f"{path}.down"], arrays[f"{path}.up"]) for path in scales}
        return cls(matrices, scales, opening=opening)

    def merge_into(self, backbone: Backbone, adapted: Backbone) -> tuple[Backbone, np.ndarray]:
        """Return the merged backbone and no vectors."""
        return self.merge(backbone), np.zeros((0, backbone.arch.hidden_size), np.float32)

    def peft_adapter(self, base: Base, prefix: Prefix | None) -> Adapter:
        """Return a LORA adapter.

        A PyTorch module may hold several matrices, such as those of queries, keys and values.
        Their additions then share one A, whose rank is the sum of their ranks, and B has a block
        for each.
        """
        arrays, ranks, alphas = {}, {}, {}
        scales = dict(self.scales)
        transposed = False
        modules, linears = stored_modules(base), matrices_of(base.backbone)
        for name, (entry, paths) in modules.items():
            learned = [path for path in paths if path in scales]
            if not learned:
                continue
            matrices = {path: tuple(map(np.asarray, self._pair(path))) for path in learned}
            transposed |= entry.transposed
            sizes = [matrices[path][0].shape[-1] for path in learned]
            ends = np.cumsum(sizes)
            for layer in range(len(matrices[learned[0]][0])):
                down = np.concatenate([matrices[path][0][layer].T for path in learned])  # [R, in]
                outputs = [linears[path].shape[-1] for path in paths]
                parts = [np.zeros((size, ends[-1]), np.float32) for size in outputs]
                for path, size, end in zip(learned, sizes, ends, strict=True):
                    factor = np.float32(scales[path] / scales[learned[0]])
                    block = matrices[path][1][layer].T * factor
                    parts[paths.index(path)][:, end - size : end] = block
                module = name.format(layer=layer)
                up = entry.form.join(tuple(parts), base.backbone.arch)  # [out, R]
                arrays[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(down)
                arrays[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(up)
                ranks[module] = int(ends[-1])
                alphas[module] = float(scales[learned[0]] * ends[-1])
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return arrays, {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
            "target_modules": _target_modules(list(ranks), modules),
            "fan_in_fan_out": transposed,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
        }

    def _pair(self, path: str) -> tuple[jax.Array, jax.Array]:
        pair = self.matrices[path]
        return pair["down"][...], pair["up"][...]

    def __repr__(self) -> str:
        ranks = sorted({self.matrices[path]["down"].shape[-1] for path, _ in self.scales})
        listed = ", ".join(map(str, ranks))
        return f"LoRA(rank {listed}, {len(self.scales)} matrices per layer)"


def _is_float32(value: Any) -> bool:
    """Whether a value from a file is a number in the range of float32."""
    return type(value) in (int, float) and abs(value) <= LARGEST_FLOAT32


def find_targets(backbone: Backbone, patterns: Sequence[str]) -> list[str]:
    """Return the paths of the matrices that match patterns such as `attention.query` or `*`.

    The router of a mixture of experts can match; the experts themselves cannot.

    Raises:
      UserError: if a pattern matches nothing.
    """
    paths = sorted(matrices_of(backbone))
    found = []
    for pattern in patterns:
        matches = re.compile(rf"(.+\.)?{translate(pattern)}").fullmatch
        named = [path for path in paths if matches(path)]
        if not named:
            raise UserError(f"lora.targets: {pattern!r} matches none of {', '.join(paths)}")
        found += named
    return sorted(set(found))


def initial_matrices(
    backbone: Backbone, paths: Sequence[str], rank: int, key: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the matrices that training starts from.

    `down` is uniform in ±in**-0.5, as in `peft` (Hu et al. use a normal distribution). `up` is
    zero.

    Args:
      backbone: the frozen one.
      paths: of its matrices, as returned by `find_targets`.
      rank: R.
      key: for `down`.

    Returns:
      By path, `down` `[L, in, R]` and `up` `[L, R, out]`.
    """
    matrices, linears = {}, matrices_of(backbone)
    for path, one in zip(paths, jax.random.split(key, len(paths)), strict=True):
        layers, inputs, outputs = linears[path].shape
        bound = inputs**-0.5
        down = jax.random.uniform(one, (layers, inputs, rank), minval=-bound, maxval=bound)
        matrices[path] = down, jnp.zeros((layers, rank, outputs))
    return matrices


def _target_modules(names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
    """Return the names after the layer number, or the whole names if that is ambiguous."""

    def ending(template: str) -> str:
        return template.rpartition("{layer}.")[2]

    endings = {ending(t) for t in modules if t.format(layer=0) in names}
    meant = [t for t in modules if ending(t) in endings]
    if all(t.format(layer=0) in names for t in meant):
        return sorted(endings)
    return sorted(names)
