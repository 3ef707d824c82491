"""The soft prompt: as a shared prefix and prepended, initial vectors, and use from Python."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, REPOSITORY
from flax import nnx

from softprompt import (
    SoftPrompt,
    TrainedPrompt,
    TrainingBatches,
    UserError,
    load_base,
    load_experiment,
    load_prompt,
)
from softprompt.backbones.cache import Cache, T5Cache
from softprompt.backbones.prefix import Prefix, T5Prefix
from softprompt.data.datasets import make_examples
from softprompt.data.task import make_task
from softprompt.experiment.schema import TemplateSettings
from softprompt.methods import initializers
from softprompt.methods.dept import OffsetParam
from softprompt.methods.soft_prompt import PromptParam

pytestmark = pytest.mark.usefixtures("strict_types")

LENGTHS = [7, 1, 4]


def batch_of(lengths, side, vocabulary=259):
    """Return tokens, positions and segments of rows of different lengths, padded on one side."""
    random = np.random.default_rng(3)
    longest = max(lengths) + 2
    tokens = np.zeros((len(lengths), longest), np.int32)
    positions, segments = np.zeros_like(tokens), np.full_like(tokens, -1)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        tokens[row, place] = random.integers(3, vocabulary, length)
        positions[row, place] = np.arange(length)
        segments[row, place] = 0
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)


def loss_of(logits, tokens, segments):
    """Return the mean loss over all tokens except padding and the first of each row."""
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[..., 0]
    return -picked.mean(where=(segments[:, 1:] == 0) & (segments[:, :-1] == 0))


@jax.jit
def prepended(backbone, vectors, tokens, positions, segments):
    """Return the logits of rows with the vectors prepended to their embeddings."""
    length = vectors.shape[0]
    embeddings = SoftPrompt(vectors)(backbone.embedding(tokens))
    ours = jnp.broadcast_to(jnp.arange(length), (len(tokens), length))
    positions = jnp.concatenate([ours, positions + length], axis=1)
    segments = jnp.concatenate([jnp.zeros_like(ours), segments], axis=1)
    return backbone.logits(backbone(embeddings, positions, segments))[:, length:]


@jax.jit
def shared(backbone, vectors, tokens, positions, segments):
    """Return the logits of rows that attend to the prefix of the vectors."""
    backbone, prefix = SoftPrompt(vectors).apply(backbone)
    return backbone.logits(backbone(backbone.embedding(tokens), positions, segments, prefix))


@partial(jax.jit, static_argnames="form")
def loss_and_gradient(vectors, backbone, batch, form):
    def loss(vectors):
        tokens, _, segments = batch
        return loss_of(form(backbone, vectors, *batch), tokens, segments)

    return jax.value_and_grad(loss)(vectors)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("variant", ["llama-grouped", "llama-sharded"])
def test_a_shared_prefix_gives_the_same_loss_and_gradient_as_prepending(variant, length, side):
    backbone = load_base(str(GOLDEN / variant)).backbone
    batch = batch_of(LENGTHS, side)
    vectors = jax.random.normal(jax.random.key(length), (length, 32))
    one, its_gradient = loss_and_gradient(vectors, backbone, batch, prepended)
    other, other_gradient = loss_and_gradient(vectors, backbone, batch, shared)
    np.testing.assert_allclose(one, other, rtol=1e-6)
    scale = np.abs(its_gradient).max()
    np.testing.assert_allclose(its_gradient, other_gradient, atol=1e-5 * scale)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", [prepended, shared])
def test_padding_does_not_change_the_logits_of_a_row(tiny, form, side):
    vectors = jax.random.normal(jax.random.key(0), (5, 32))
    tokens, positions, segments = batch_of(LENGTHS, side)
    together = form(tiny.backbone, vectors, tokens, positions, segments)
    for row, length in enumerate(LENGTHS):
        real = np.asarray(segments[row] == 0)
        alone = tokens[row][real][None]
        plain = jnp.arange(length)[None]
        expected = form(tiny.backbone, vectors, alone, plain, jnp.zeros_like(plain))[0]
        np.testing.assert_allclose(together[row][real], expected, atol=2e-5)


def test_a_prompt_of_token_embeddings_equals_the_tokens(tiny, golden_llama):
    """A row has the same hidden states after a text as after the text's embeddings."""
    tokens = jnp.asarray(golden_llama["tokens"])[:1]
    positions = jnp.arange(9)[None]
    whole = tiny.backbone(tiny.backbone.embedding(tokens), positions, jnp.zeros_like(positions))
    _, prefix = SoftPrompt(tiny.backbone.embedding(tokens[0, :4])).apply(tiny.backbone)
    rest = tiny.backbone(
        tiny.backbone.embedding(tokens[:, 4:]), positions[:, :5], jnp.zeros((1, 5), int), prefix
    )
    np.testing.assert_allclose(rest, whole[:, 4:], atol=1e-5)


