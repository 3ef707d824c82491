"""What tells one causal decoder from another, apart from its weights."""

import dataclasses
from typing import Literal

from softprompt.backbones.layers import ACTIVATIONS
from softprompt.backbones.rope import Rope


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may change from layer to layer.

    Attributes:
      rope: its rotary embedding; None in a model that has none at all.
      window: number of positions a token sees, its own included; None: all before it.
    """

    rope: Rope | None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Everything that tells one decoder from another, apart from its weights.

    Defaults are Llama's. A field with its default value is no part of a base model's
    fingerprint, so a new field must have the default of what was so far.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    feed_forward_size: int  # F, of each expert if there are experts
    num_heads: int  # H
    num_kv_heads: int  # K
    head_size: int  # h
    context_length: int  # most tokens the model was made for, virtual tokens included
    norm_epsilon: float
    tied_head: bool
    layers: tuple[LayerKind, ...]  # L of them
    attention_scale: float | None = None  # of the scores; None: h ** -0.5
    attention_softcap: float | None = None
    query_key_norm: Literal["none", "head", "width"] = "none"  # over h, or over all heads at once
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    feed_forward_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_before: bool = True  # attention and feed-forward
    norm_behind: bool = False  # them, before adding back
    parallel: bool = False  # attention and feed-forward read the same input
    learned_positions: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a layer adds
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    normalized_experts: bool = False  # their shares sum to 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, required = getattr(self, field.name), field.default is dataclasses.MISSING
            wrong = field.type in (int, float, bool) and type(value) is not field.type
            if wrong or (required and field.type in (int, float) and value <= 0):
                raise ValueError(f"{field.name} {value!r}")
        rotated = [2 * len(kind.rope.frequencies) for kind in self.layers if kind.rope]
        if self.num_heads % self.num_kv_heads or max(rotated, default=0) > self.head_size:
            raise ValueError("sizes of attention heads that do not fit one another")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"{self.experts_per_token} of {self.num_experts} experts")
        if not self.layers:
            raise ValueError("no layers")
