"""Reparametrizations: compared with NumPy in float64 and with peft, and initial values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from flax import nnx

from softprompt.methods.reparametrization import LSTM, MLP, LowRank, Residual
from softprompt.methods.soft_prompt import PromptParam

pytestmark = pytest.mark.usefixtures("strict_types")

LENGTH, SIZE, HIDDEN, RANK = 5, 8, 6, 3
KEY = jax.random.key(1)
VECTORS = jax.random.normal(jax.random.key(0), (LENGTH, SIZE))

MAKE = {
    "mlp": partial(MLP, hidden_size=HIDDEN, key=KEY),
    "lstm": partial(LSTM, hidden_size=HIDDEN, key=KEY),
    "residual": partial(Residual, hidden_size=HIDDEN, key=KEY),
    "low-rank": partial(LowRank, rank=RANK),
}
# The trained arrays of each, and their shapes.
ARRAYS = {
    "mlp": {
        "inputs": (5, 8),
        "first.kernel": (8, 6),
        "first.bias": (6,),
        "second.kernel": (6, 6),
        "second.bias": (6,),
        "third.kernel": (6, 8),
        "third.bias": (8,),
    },
    "lstm": {
        "inputs": (5, 8),
        "forward.kernel": (8, 24),
        "forward.recurrent": (6, 24),
        "forward.bias": (24,),
        "backward.kernel": (8, 24),
        "backward.recurrent": (6, 24),
        "backward.bias": (24,),
        "first.kernel": (12, 12),
        "first.bias": (12,),
        "second.kernel": (12, 8),
        "second.bias": (8,),
    },
    "residual": {
        "inputs": (5, 8),
        "down.kernel": (8, 6),
        "down.bias": (6,),
        "up.kernel": (6, 8),
        "up.bias": (8,),
        "scale": (8,),
        "bias": (8,),
    },
    "low-rank": {"left": (5, 3), "right": (3, 8)},
}


def named(state):
    """Return the arrays of a state by their paths."""
    flat = nnx.to_flat_state(state)
    return {".".join(path): np.asarray(variable[...]) for path, variable in flat}


def set_arrays(module, arrays):
    """Set the trained arrays of a module, by their paths."""
    state = nnx.to_flat_state(nnx.state(module, PromptParam))
    assert {".".join(path) for path, _ in state} == set(arrays)
    for path, variable in state:
        array = jnp.asarray(arrays[".".join(path)], jnp.float32)
        assert array.shape == variable.shape
        variable[...] = array
    nnx.update(module, nnx.from_flat_state(state))


def randomized(kind):
    """Return a module with random arrays, and the same arrays in float64."""
    module, random = MAKE[kind](VECTORS), np.random.default_rng(3)
    arrays = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in ARRAYS[kind].items()
    }
    set_arrays(module, arrays)
    return module, {name: array.astype(np.float64) for name, array in arrays.items()}


def linear(arrays, name, x):
    return x @ arrays[f"{name}.kernel"] + arrays[f"{name}.bias"]


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recurrence(arrays, name, inputs):
    """Return the states `[P, H]` of an LSTM, computed one step and one gate at a time."""
    kernels = np.split(arrays[f"{name}.kernel"], 4, axis=1)
    recurrents = np.split(arrays[f"{name}.recurrent"], 4, axis=1)
    biases = np.split(arrays[f"{name}.bias"], 4)
    state, cell, states = np.zeros(HIDDEN), np.zeros(HIDDEN), []
    for x in inputs:
        input_gate, forget_gate, candidate, output_gate = (
            x @ kernels[gate] + state @ recurrents[gate] + biases[gate] for gate in range(4)
        )
        cell = sigmoid(forget_gate) * cell + sigmoid(input_gate) * np.tanh(candidate)
        state = sigmoid(output_gate) * np.tanh(cell)
        states.append(state)
    return np.array(states)


def mlp(arrays):
    hidden = relu(linear(arrays, "first", arrays["inputs"]))
    return linear(arrays, "third", relu(linear(arrays, "second", hidden)))


def lstm(arrays):
    forward = recurrence(arrays, "forward", arrays["inputs"])
    backward = recurrence(arrays, "backward", arrays["inputs"][::-1])[::-1]
    states = np.concatenate([forward, backward], axis=1)
    return linear(arrays, "second", relu(linear(arrays, "first", states)))


def residual(arrays):
    x = linear(arrays, "up", relu(linear(arrays, "down", arrays["inputs"])))
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    return arrays["inputs"] + x * arrays["scale"] + arrays["bias"]


EXPECTED = {
    "mlp": mlp,
    "lstm": lstm,
    "residual": residual,
    "low-rank": lambda arrays: arrays["left"] @ arrays["right"],
}


@pytest.mark.parametrize("kind", MAKE)
def test_every_array_is_float32_and_a_prompt_param(kind):
    module = MAKE[kind](VECTORS)
    assert {name: array.shape for name, array in named(nnx.state(module)).items()} == ARRAYS[kind]
    arrays = named(nnx.state(module, PromptParam))
    assert {name: array.shape for name, array in arrays.items()} == ARRAYS[kind]
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    assert module().dtype == jnp.float32


@pytest.mark.parametrize("kind", MAKE)
def test_vectors_equal_plain_numpy(kind):
    module, arrays = randomized(kind)
    expected = EXPECTED[kind](arrays)
    np.testing.assert_allclose(module(), expected, atol=2e-6 * np.abs(expected).max())


WEIGHTING = np.random.default_rng(2).standard_normal((LENGTH, SIZE)).astype(np.float32)


def gradients(module):
    """Return the gradient of a weighted sum of the vectors, by the path of each array."""
    graphdef, state = nnx.split(module)

    @jax.jit
    @jax.grad
    def gradient(state):
        return jnp.sum(nnx.merge(graphdef, state)() * WEIGHTING)

    return named(gradient(state))


@pytest.mark.parametrize("kind", MAKE)
def test_gradients_equal_differences_in_plain_numpy(kind):
    module, arrays = randomized(kind)
    for name, gradient in gradients(module).items():
        direction = np.random.default_rng(4).standard_normal(gradient.shape)
        up, down = (
            EXPECTED[kind](arrays | {name: arrays[name] + step * direction})
            for step in (1e-6, -1e-6)
        )
        slope = np.sum((up - down) * WEIGHTING) / 2e-6
        assert abs(slope) > 1e-3, name
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", MAKE)
def test_every_array_has_an_initial_gradient_except_the_layers_of_residual(kind):
    at_start = gradients(MAKE[kind](VECTORS))
    still = {name for name, gradient in at_start.items() if not gradient.any()}
    layers = {"down.kernel", "down.bias", "up.kernel", "up.bias"}
    assert still == (layers if kind == "residual" else set())


def test_residual_starts_from_the_vectors():
    np.testing.assert_array_equal(MAKE["residual"](VECTORS)(), VECTORS)


@pytest.mark.parametrize("kind", ["mlp", "lstm", "residual"])
def test_the_inputs_are_the_vectors_and_the_weights_depend_on_the_key(kind):
    # With H = D, two arrays drawn with the same key would have equal values.
    one, again, other = (
        named(nnx.state(MAKE[kind](VECTORS, hidden_size=SIZE, key=key)))
        for key in (KEY, KEY, jax.random.key(9))
    )
    np.testing.assert_array_equal(one["inputs"], VECTORS)
    drawn = set(one) - {"inputs", "scale", "bias"}
    for name in drawn:
        np.testing.assert_array_equal(one[name], again[name])
        assert (one[name] != other[name]).all()
    values = np.concatenate([one[name].ravel() for name in drawn])
    assert len(set(values)) > 0.99 * len(values)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_initial_weights_have_the_same_bounds_as_in_torch(kind):
    hidden = 100
    arrays = named(nnx.state(MAKE[kind](VECTORS, hidden_size=hidden)))
    kernels = {name for name in arrays if name.endswith("kernel")}
    for name in kernels:
        inputs = hidden if name in {"forward.kernel", "backward.kernel"} else len(arrays[name])
        bound = inputs**-0.5
        for part in {name, name.replace("kernel", "bias"), name.replace("kernel", "recurrent")}:
            if part in arrays:
                assert 0.8 * bound < np.abs(arrays[part]).max() < bound
                assert abs(arrays[part].mean()) < 0.35 * bound


def test_low_rank_starts_from_the_best_approximation():
    """Its distance is the norm of the omitted singular values (Eckart-Young theorem)."""
    module = MAKE["low-rank"](VECTORS)
    values = np.linalg.svd(np.float64(VECTORS), compute_uv=False)
    distance = np.linalg.norm(module() - np.float64(VECTORS))
    np.testing.assert_allclose(distance, np.sqrt(np.sum(values[RANK:] ** 2)), rtol=1e-5)
    left, right = np.float64(module.left[...]), np.float64(module.right[...])
    np.testing.assert_allclose(left.T @ left, np.diag(values[:RANK]), atol=1e-5)
    np.testing.assert_allclose(right @ right.T, np.diag(values[:RANK]), atol=1e-5)
    np.testing.assert_allclose(LowRank(VECTORS, LENGTH)(), VECTORS, atol=1e-6)


def test_low_rank_has_gradients_in_directions_that_the_vectors_lack():
    module = LowRank(jnp.tile(VECTORS[:1], (LENGTH, 1)), RANK)
    np.testing.assert_allclose(module(), jnp.tile(VECTORS[:1], (LENGTH, 1)), atol=1e-6)
    gradient = gradients(module)["right"]
    assert np.abs(gradient).max(axis=1).min() > 0.01 * np.abs(gradient).max()


# The names of layers and of the LSTM's directions in peft.
LAYERS = {
    MLP: {"first": "mlp_head.0", "second": "mlp_head.2", "third": "mlp_head.4"},
    LSTM: {"first": "mlp_head.0", "second": "mlp_head.2"},
}
DIRECTIONS = {MLP: {}, LSTM: {"forward": "l0", "backward": "l0_reverse"}}


@pytest.mark.parametrize("kind", [MLP, LSTM])
def test_networks_agree_with_peft(kind):
    with np.load(GOLDEN / "encoders.npz") as file:
        golden = {
            name.split("/")[1]: file[name] for name in file if name.startswith(f"{kind.__name__}/")
        }
    arrays = {"inputs": golden["embedding.weight"]}
    for name, theirs in LAYERS[kind].items():
        arrays[f"{name}.kernel"] = golden[f"{theirs}.weight"].T
        arrays[f"{name}.bias"] = golden[f"{theirs}.bias"]
    for name, theirs in DIRECTIONS[kind].items():
        arrays[f"{name}.kernel"] = golden[f"lstm_head.weight_ih_{theirs}"].T
        arrays[f"{name}.recurrent"] = golden[f"lstm_head.weight_hh_{theirs}"].T
        biases = [golden[f"lstm_head.bias_{part}_{theirs}"] for part in ("ih", "hh")]
        arrays[f"{name}.bias"] = sum(biases)  # torch adds two biases
    module = kind(jnp.zeros((3, 8)), hidden_size=6, key=KEY)
    set_arrays(module, arrays)
    np.testing.assert_allclose(module(), golden["output"], atol=1e-6)