def test_sampled_vocabulary_draws_each_frequent_token_at_most_once(smollm2):
    table = smollm2.backbone.embedding.table[...]
    vectors = initializers.sampled_vocabulary(smollm2, 600, np.random.default_rng(0))
    distance = jnp.abs(vectors[:, None, :8] - table[None, :6000, :8]).sum(axis=-1)
    tokens = np.asarray(distance.argmin(axis=1))
    np.testing.assert_array_equal(vectors, table[tokens])
    assert len(set(tokens)) == 600
    special = [i for i in smollm2.tokenizer.added_tokens_decoder if i < 6000]
    assert len(special) == 17
    assert tokens.min() > max(special)
    assert tokens.max() < 5000 + len(special)


def test_random_vectors_have_the_mean_and_deviation_of_the_embedding_table(smollm2):
    table = smollm2.backbone.embedding.table[...]
    vectors = initializers.random_vectors(smollm2, 3000, np.random.default_rng(0))
    np.testing.assert_allclose(vectors.std(axis=0), table.std(axis=0), rtol=0.1)
    np.testing.assert_allclose(vectors.mean(axis=0), table.mean(axis=0), atol=0.01)


def test_text_vectors_repeat_or_truncate_the_text(tiny):
    tokens = tiny.tokenizer("abc", add_special_tokens=False).input_ids
    table = tiny.backbone.embedding.table[...]
    repeated = initializers.text_vectors(tiny, 5, "abc")
    np.testing.assert_array_equal(repeated, table[jnp.array([*tokens, *tokens[:2]])])
    np.testing.assert_array_equal(initializers.text_vectors(tiny, 2, "abc"), repeated[:2])


def test_label_vectors_are_mean_embeddings_of_the_labels_followed_by_the_vocabulary(tiny):
    table = tiny.backbone.embedding.table[...]
    (one,), two = tiny.tokenizer(["a", "bc"], add_special_tokens=False).input_ids
    random = np.random.default_rng(1)
    vectors = initializers.label_vectors(tiny, 6, ["a", "bc"], random)
    np.testing.assert_array_equal(vectors[0], table[one])
    np.testing.assert_allclose(vectors[1], (table[two[0]] + table[two[1]]) / 2, rtol=1e-6)
    rest = initializers.sampled_vocabulary(tiny, 4, np.random.default_rng(1))
    np.testing.assert_array_equal(vectors[2:], rest)
    assert initializers.label_vectors(tiny, 1, ["a", "bc"], random).shape == (1, 32)


def test_from_vocabulary_draws_token_embeddings_by_the_key(tiny):
    prompt = SoftPrompt.from_vocabulary(tiny, 6, jax.random.key(0))
    table = np.asarray(tiny.backbone.embedding.table[...])
    for vector in np.asarray(prompt.vectors[...]):
        assert (table == vector).all(axis=1).any()
    again = SoftPrompt.from_vocabulary(tiny, 6, jax.random.key(0))
    np.testing.assert_array_equal(again.vectors[...], prompt.vectors[...])
    other = SoftPrompt.from_vocabulary(tiny, 6, jax.random.key(1))
    assert not np.array_equal(other.vectors[...], prompt.vectors[...])
    assert prompt.opening[...].tolist() == [~i for i in range(6)]


