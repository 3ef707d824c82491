"""Continuous batching on the device: every slot generates what its request generates alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_backbone

from softprompt.backbones.prefix import Prefix
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation import decoding
from softprompt.generation.sampling import Sampling
from softprompt.generation.slots import STEPS, TOP
from softprompt.serving.bank import Bank, Content
from softprompt.serving.device import Chunk, Device, occupant

COUNT = 11  # tokens to generate
SAMPLED = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}


def alone(backbone, prefix, tokens, seed=0, **settings):
    """Generate with the programs of offline generation, which have no slots."""
    seen = np.zeros((1, backbone.arch.vocab_size), bool)
    seen[0, tokens] = True
    state = decoding.start(
        backbone,
        prefix,
        np.array([tokens], np.int32),
        np.array([len(tokens)], np.int32),
        np.array([seed], np.uint32),
        seen if "repetition_penalty" in settings else None,
        Sampling.from_settings(GenerationSettings(**settings), 1),
        np.full((1, 1), -1, np.int32),
        capacity=COUNT,
    )
    state = decoding.continue_decoding(backbone, prefix, state, np.full(1, COUNT))
    return np.asarray(state.tokens)[0].tolist()


class Bench:
    """A device with the bookkeeping that a scheduler does."""

    def __init__(self, backbone, slots=3, length=256):
        self.backbone = backbone
        self.device, self.bank = Device(backbone, slots, length, 64, chunk=64), Bank(64)
        self.lengths, self.ids = {}, {}

    def load(self, row, content):
        stored, read = self.bank.add(content.digest, content), 0
        self.device.place(row, content)
        while read < len(content.tokens):
            read = self.device.read_opening(row, content, read)
        self.device.store(row, stored)
        return stored

    def occupy(self, row, prefix, tokens, seed=0, **settings):
        seen = np.zeros(self.backbone.arch.vocab_size, bool)
        seen[tokens] = "repetition_penalty" in settings
        new = occupant(seen, limit=COUNT, seed=seed, scored=True, **settings)
        self.device.occupy(row, prefix, new)
        self.lengths[row], self.ids[row] = prefix.length if prefix else 0, []

    def read(self, *chunks):
        """Read chunks: slot, ids, and whether they are the last of the input."""
        before = max(self.lengths[row] for row, _, _ in chunks)
        read = self.device.read([Chunk(row, ids, [], last) for row, ids, last in chunks], before)
        for i, (row, ids, last) in enumerate(chunks):
            self.lengths[row] += len(ids)
            self.ids[row] += [int(read.tokens[i])] if last else []
        return read

    def decode(self, steps):
        generated = self.device.decode(steps, max(self.lengths) + 1, max(self.lengths.values()))
        for row, ids in self.ids.items():
            new = np.asarray(generated.tokens)[row, : generated.counts[row]].tolist()
            ids += new
            self.lengths[row] += len(new)
        return generated


@pytest.mark.parametrize(
    "variant", ["llama-llama3", "gemma3_text-pattern", "gpt2-plain", "mistral-window"]
)
def test_every_slot_generates_what_its_request_generates_alone(variant):
    """Inputs of several chunks, three prefixes, greedy and sampled, joining at any time."""
    backbone = golden_backbone(variant)
    random = np.random.default_rng(0)
    arch = backbone.arch
    vectors = random.normal(size=(5, arch.hidden_size)).astype(np.float32)
    opening = [3, *(~i for i in range(5)), 7]
    shape = backbone.prefix_shape(4)
    keys, values = random.normal(size=(2, *shape)).astype(np.float32)
    bench = Bench(backbone)
    soft = bench.load(0, Content(opening, vectors))
    tuned = bench.load(1, Content([9], None, keys, values))
    long, short, middle = (random.integers(0, 30, n).tolist() for n in (70, 5, 20))

    bench.occupy(2, soft, long, seed=3, **SAMPLED)
    bench.read((2, long[:64], False))
    bench.occupy(1, None, middle)
    bench.read((1, middle, True))
    bench.decode(2)
    bench.occupy(0, tuned, short)
    bench.read((2, long[64:], True), (0, short, True))
    bench.decode(1)
    for _ in range(3):
        bench.decode(STEPS)

    virtual = vectors[[~token if token < 0 else 0 for token in opening]]
    ordinary = backbone.embedding(jnp.maximum(jnp.array(opening), 0))
    embeddings = jnp.where(jnp.array(opening)[:, None] < 0, virtual, ordinary)
    prefill = jax.jit(lambda backbone, x, prefix: backbone.prefill(x, prefix))
    soft = prefill(backbone, embeddings, None)
    tuned = prefill(backbone, backbone.embedding(jnp.array([9])), Prefix(keys, values))
    assert bench.ids[0] == alone(backbone, tuned, short)
    assert bench.ids[1] == alone(backbone, None, middle)
    assert bench.ids[2] == alone(backbone, soft, long, seed=3, **SAMPLED)


def test_scores_are_the_log_probabilities_of_the_whole_model():
    backbone = golden_backbone("llama-llama3")
    bench = Bench(backbone)
    tokens = np.random.default_rng(1).integers(0, 30, 9).tolist()
    bench.occupy(0, None, tokens)
    following = [*tokens[1:], -1]
    read = bench.device.read([Chunk(0, tokens, following, True)], 0)
    bench.lengths[0], bench.ids[0] = len(tokens), [int(read.tokens[0])]
    generated = bench.decode(3)
    ids = np.array([tokens + bench.ids[0]])
    logits = backbone.logits(backbone(backbone.embedding(ids)))[0]
    expected = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1))
    after = ids[0, 1:]
    chosen = expected[np.arange(len(after)), after]
    np.testing.assert_allclose(read.input_scores.chosen[:8], chosen[:8], atol=1e-5)
    np.testing.assert_allclose(read.scores.chosen[0], chosen[8], atol=1e-5)
    np.testing.assert_allclose(generated.scores.chosen[0, :3], chosen[9:], atol=1e-5)
    best = -np.sort(-expected, axis=-1)[:, :TOP]
    np.testing.assert_allclose(read.input_scores.top[:8], best[:8], atol=1e-5)
    np.testing.assert_allclose(generated.scores.top[0, :3], best[9:12], atol=1e-5)
    np.testing.assert_array_equal(generated.scores.top_ids[0, :3, 0], after[9:])


def test_a_row_ends_at_its_limit_and_at_an_end_token():
    backbone = golden_backbone("llama-llama3")
    tokens = [5, 6, 7]
    expected = alone(backbone, None, tokens)
    end = next(i for i in range(1, COUNT) if expected[i] not in expected[:i])
    bench = Bench(backbone)
    bench.occupy(0, None, tokens)
    bench.occupy(1, None, tokens, ends=[expected[end]])
    bench.read((0, tokens, True), (1, tokens, True))
    for _ in range(3):
        generated = bench.decode(STEPS)
    assert bench.ids[0] == expected
    assert bench.ids[1] == expected[: end + 1]
    assert not generated.active.any()


def test_a_released_slot_generates_no_more_and_can_be_used_again():
    backbone = golden_backbone("llama-llama3")
    bench = Bench(backbone)
    bench.occupy(0, None, [1, 2, 3])
    bench.read((0, [1, 2, 3], True))
    bench.device.release([0])
    assert not bench.decode(STEPS).counts.any()
    bench.occupy(0, None, [5, 6, 7])
    bench.read((0, [5, 6, 7], True))
    bench.decode(STEPS), bench.decode(STEPS)
    assert bench.ids[0] == alone(backbone, None, [5, 6, 7])


def test_not_finite_logits_end_a_row_with_minus_one():
    backbone = golden_backbone("llama-llama3")
    bench = Bench(backbone)
    shape = backbone.prefix_shape(1)
    content = Content(keys=np.full(shape, np.nan, np.float32), values=np.zeros(shape, np.float32))
    stored = bench.load(0, content)
    bench.occupy(0, stored, [1, 2])
    bench.occupy(1, None, [1, 2])
    bench.read((0, [1, 2], True), (1, [1, 2], True))
    bench.decode(3)
    assert bench.ids[0] == [-1]
    assert bench.ids[1] == alone(backbone, None, [1, 2])[:4]
