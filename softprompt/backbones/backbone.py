"""The interface of a backbone: what the rest of the package may use of it.

Nothing outside `backbones/` checks which class a backbone is. To add an architecture, write an
NNX module with these members, and build it in `loading.backbone_shapes`.

Axis letters: B batch, T tokens, P virtual tokens, D hidden, L layers, K key-value heads,
h head size, V vocabulary, G packs, M targets of a pack.
"""

from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Mesh

from softprompt.backbones.batch import Batch
from softprompt.backbones.flash import AttentionName
from softprompt.backbones.head import OutputHead
from softprompt.backbones.layers import Embedding

PrefixType = TypeVar("PrefixType")
CacheType = TypeVar("CacheType")


class Backbone(Protocol[PrefixType, CacheType]):
    """A frozen language model as an NNX module.

    `Decoder` (with `Prefix` and `Cache`) and `T5` (with `T5Prefix` and `T5Cache`) satisfy this
    protocol. A prefix holds what the rows of a batch attend to before their own tokens, such as the
    keys and values of a soft prompt. A cache holds the tokens read during generation.
    """

    embedding: Embedding
    """The input embeddings. A method adds virtual tokens and offsets to them."""

    @property
    def arch(self) -> Any:
        """The sizes and options of the network, as a frozen dataclass.

        Every architecture has at least `vocab_size`, `hidden_size`, `context_length`,
        `num_heads` and `tied_head`. The other fields belong to one class of backbone.
        """
        ...

    @property
    def attention(self) -> AttentionName:
        """The implementation that computes attention."""
        ...

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the parameters are divided over; None for one device."""
        ...

    trained: bool
    """Whether the parameters of the layers are trained."""

    @property
    def separate_targets(self) -> bool:
        """Whether a separate decoder reads the targets.

        If so, targets share neither a row nor the context window with the input.
        """
        ...

    @property
    def caches_prompt(self) -> bool:
        """Whether the keys and values of a prompt can be computed once and shared by all rows.

        True for causal models. False for models with an encoder, where what the virtual tokens
        become depends on the rest of the input.
        """
        ...

    @property
    def head_scale(self) -> float:
        """The factor of the output head's rows; T5 scales a head that it ties to the embeddings."""
        ...

    @property
    def auto_class(self) -> str:
        """The name of the class in transformers that loads this kind of model."""
        ...

    @property
    def decoder_start_token(self) -> int | None:
        """The id that every target of a separate decoder starts with; None without one."""
        ...

    def prefix_shape(self, length: int) -> tuple[int, int, int, int]:
        """Return the shape `[L, P, K, h]` of a prefix's keys (and values), with P = `length`."""
        ...

    def prefix_from(self, keys: jax.Array, values: jax.Array) -> PrefixType:
        """Make a prefix from keys and values.

        Args:
          keys: `[L, P, K, h]`, after rotary embedding.
          values: `[L, P, K, h]`.
        """
        ...

    def initial_prefix(self, vectors: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the keys and values from which prefix tuning starts.

        Args:
          vectors: `[P, D]`, embeddings of the initial virtual tokens.
          key: for random initial values.

        Returns:
          Keys and values, float32 `[L, P, K, h]` each.
        """
        ...

    def prefill(self, embeddings: jax.Array, prefix: PrefixType | None = None) -> PrefixType:
        """Make a prefix that has the same effect as these embeddings before every row.

        Args:
          embeddings: `[P, D]`.
          prefix: what comes before them; it becomes the start of the new prefix.
        """
        ...

    def opening(
        self, embeddings: jax.Array, prefix: PrefixType | None = None, spans: Any = None
    ) -> Any:
        """Return a beginning of rows for `target_states`. It has the same effect as `prefill`.

        Args:
          embeddings: `[P, D]`.
          prefix: what comes before them.
          spans: `[1, 2]`, start and end of the embeddings that are not padding; None if all of them
            are not. Only a causal model can have padding here.
        """
        ...

    def target_states(self, batch: Batch, prefix: Any) -> jax.Array:
        """Return the hidden states `[G, M, D]` from which the targets are predicted.

        Args:
          batch: the batch.
          prefix: a prefix, the result of `opening`, or None.
        """
        ...

    @property
    def output_head(self) -> OutputHead:
        """The module that maps hidden states to logits."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states `[..., D]` to float32 logits `[..., V]`."""
        ...

    def start(
        self, tokens: jax.Array, lengths: jax.Array, prefix: PrefixType | None, capacity: int
    ) -> tuple[jax.Array, CacheType]:
        """Read a batch of inputs in preparation for `decode`.

        Args:
          tokens: `[B, T]` ids, padded on the right.
          lengths: `[B]`, the number of tokens in each row that are not padding. Rows without
            tokens only fill up the batch; what is returned for them has no meaning.
          prefix: shared by all rows, or with one entry per row.
          capacity: the number of tokens that can be decoded with the returned cache.

        Returns:
          The hidden states `[B, D]` from which the next tokens are predicted, and the KV cache.
        """
        ...

    def decode(
        self, tokens: jax.Array, cache: CacheType, prefix: PrefixType | None
    ) -> tuple[jax.Array, CacheType]:
        """Read the next token of each row.

        Args:
          tokens: `[B]` ids.
          cache: as returned by `start` or by the previous call.
          prefix: the one given to `start`.

        Returns:
          The same as `start`: hidden states `[B, D]` and the extended cache.
        """
        ...
