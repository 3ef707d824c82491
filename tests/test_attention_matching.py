"""The benchmark of Attention Matching: compressed prefixes, compared with attention itself."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_backbone

from softprompt import UserError

FILE = Path(__file__).parent.parent / "benchmarks" / "attention_matching.py"
spec = importlib.util.spec_from_file_location("attention_matching", FILE)
matching = sys.modules["attention_matching"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matching)

ROWS, OTHER_ROWS = (
    np.random.default_rng(seed).integers(3, 250, (count, 12)).tolist()
    for seed, count in ((1, 24), (2, 8))
)


@pytest.fixture(scope="module")
def document(tiny):
    """The prefix of 60 tokens."""
    tokens = np.random.default_rng(0).integers(3, 250, 60)
    return tiny.backbone.prefill(tiny.backbone.embedding(jnp.asarray(tokens)))


def states(tiny, prefix, rows) -> np.ndarray:
    run = jax.jit(lambda backbone, x, prefix: backbone(x, prefix=prefix))
    return np.asarray(run(tiny.backbone, tiny.backbone.embedding(jnp.asarray(rows)), prefix))


def test_the_queries_find_what_attention_computes(tiny, document):
    """The output of the first layer is computed with a single softmax over all keys."""
    queries = next(matching.reference_queries(tiny.backbone, document, [ROWS[0][:5], ROWS[1]]))
    assert [each.queries.shape for each in queries] == [(2 * (5 + 12), 8)] * 2
    row = tiny.backbone.prefill(tiny.backbone.embedding(jnp.asarray(ROWS[1])), document)
    for head, found in enumerate(queries):
        keys, values = (np.asarray(a[0, :, head]) for a in (row.keys, row.values))
        scores = found.queries[-2:] @ keys.T  # of the last token, with two query heads
        weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        prefix = np.asarray(document.keys[0, :, head]), np.asarray(document.values[0, :, head])
        np.testing.assert_allclose(found.output(*prefix)[-2:], weights @ values, atol=1e-5)


def test_a_prefix_of_the_same_length_is_the_same(tiny, document):
    whole = matching.attention_matching(tiny.backbone, document, ROWS, 60)
    np.testing.assert_allclose(whole.keys, document.keys, atol=1e-6)
    np.testing.assert_allclose(states(tiny, whole, ROWS), states(tiny, document, ROWS), atol=0.05)


def test_it_is_nearer_to_the_document_than_its_first_tokens(tiny, document):
    """The rows are not those whose queries were matched."""
    length = 12
    found = matching.attention_matching(tiny.backbone, document, ROWS, length)
    first = type(document)(document.keys[:, :length], document.values[:, :length])
    layers = enumerate(matching.reference_queries(tiny.backbone, document, OTHER_ROWS))
    for number, heads in layers:
        rope = tiny.backbone.arch.layers[number].rope
        back = matching.moved(np.asarray(found.keys[number]), rope, 60 - length)
        for head, queries in enumerate(heads):
            whole, kept, cut = (
                queries.output(np.asarray(keys[:, head]), np.asarray(values[number, :, head]))
                for keys, values in (
                    (document.keys[number], document.values),
                    (back, found.values),
                    (first.keys[number], first.values),
                )
            )
            assert np.linalg.norm(kept - whole) < 0.6 * np.linalg.norm(cut - whole)
    whole, kept, cut = (states(tiny, each, OTHER_ROWS) for each in (document, found, first))
    assert np.linalg.norm(kept - whole) < 0.8 * np.linalg.norm(cut - whole)


def test_moved_keys_are_those_of_earlier_tokens(tiny):
    """In the first layer, a key depends on its token and its position alone."""
    tokens = np.arange(10, 20)
    keys = tiny.backbone.prefill(tiny.backbone.embedding(jnp.asarray(tokens))).keys[0]
    earlier = tiny.backbone.prefill(tiny.backbone.embedding(jnp.asarray(tokens[4:]))).keys[0]
    moved = matching.moved(np.asarray(keys[4:]), tiny.backbone.arch.layers[0].rope, -4)
    np.testing.assert_allclose(moved, earlier, atol=1e-5)


@pytest.mark.parametrize("variant", ["gpt2-inner", "gemma2-capped"])
def test_other_models_are_refused(variant, document):
    with pytest.raises(UserError, match="attention matching needs rotary positions"):
        next(matching.reference_queries(golden_backbone(variant), document, ROWS))