def test_from_text_has_the_embeddings_of_the_text(tiny):
    tokens = tiny.tokenizer("abc", add_special_tokens=False).input_ids
    expected = tiny.backbone.embedding.table[...][jnp.array(tokens)]
    np.testing.assert_array_equal(SoftPrompt.from_text(tiny, "abc").vectors[...], expected)
    shorter = SoftPrompt.from_text(tiny, "abc", length=2)
    np.testing.assert_array_equal(shorter.vectors[...], expected[:2])
    with pytest.raises(UserError, match="the text '' has no tokens"):
        SoftPrompt.from_text(tiny, "")


def test_a_saved_prompt_loads_with_its_task(tiny, tmp_path):
    template = TemplateSettings(input="Say {prompt}{text}:")
    task = make_task(tiny, template, {"low": " ab", "high": " cd"}, virtual_tokens=4)
    prompt = SoftPrompt(jax.random.normal(jax.random.key(0), (4, 32)))
    prompt.save(tmp_path / "prompt", tiny, task)
    loaded = load_prompt(tmp_path / "prompt", tiny)
    np.testing.assert_array_equal(loaded.method.vectors[...], prompt.vectors[...])
    assert loaded.task.opening == task.opening
    in_memory = TrainedPrompt.from_method(prompt, tiny, task)
    assert loaded.classify(["hello"]) == in_memory.classify(["hello"])
    assert json.loads(json.dumps(in_memory.description)) == loaded.description


def test_a_prompt_without_a_task_generates_after_the_bare_text(tiny, tmp_path):
    prompt = SoftPrompt.from_vocabulary(tiny, 3, jax.random.key(0))
    prompt.save(tmp_path / "prompt", tiny)
    loaded = load_prompt(str(tmp_path / "prompt"))
    assert loaded.task.template == TemplateSettings(input="{text}")
    assert loaded.task.opening == [~0, ~1, ~2]
    in_memory = TrainedPrompt.from_method(prompt, tiny)
    with jax.numpy_dtype_promotion("standard"):  # decoding mixes types
        texts = [p.generate(["hello"], max_new_tokens=3)[0].text for p in (loaded, in_memory)]
    assert texts[0] == texts[1]


def test_reprs_are_short_and_show_no_arrays(tiny):
    prompt = SoftPrompt(jnp.zeros((20, 32)))
    assert repr(prompt) == "SoftPrompt(20 virtual tokens, hidden size 32)"
    trained = repr(TrainedPrompt.from_method(prompt, tiny))
    assert trained.startswith(f"TrainedPrompt({prompt!r}, base ")
    assert len(trained) < 200


def test_notebooks_show_the_short_repr():
    treescope = pytest.importorskip("treescope")
    prompt = SoftPrompt(jnp.zeros((20, 32)))
    for shown in (prompt, prompt.vectors):
        assert treescope.render_to_text(shown) == repr(shown)


def test_arrays_of_methods_have_a_short_repr():
    assert repr(PromptParam(jnp.zeros((20, 576)))) == "PromptParam(float32[20, 576])"
    assert repr(OffsetParam(jnp.zeros((4, 2)))) == "OffsetParam(float32[4, 2])"
    assert repr(PromptParam(True)) == "PromptParam(True)"  # as in a mask of parameters


