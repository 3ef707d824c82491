"""The architecture of a causal decoder: its sizes and options, without weights."""

import dataclasses
import math
from typing import Literal

from softprompt.backbones.layers import ACTIVATIONS
from softprompt.backbones.rope import Rope


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The options that can differ between the layers of one model.

    Attributes:
      rope: the rotary embedding; None if no layer of the model has one.
      window: the number of positions a token attends to, including its own; None for all.
    """

    rope: Rope | None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes and options of a causal decoder.

    The defaults are those of Llama. A field that has its default value is not part of a base
    model's fingerprint. The default of a new field must therefore describe all earlier models.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    feed_forward_size: int  # F, of each expert if there are experts
    num_heads: int  # H
    num_kv_heads: int  # K
    head_size: int  # h
    context_length: int  # the context window in tokens, including virtual tokens
    norm_epsilon: float
    tied_head: bool
    layers: tuple[LayerKind, ...]  # L of them
    attention_scale: float | None = None  # factor of the scores; None: h ** -0.5
    attention_softcap: float | None = None
    query_key_norm: Literal["none", "head", "width"] = "none"  # each head, or all together
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    feed_forward_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_before: bool = True  # the attention and the feed-forward layer
    norm_behind: bool = False  # after each of the two, before the residual addition
    parallel: bool = False  # attention and feed-forward layer read the same input
    learned_positions: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # factor of what each layer adds to the residual stream
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    normalized_experts: bool = False  # the weights of a token's experts sum to 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, required = getattr(self, field.name), field.default is dataclasses.MISSING
            wrong = field.type in (int, float, bool) and type(value) is not field.type
            if type(value) in (int, float):
                may_be_zero = field.type is int and not required
                wrong = wrong or not (0 < value < math.inf or (may_be_zero and value == 0))
            if wrong:
                raise ValueError(f"{field.name} {value!r}")
        rotated = [2 * len(kind.rope.frequencies) for kind in self.layers if kind.rope]
        if self.num_heads % self.num_kv_heads or max(rotated, default=0) > self.head_size:
            raise ValueError("sizes of attention heads do not match")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}")
        if not bool(self.num_experts) <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"{self.experts_per_token} of {self.num_experts} experts")
        if not self.layers:
            raise ValueError("no layers")
        if len({kind.rope and len(kind.rope.frequencies) for kind in self.layers}) > 1:
            raise ValueError("rotary embeddings of different sizes")
        for kind in set(self.layers):
            if kind.window is not None and kind.window <= 0:
                raise ValueError(f"a window of {kind.window} tokens")
            if kind.rope and not all(
                map(math.isfinite, (*kind.rope.frequencies, kind.rope.factor))
            ):
                raise ValueError("a rotary embedding that is not finite")
