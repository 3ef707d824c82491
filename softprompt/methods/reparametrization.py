"""Reparametrizations: modules that compute the vectors of a soft prompt during training.

They are trained in place of the vectors `[P, D]`. Calling one returns the vectors, float32, and
only these are saved. Every trained array is a `PromptParam`.

Axis letters: P virtual tokens, D hidden, R rank, H hidden size of the network, I inputs and
O outputs of a layer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.errors import UserError
from softprompt.experiment.schema import PromptSettings
from softprompt.methods.method import PromptParam
from softprompt.methods.multitask import MultiTask

# Used if the experiment gives no `prompt.size`; docs/methods.md names their sources.
_DEFAULT_SIZES = {"mlp": 128, "lstm": 128, "residual": 800, "low_rank": 10}


def reparametrize(
    settings: PromptSettings, vectors: jax.Array, key: jax.Array
) -> Callable[[], jax.Array]:
    """Return the module that `prompt.reparametrization` asks for.

    Args:
      settings: the section `prompt` of an experiment.
      vectors: `[P, D]`, float32, the initial vectors.
      key: for the random weights of networks.

    Raises:
      UserError: if the rank is larger than P or D.
    """
    name = settings.reparametrization
    assert name is not None
    if name == "multitask":
        assert settings.tasks is not None
        return MultiTask(vectors, len(settings.tasks))
    size = settings.size or _DEFAULT_SIZES[name]
    if name == "low_rank":
        largest = min(vectors.shape)
        if settings.size and settings.size > largest:
            raise UserError(f"prompt.size {settings.size}: the rank can be at most {largest}")
        return LowRank(vectors, min(size, largest))
    networks = {"mlp": MLP, "lstm": LSTM, "residual": Residual}
    return networks[name](vectors, size, key)


class MLP(nnx.Module):
    """P-tuning with an MLP (Liu et al. 2021, arXiv:2103.10385), with the layers of peft's encoder.

    `Linear(ReLU(Linear(ReLU(Linear(inputs)))))`, applied to each virtual token. There is no skip
    connection, so the initial output is not the initial vectors.

    Args:
      vectors: `[P, D]`, float32, the initial inputs of the network. They are trained too.
      hidden_size: H.
      key: for the random weights.
    """

    def __init__(self, vectors: jax.Array, hidden_size: int, key: jax.Array):
        size, keys = vectors.shape[1], jax.random.split(key, 3)
        self.inputs = PromptParam(vectors)
        self.first = _Linear(size, hidden_size, keys[0])
        self.second = _Linear(hidden_size, hidden_size, keys[1])
        self.third = _Linear(hidden_size, size, keys[2])

    def __call__(self) -> jax.Array:
        """Return the vectors `[P, D]`."""
        hidden = jax.nn.relu(self.first(self.inputs[...]))
        return self.third(jax.nn.relu(self.second(hidden)))


class LSTM(nnx.Module):
    """P-tuning with an LSTM (Liu et al. 2021, arXiv:2103.10385), with the layers of peft's encoder.

    `Linear(ReLU(Linear(BiLSTM(inputs))))`. The LSTM has one layer (two by default in peft) and
    reads the virtual tokens in both directions. There is no skip connection, so the initial output
    is not the initial vectors.

    Args:
      vectors: `[P, D]`, float32, the initial inputs of the network. They are trained too.
      hidden_size: H of each direction; the layer after them has 2 H.
      key: for the random weights.
    """

    def __init__(self, vectors: jax.Array, hidden_size: int, key: jax.Array):
        size, keys = vectors.shape[1], jax.random.split(key, 4)
        self.inputs = PromptParam(vectors)
        self.forward = _Recurrence(size, hidden_size, keys[0])
        self.backward = _Recurrence(size, hidden_size, keys[1])
        self.first = _Linear(2 * hidden_size, 2 * hidden_size, keys[2])
        self.second = _Linear(2 * hidden_size, size, keys[3])

    def __call__(self) -> jax.Array:
        """Return the vectors `[P, D]`."""
        inputs = self.inputs[...]
        both = [self.forward(inputs), self.backward(inputs, reverse=True)]
        return self.second(jax.nn.relu(self.first(jnp.concatenate(both, axis=1))))


class Residual(nnx.Module):
    """Residual prompt tuning (Razdaibiedina et al. 2023, arXiv:2305.03937).

    `inputs + LayerNorm(Linear(ReLU(Linear(inputs))))`, one network for all virtual tokens. This is
    section 3 of the paper, with the norm after the second layer, as in the authors' code.

    The scale of the norm starts at zero, so that the initial output is the initial vectors. If it
    started at one, as usual, noise of unit variance would hide small embeddings. The two layers
    therefore change only from the second step on.

    Args:
      vectors: `[P, D]`, float32, the initial output.
      hidden_size: H, the size of the bottleneck.
      key: for the random weights.
    """

    def __init__(self, vectors: jax.Array, hidden_size: int, key: jax.Array):
        size, keys = vectors.shape[1], jax.random.split(key)
        self.inputs = PromptParam(vectors)
        self.down = _Linear(size, hidden_size, keys[0])
        self.up = _Linear(hidden_size, size, keys[1])
        self.scale, self.bias = PromptParam(jnp.zeros(size)), PromptParam(jnp.zeros(size))

    def __call__(self) -> jax.Array:
        """Return the vectors `[P, D]`."""
        inputs = self.inputs[...]
        x = self.up(jax.nn.relu(self.down(inputs)))
        x = x - x.mean(axis=1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-5)
        return inputs + x * self.scale[...] + self.bias[...]


class LowRank(nnx.Module):
    """Vectors of low rank, `left @ right` (Xiao et al. 2023, arXiv:2310.10094).

    The initial output is the best approximation of the vectors at that rank, their truncated
    singular value decomposition. (In the authors' code, both factors start at random values.)

    Args:
      vectors: `[P, D]`, float32.
      rank: R, at most the smaller of P and D.
    """

    def __init__(self, vectors: jax.Array, rank: int):
        left, values, right = jnp.linalg.svd(vectors, full_matrices=False)
        values = values[:rank]
        # Each factor gets the square root of the singular values. Values near zero, as with
        # repeated vectors, need a larger share on one side: two factors of zero have no gradient.
        share = jnp.sqrt(jnp.maximum(values, 0.01 * values[0]))
        self.left = PromptParam(left[:, :rank] * share)
        self.right = PromptParam((values / share)[:, None] * right[:rank])

    def __call__(self) -> jax.Array:
        """Return the vectors `[P, D]`."""
        return self.left[...] @ self.right[...]


class _Linear(nnx.Module):
    """`x @ kernel + bias`, `[P, I]` to `[P, O]`, with the initial distribution of torch."""

    def __init__(self, inputs: int, outputs: int, key: jax.Array):
        keys, bound = jax.random.split(key), inputs**-0.5
        self.kernel = _uniform(keys[0], (inputs, outputs), bound)
        self.bias = _uniform(keys[1], (outputs,), bound)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] + self.bias[...]


class _Recurrence(nnx.Module):
    """One direction of an LSTM, `[P, I]` to `[P, H]`.

    The initial values are uniform in ±H**-0.5, as in torch, but there is one bias where torch adds
    two. The columns of `kernel`, `recurrent` and `bias` are the input, forget, cell and output
    gates.
    """

    def __init__(self, inputs: int, hidden_size: int, key: jax.Array):
        keys, bound, gates = jax.random.split(key, 3), hidden_size**-0.5, 4 * hidden_size
        self.kernel = _uniform(keys[0], (inputs, gates), bound)
        self.recurrent = _uniform(keys[1], (hidden_size, gates), bound)
        self.bias = _uniform(keys[2], (gates,), bound)

    def __call__(self, x: jax.Array, reverse: bool = False) -> jax.Array:
        recurrent = self.recurrent[...]

        def step(carry, projected):
            state, cell = carry
            i, f, g, o = jnp.split(projected + state @ recurrent, 4)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            state = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (state, cell), state

        zero = jnp.zeros(recurrent.shape[0])
        projected = x @ self.kernel[...] + self.bias[...]
        return jax.lax.scan(step, (zero, zero), projected, reverse=reverse)[1]


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> PromptParam:
    return PromptParam(jax.random.uniform(key, shape, minval=-bound, maxval=bound))