def test_prefixes_and_caches_have_a_short_repr():
    keys, inputs, lengths = jnp.zeros((30, 4, 20, 3, 8)), jnp.zeros((30, 4, 9, 3, 8)), jnp.ones(4)
    mask = jnp.ones((4, 9), bool)
    shown = [
        (Prefix(keys[:, 0], keys[:, 0]), "Prefix(30 layers, 20 virtual tokens)"),
        (
            T5Prefix(jnp.zeros((5, 8))),
            "T5Prefix(5 virtual tokens in the encoder, 0 in the decoder)",
        ),
        (
            T5Prefix(None, keys[:, 0], keys[:, 0]),
            "T5Prefix(0 virtual tokens in the encoder, 20 in the decoder)",
        ),
        (Cache(keys, keys, lengths), "Cache(30 layers, 4 rows, 20 slots)"),
        (
            T5Cache(keys, keys, lengths, inputs, inputs, mask),
            "T5Cache(30 layers, 4 rows, 20 slots, 9 input tokens)",
        ),
    ]
    assert [repr(value) for value, _ in shown] == [text for _, text in shown]
    assert max(len(text) for _, text in shown) < 200


def test_data_have_a_short_repr(tiny):
    verbalizer = {"positive": " positive", "negative": " negative"}
    task = make_task(tiny, TemplateSettings(input="{text}"), verbalizer, virtual_tokens=5)
    assert repr(task) == f"Task(2 labels, 5 virtual tokens, base {tiny.name!r})"
    examples = make_examples(task, [{"text": "A joy. " * 9, "label": "positive"}] * 4)
    assert repr(examples) == "Examples(4 examples)"
    count = len(examples[0].input)
    assert repr(examples[0]) == f"Example({count} tokens, 2 candidates)"
    batches = TrainingBatches(examples, batch_size=2, seed=7)
    assert repr(batches) == "TrainingBatches(4 examples, batch size 2, seed 7)"
    batch = batches[0]
    tokens, targets = batch.tokens.size, batch.targets.size
    assert repr(batch) == f"Batch(2 rows, {tokens} tokens, {targets} targets)"
    assert max(len(repr(each)) for each in (task, examples, examples[0], batches, batch)) < 200


def test_an_experiment_has_a_short_repr():
    experiment = load_experiment(REPOSITORY / "experiments" / "sentiment.yaml")
    text = "Experiment('sentiment', method prompt, base 'smollm2-135m-instruct')"
    assert repr(experiment) == str(experiment) == text


class Reader(nnx.Module):
    """A model from outside the package that classifies a text by the mean of its tokens."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(50, 16, rngs=rngs)
        self.layer = nnx.Linear(16, 16, rngs=rngs)
        self.head = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, embeddings):
        return self.head(nnx.relu(self.layer(embeddings)).mean(axis=1))


class Prompted(nnx.Module):
    """A `Reader` whose inputs begin with a soft prompt."""

    def __init__(self, prompt: SoftPrompt, model: Reader):
        self.prompt, self.model = prompt, model

    def __call__(self, tokens):
        return self.model(self.prompt(self.model.embedding(tokens)))


def test_a_prompt_can_be_trained_with_any_nnx_model():
    prompt = SoftPrompt(jax.random.normal(jax.random.key(0), (5, 16)))
    prompted = Prompted(prompt, Reader(nnx.Rngs(0)))
    frozen = jax.tree.map(np.asarray, nnx.state(prompted.model))
    before = np.asarray(prompt.vectors[...])
    tokens, labels = jax.random.randint(jax.random.key(1), (8, 6), 0, 50), jnp.ones(8, jnp.int32)

    def loss_of(prompted):
        logits = prompted(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def step(prompted, optimizer):
        trained = nnx.DiffState(0, PromptParam)
        loss, gradient = nnx.value_and_grad(loss_of, argnums=trained)(prompted)
        optimizer.update(prompted, gradient)
        return loss

    with jax.numpy_dtype_promotion("standard"):  # Optax mixes types
        optimizer = nnx.Optimizer(prompted, optax.adam(0.1), wrt=PromptParam)
        losses = [float(step(prompted, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert not np.array_equal(prompt.vectors[...], before)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(prompted.model), frozen)
