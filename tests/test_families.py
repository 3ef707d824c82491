"""Every model family matches the results of transformers and peft in tests/golden/families."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    FAMILIES_GOLDEN,
    batch_of,
    batch_with_all_targets,
    example_of,
    golden_backbone,
    greedy,
    rows_of,
)

import softprompt
from softprompt.backbones.config import ConfigFields, RopeFields
from softprompt.backbones.families import FAMILIES
from softprompt.backbones.formats.directory import ModelDirectory
from softprompt.backbones.loading import load_backbone
from softprompt.backbones.opening import Opening

EXACT = 1e-4  # tolerance in units of the standard deviation of the reference logits
VARIANTS = sorted(path.name for path in FAMILIES_GOLDEN.iterdir())
PACKAGE = Path(softprompt.__file__).parent
T5 = [name for name in VARIANTS if name.startswith("t5")]
CAUSAL = [name for name in VARIANTS if name not in T5]


def golden_of(variant):
    return dict(np.load(FAMILIES_GOLDEN / variant / "golden.npz"))


def prompt_of(variant, golden):
    """Return the prompt, scaled as our models expect it, and the scale.

    In transformers, the scaling is part of the embedding module (Gemma) or follows it (Granite).
    """
    scale = golden_backbone(variant).arch.embedding_scale if "granite" in variant else 1.0
    return golden["prompt"] * np.float32(scale), scale


def assert_close(ours, golden, real):
    error = np.abs(np.asarray(ours) - golden)[real]
    assert error.max() < EXACT * golden[real].std()


def test_every_family_has_reference_results():
    assert {name.split("-")[0] for name in VARIANTS} == set(FAMILIES)


# The models are small, so compilation takes longer than the run.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@quick
def causal(backbone, batch, tokens, real, prompt):
    """Return the logits without and with a prompt, and the loss and gradient of the prompt."""

    def prompted(prompt):
        logits = backbone.logits(backbone.target_states(batch, Opening(prompt)))
        logits = batch.target_rows.to_rows(logits)[: len(tokens)]
        scores = jax.nn.log_softmax(logits[:, :-1])
        scores = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
        return -scores.mean(where=real[:, 1:]), logits

    (loss, logits), gradient = jax.value_and_grad(prompted, has_aux=True)(prompt)
    plain = backbone.logits(backbone(backbone.embedding(tokens)))
    return plain, logits, loss, gradient


@pytest.mark.parametrize("variant", CAUSAL)
def test_a_causal_model_matches_transformers(variant):
    golden = golden_of(variant)
    tokens, lengths = golden["tokens"], golden["lengths"]
    real = np.arange(tokens.shape[1])[None] < golden["lengths"][:, None]
    prompt, scale = prompt_of(variant, golden)
    backbone = golden_backbone(variant)
    batch = batch_with_all_targets(tokens, lengths)
    plain, prompted, loss, gradient = causal(backbone, batch, tokens, real, prompt)
    assert_close(plain, golden["logits"], real)
    assert_close(prompted, golden["prompted_logits"], real)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-4)
    error = np.abs(gradient * scale - golden["prompt_gradient"]).max()
    assert error < EXACT * np.abs(golden["prompt_gradient"]).max()


ONE_EACH = list({name.split("-")[0]: name for name in VARIANTS}.values())


@quick
def sensitivity(backbone, tokens, prompt):
    """Return how much the hidden state at position 4 depends on each embedding, `[T]`."""
    prefix = backbone.prefill(prompt)

    def state(embeddings):
        return backbone(embeddings, prefix=prefix)[0, 4].sum()

    return jnp.abs(jax.grad(state)(backbone.embedding(tokens)))[0].sum(axis=-1)


@pytest.mark.parametrize("variant", [name for name in ONE_EACH if name in CAUSAL])
def test_no_token_attends_to_a_later_token(variant):
    backbone, golden = golden_backbone(variant), golden_of(variant)
    slopes = np.asarray(sensitivity(backbone, golden["tokens"][:1], golden["prompt"]))
    np.testing.assert_array_equal(slopes > 0, np.arange(9) <= 4)


@quick
def prefill(backbone, prompt):
    return backbone.prefill(prompt)


@quick
def hidden_states(backbone, tokens, prefix):
    return backbone(backbone.embedding(tokens), prefix=prefix)


@pytest.mark.parametrize("variant", ONE_EACH)
def test_greedy_generation_with_a_prompt_matches_transformers(variant):
    """Our decoding uses a KV cache; the reference does not."""
    golden = golden_of(variant)
    backbone = golden_backbone(variant)
    prefix = prefill(backbone, prompt_of(variant, golden)[0])
    inputs, expected = (golden["tokens"], golden["lengths"]), golden["generated"]
    written = greedy(backbone, prefix, *inputs, -1, count=expected.shape[1])
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("variant", ["mistral-window", "gpt2-plain", "gemma3_text-old"])
def test_rows_with_different_prefixes_match_each_row_alone(variant):
    """Windows and learned positions count from the virtual tokens of each row."""
    backbone = golden_backbone(variant)
    random = np.random.default_rng(0)
    width = backbone.arch.hidden_size
    vectors = [random.normal(size=(n, width)).astype(np.float32) * 0.1 for n in (2, 7)]
    prefixes = [prefill(backbone, each) for each in vectors]
    rows = [1, None, 0, 1]
    tokens = random.integers(3, 40, (4, 6))
    together = hidden_states(backbone, tokens, prefixes[0].packed(prefixes, rows))
    for row, number in enumerate(rows):
        prefix = None if number is None else prefixes[number]
        alone = hidden_states(backbone, tokens[row : row + 1], prefix)
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5)


def t5_batch(golden):
    """Return the batch of a golden file, and which of its targets are real as rows."""
    names = "tokens", "lengths", "targets", "target_lengths"
    examples = [
        example_of(tokens[:length].tolist(), [targets[:count].tolist()], 0)
        for tokens, length, targets, count in zip(*map(golden.get, names), strict=True)
    ]
    count = golden["targets"].shape[1]
    real = np.arange(count)[None] < golden["target_lengths"][:, None]
    return batch_of(examples, separate_targets=True), real


@quick
def encoder_decoder(backbone, batch, prompt):
    def prompted(prompt):
        logits = backbone.logits(backbone.target_states(batch, backbone.prefill(prompt)))
        scores = jax.nn.log_softmax(logits)
        scores = jnp.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]
        return -scores.mean(where=batch.target_candidates >= 0), logits

    plain = backbone.logits(backbone.target_states(batch, None))
    (loss, logits), gradient = jax.value_and_grad(prompted, has_aux=True)(prompt)
    return plain, logits, loss, gradient


TIED, UNTIED = "t5-relu", "t5-gated"


@pytest.mark.parametrize(
    ("variant", "changes", "exponent"),
    [
        (TIED, {"tie_word_embeddings": True, "scale_decoder_outputs": True}, 0),
        (TIED, {"tie_word_embeddings": True, "scale_decoder_outputs": False}, 0.5),
        (UNTIED, {"tie_word_embeddings": False, "scale_decoder_outputs": False}, 0),
        (UNTIED, {"tie_word_embeddings": False, "scale_decoder_outputs": True}, -0.5),
        # transformers 5 writes this for every T5 model of version 1.1.
        (UNTIED, {"tie_word_embeddings": True, "scale_decoder_outputs": False}, 0),
    ],
)
def test_the_head_of_t5_is_tied_and_scaled_independently(variant, changes, exponent, tmp_path):
    """The reference's logits differ by a power of the hidden size with the other scale."""
    model = shutil.copytree(FAMILIES_GOLDEN / variant, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    backbone, _ = load_backbone(ModelDirectory(model))
    golden = golden_of(variant)
    batch, real = t5_batch(golden)
    logits = rows_of(batch, backbone.logits(backbone.target_states(batch, None)))[: len(real)]
    expected = golden["logits"] * backbone.arch.hidden_size**exponent
    assert_close(logits, expected, real)
    same = backbone.arch == golden_backbone(variant).arch
    assert same == (exponent == 0)


@pytest.mark.parametrize("variant", T5)
def test_an_encoder_decoder_matches_transformers(variant):
    golden = golden_of(variant)
    batch, real = t5_batch(golden)
    plain, prompted, loss, gradient = encoder_decoder(
        golden_backbone(variant), batch, jnp.asarray(golden["prompt"])
    )
    plain, prompted = (rows_of(batch, each)[: len(real)] for each in (plain, prompted))
    assert_close(plain, golden["logits"], real)
    assert_close(prompted, golden["prompted_logits"], real)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-4)
    error = np.abs(gradient - golden["prompt_gradient"]).max()
    assert error < EXACT * np.abs(golden["prompt_gradient"]).max()


def test_every_field_that_a_family_reads_has_a_schema():
    """A field without one would come from outside unchecked."""
    families = (PACKAGE / "backbones" / "families.py").read_text()
    rope = (PACKAGE / "backbones" / "rope.py").read_text()
    fields = set(re.findall(r'config(?:\.get\(|\[)"(\w+)"', families))
    parameters = set(re.findall(r'parameters(?:\.get\(|\[)"(\w+)"', rope))
    assert "num_hidden_layers" in fields
    assert "rope_theta" in parameters
    assert fields - {"model_type"} <= set(ConfigFields.model_fields)
    assert parameters <= set(RopeFields.model_fields)
