"""The operations that `make bench` says a step requires, against a model written out by hand."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from softprompt.plan.flops import count_flops

FILE = Path(__file__).parents[1] / "benchmarks" / "yardstick" / "flops.py"
spec = importlib.util.spec_from_file_location("yardstick_flops", FILE)
flops = sys.modules["yardstick_flops"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flops)

SHAPES = flops.Shapes(hidden=12, inner=20, layers=2, heads=4, kv_heads=2, head=6, vocabulary=30)
LENGTHS = [(2, 1), (3, 2)]  # tokens and targets of each row
VIRTUAL, OPENING, RANK = 3, 2, 3


def run(x, layers, before, wanted, low_rank):
    """Run tokens `[T, D]` after the keys and values `[S, K, h]` of each layer in `before`.

    Returns:
      The last hidden states of the last `wanted` tokens, and the keys and values of all.
    """
    kept, group = [], (SHAPES.kv_heads, SHAPES.heads // SHAPES.kv_heads, SHAPES.head)
    for number, (layer, past) in enumerate(zip(layers, before, strict=True)):
        rows = {name: x @ layer[name] + added(x, low_rank, name, number) for name in ("k", "v")}
        seen = [
            jnp.concatenate([old, rows[name].reshape(-1, *group[::2])])
            for name, old in zip(("k", "v"), past, strict=True)
        ]
        kept.append(seen)
        if number == SHAPES.layers - 1:
            x = x[len(x) - wanted :]
        if not len(x):
            break
        queries = x @ layer["q"] + added(x, low_rank, "q", number)
        attended = []
        for query, end in zip(
            queries, range(len(seen[0]) - len(x) + 1, len(seen[0]) + 1), strict=True
        ):
            keys, values = (part[:end] for part in seen)
            weights = jnp.exp(jnp.einsum("kgh,skh->kgs", query.reshape(group), keys))
            attended.append(jnp.einsum("kgs,skh->kgh", weights, values).reshape(-1))
        x = x + jnp.stack(attended) @ layer["output"]
        x = x + ((x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
    return x, kept


def added(x, low_rank, name, layer):
    if low_rank is None or name == "k":
        return 0
    down, up = low_rank[layer][name]
    return (x @ down) @ up


def loss(arrays, layers, head):
    opening, before, low_rank, rows = arrays
    _, before = run(opening, layers, before, 0, low_rank)
    total = 0
    for row, (_, targets) in zip(rows, LENGTHS, strict=True):
        hidden, _ = run(row, layers, before, targets, low_rank)
        total += jnp.sum(jnp.sin(hidden @ head))
    return total


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_required_operations_are_those_of_a_model_without_padding(method):
    q, v, inner = SHAPES.query, SHAPES.value, (SHAPES.hidden, SHAPES.inner)
    sizes = {"q": q, "k": v, "v": v, "output": q[::-1], "gate": inner, "up": inner}
    sizes["down"] = inner[::-1]
    layers = [{name: jnp.ones(size) for name, size in sizes.items()}] * SHAPES.layers
    head = jnp.ones((SHAPES.hidden, SHAPES.vocabulary))
    virtual = 0 if method == "lora" else VIRTUAL
    past = jnp.ones((virtual if method == "prefix" else 0, SHAPES.kv_heads, SHAPES.head))
    low_rank = None
    if method == "lora":
        pairs = {n: (jnp.ones((sizes[n][0], RANK)), jnp.ones((RANK, sizes[n][1]))) for n in "qv"}
        low_rank = [pairs] * SHAPES.layers
    opening = jnp.ones((OPENING + (virtual if method == "prompt" else 0), SHAPES.hidden))
    rows = [jnp.ones((length, SHAPES.hidden)) for length, _ in LENGTHS]
    arrays = opening, [(past, past)] * SHAPES.layers, low_rank, rows
    traced = jax.jit(jax.value_and_grad(loss)).trace(arrays, layers, head)
    step = flops.Step(method, virtual, RANK, OPENING, LENGTHS)
    assert flops.required(SHAPES, step) == count_flops(traced)
