"""Floating-point operations of a training step, and the rate of matrix products.

Each multiplication and addition of a matrix product counts as two operations. The weights of the
model are frozen, so their backward pass needs the gradients of inputs only: as many operations as
the forward pass. Attention needs twice as many backward as forward.

Axis letters: T tokens of a row, S keys before a row, M targets, P tokens of the opening, D hidden,
H query heads, h head size, R rank.
"""

import dataclasses
import statistics

_PASSES = 3  # products of each shape in one measurement of the rate


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes of a Llama. `matrices` has the matrices of a layer as `(inputs, outputs)`."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int

    @classmethod
    def of(cls, config):
        """Read the sizes from a `config.json`."""
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
            heads,
            config["num_key_value_heads"],
            config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
        )

    @property
    def query(self):
        """The size of the query matrix, and of the output projection."""
        return self.hidden, self.heads * self.head

    @property
    def value(self):
        """The size of the value matrix, and of the key matrix."""
        return self.hidden, self.kv_heads * self.head

    @property
    def matrices(self):
        """All matrices of a layer."""
        gate = self.hidden, self.inner
        return [self.query, self.value, self.value, self.query[::-1], gate, gate, gate[::-1]]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step reads.

    Attributes:
      method: `prompt`, `prefix` or `lora`.
      virtual: the number of virtual tokens; 0 for LoRA.
      rank: R of LoRA.
      opening: the number of tokens of text that every row begins with.
      rows: for each row its tokens after the opening, and its targets.
    """

    method: str
    virtual: int
    rank: int
    opening: int
    rows: list[tuple[int, int]]


def required(shapes, step):
    """Return the operations that a step cannot do without.

    The opening and the virtual tokens run once, and no row has padding. In the last layer, only
    targets need queries, the output projection and the feed-forward layer. Other tokens need keys
    and values there.
    """
    first = step.opening + (step.virtual if step.method == "prompt" else 0)  # run once
    before = step.opening + step.virtual  # S
    tokens = first + sum(length for length, _ in step.rows)
    targets = sum(count for _, count in step.rows)
    layer, keys_values = _size(shapes.matrices), 2 * _size([shapes.value])
    weights = (shapes.layers - 1) * tokens * layer
    weights += tokens * keys_values + targets * (layer - keys_values)
    weights += targets * shapes.hidden * shapes.vocabulary
    pairs = _causal(first, before - first) + sum(_causal(t, before) for t, _ in step.rows)
    last = sum(m * (before + t) - m * (m - 1) // 2 for t, m in step.rows)
    attention = (shapes.layers - 1) * pairs + last
    queries = (shapes.layers - 1) * tokens + targets
    more = _low_rank(shapes, step, queries, shapes.layers * tokens)
    return _total(shapes, weights, attention) + more


def prepended(shapes, step):
    """Return the operations of `peft`, which puts the virtual tokens in front of every row.

    Rows are padded to the longest, which includes the last target, and every position has logits.
    """
    length = step.opening + max(length for length, _ in step.rows) + 1
    keys = length + step.virtual
    read = len(step.rows) * (keys if step.method == "prompt" else length)
    weights = read * (shapes.layers * _size(shapes.matrices) + shapes.hidden * shapes.vocabulary)
    passes = shapes.layers * read
    return _total(shapes, weights, passes * keys) + _low_rank(shapes, step, passes, passes)


def _total(shapes, weights, pairs):
    return 4 * weights + 12 * pairs * shapes.heads * shapes.head


def _low_rank(shapes, step, queries, values):
    """LoRA of so many queries and values; its matrices need gradients of their own."""
    if step.method != "lora":
        return 0
    return 6 * step.rank * (queries * sum(shapes.query) + values * sum(shapes.value))


def _causal(tokens, before):
    """Count pairs of a query and a key."""
    return tokens * (tokens + 1) // 2 + tokens * before


def _size(matrices):
    return sum(inputs * outputs for inputs, outputs in matrices)


def measure_rate(make, forward, backward, wait, clock, shapes, rows):
    """Measure matrix products of the shapes of a model's layer, and return operations per second.

    Args:
      make: returns a random matrix of a size.
      forward: multiplies a matrix by another one.
      backward: the same with the transpose of the second one.
      wait: waits for a list of results. An accelerator works on while products are added.
      clock: returns seconds.
      shapes: the sizes of the model.
      rows: of the left matrices.
    """
    operands = [(make(rows, i), make(rows, o), make(i, o)) for i, o in sorted({*shapes.matrices})]

    def run():
        began, results = clock(), []
        for inputs, gradients, matrix in operands * _PASSES:
            results += forward(inputs, matrix), backward(gradients, matrix)
        wait(results)
        return clock() - began

    run()
    operations = 4 * rows * _size({*shapes.matrices}) * _PASSES
    return operations / statistics.median(run() for _ in range(3))
