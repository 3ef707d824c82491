"""Generation: matches stock transformers (golden files), and does not depend on other rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, golden_backbone, greedy
from flax import nnx

from softprompt import UserError
from softprompt.backbones.decoder import Decoder
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation import beams, decoding, engine
from softprompt.generation.engine import Engine, Request
from softprompt.generation.sampling import Sampling, choose, filter_logits, penalize

# As in golden/make_generation.py.
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.8},
]
SEARCHES = [
    {"beams": 2, "length_penalty": 1.0},
    {"beams": 3, "length_penalty": 0.0},
    {"beams": 4, "length_penalty": 2.0},
    {"beams": 4, "length_penalty": -1.0},
    {"beams": 3, "length_penalty": 1.0, "repetition_penalty": 1.5},
]
NEW_TOKENS = 12


def sampling(rows, **settings):
    return Sampling.from_settings(GenerationSettings(**settings), rows)


def prefill(backbone, vectors):
    return jax.jit(lambda backbone, vectors: backbone.prefill(vectors))(backbone, vectors)


def request(base, text, prefix=None):
    return Request(base.tokenizer(text, add_special_tokens=False).input_ids, prefix)


@pytest.fixture(scope="module")
def prefix(tiny):
    return prefill(tiny.backbone, jax.random.normal(jax.random.key(0), (3, 32)))


@pytest.fixture
def generate(tiny, prefix):
    """Generate from texts that share one prefix."""

    def generate(texts, batch_size=4, **settings):
        how = GenerationSettings(**{"max_new_tokens": 10, **settings})
        requests = [request(tiny, text, prefix) for text in texts]
        return Engine(tiny.backbone, tiny.tokenizer, how).generate(requests, batch_size)

    return generate


@pytest.mark.usefixtures("optimized")
def test_64_greedy_tokens_match_transformers(smollm2):
    golden = np.load(GOLDEN / "smollm2_generation.npz")
    inputs = np.split(golden["inputs"], np.cumsum(golden["lengths"])[:-1])
    assert len(inputs) >= 20
    prefix = prefill(smollm2.backbone, jnp.asarray(golden["vectors"]))
    width = engine._rounded(int(max(golden["lengths"])))  # as the engine does, to share programs
    tokens = np.zeros((len(inputs), width), np.int32)
    for row, ids in zip(tokens, inputs, strict=True):
        row[: len(ids)] = ids
    result = greedy(
        smollm2.backbone,
        prefix.packed([prefix], [0] * len(inputs)),
        tokens,
        golden["lengths"],
        -1,
        count=64,
    )
    np.testing.assert_array_equal(result, golden["outputs"])

    end = smollm2.tokenizer.eos_token_id
    requests = [Request(smollm2.tokenizer(str(text)).input_ids, prefix) for text in golden["texts"]]
    assert [list(each.tokens) for each in requests] == [ids.tolist() for ids in inputs]
    generated = Engine(smollm2.backbone, smollm2.tokenizer, GenerationSettings()).generate(
        requests, 24
    )
    for result, ids in zip(generated, golden["outputs"].tolist(), strict=True):
        ended = end in ids
        expected = ids[: ids.index(end)] if ended else ids
        assert result.text == smollm2.tokenizer.decode(expected)
        assert result.ended == [ended]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_filtered_logits_match_transformers(number):
    golden = np.load(GOLDEN / "choices.npz")
    logits = jnp.asarray(golden["logits"])
    rules = sampling(len(logits), **SETTINGS[number])
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, golden["seen"], True, axis=1)
    logits = penalize(logits, jnp.asarray(seen), rules.repetition_penalty)
    np.testing.assert_allclose(filter_logits(logits, rules), golden[str(number)], rtol=1e-5)


def test_rows_with_different_settings_share_a_batch():
    """Each row keeps the same tokens as alone, and greedy rows take the most likely token."""
    golden = np.load(GOLDEN / "choices.npz")
    settings = [*SETTINGS, {}, {"repetition_penalty": 2.0}]
    count = len(settings)
    logits = jnp.asarray(golden["logits"])[np.arange(count) % len(golden["logits"])]
    seen = jax.random.bernoulli(jax.random.key(0), 0.3, logits.shape)
    keys = jax.random.split(jax.random.key(1), count)
    rules = [sampling(1, **one) for one in settings]
    each = [
        rule if rule.temperature is not None else dataclasses.replace(rule, temperature=np.zeros(1))
        for rule in rules
    ]
    mixed = jax.tree.map(lambda *rows: np.concatenate(rows), *each)
    kept, chosen = filter_logits(logits, mixed), choose(logits, seen, keys, mixed)
    for i, one in enumerate(each):
        row = slice(i, i + 1)
        np.testing.assert_array_equal(kept[row], filter_logits(logits[row], one))
        assert chosen[i] == choose(logits[row], seen[row], keys[row], one)[0]
        if rules[i].temperature is None:
            assert chosen[i] == choose(logits[row], seen[row], keys[row], rules[i])[0]
            penalized = penalize(logits[row], seen[row], one.repetition_penalty)
            assert chosen[i] == penalized.argmax()


def test_a_top_p_of_one_does_not_widen_top_k():
    logits = jax.random.normal(jax.random.key(0), (50, 1000))
    kept = filter_logits(logits, sampling(50, temperature=1.0, top_k=5, top_p=1.0))
    np.testing.assert_array_equal((kept > -jnp.inf).sum(axis=1), 5)


def test_many_beams_and_low_length_penalties_work(generate, tiny):
    many = generate(["ab"], beams=200, samples=200, max_new_tokens=2)[0]
    assert len(many.texts) == 200
    assert len(set(many.texts)) > 50  # not all 200, because not all bytes decode
    short = generate(["ab"], beams=3, samples=3, length_penalty=-4.0, max_new_tokens=60)[0]
    assert any(short.texts)


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, axis=0)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(jax.random.categorical)(
        keys, filter_logits(logits, sampling(4000, temperature=0.5))
    )
    squares = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=4) / 4000, squares / squares.sum(), atol=0.02
    )


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("number", range(len(SEARCHES)))
def test_beams_match_transformers(name, number, tiny):
    golden, settings = np.load(GOLDEN / f"beams-{name}.npz"), SEARCHES[number]
    backbone = tiny.backbone if name == "llama" else golden_backbone("t5-gated")
    penalty, width = settings.get("repetition_penalty"), settings["beams"]
    prefix = prefill(backbone, jnp.asarray(golden["vectors"]))
    packed = prefix.packed([prefix], [0] * 5)
    seen = None if penalty is None else np.zeros((5 * width, backbone.arch.vocab_size), bool)
    arguments = (
        sampling(5 * width, repetition_penalty=penalty).repetition_penalty,
        golden["end"].repeat(5)[:, None],
        np.float32(settings["length_penalty"]),
        np.array(NEW_TOKENS),
    )
    tokens, lengths = golden["tokens"], np.full(5, 6)
    shape = {"capacity": 16, "beams": width}
    state = beams.start(backbone, packed, tokens, lengths, seen, *arguments, **shape)
    state = beams.continue_search(backbone, packed.repeated(width), state, *arguments)
    expected = golden[f"{number} written"]
    lengths = np.asarray(state.finished.lengths)
    assert (lengths < NEW_TOKENS).any() or settings["length_penalty"] > 0  # some have ended
    for row in range(5):
        for beam in range(width):
            found = state.finished.tokens[row, beam, : lengths[row, beam]]
            np.testing.assert_array_equal(found, expected[row, beam, : lengths[row, beam]])
    np.testing.assert_allclose(
        state.finished.scores, golden[f"{number} scores"], rtol=1e-4, atol=1e-5
    )


def test_beam_search_returns_the_best_text_first(generate):
    (two,) = generate(["first"], beams=4, samples=2)
    assert len(two.texts) == 2
    (one,) = generate(["first"], beams=4)
    assert one.texts == two.texts[:1]


TEXTS = ["aaaaaaa", "z", "mm and more", "the fourth", "z"]
HOW = [
    {},
    {"temperature": 1.0, "top_k": 30},
    {"temperature": 0.8, "samples": 3, "seed": 5},
    {"repetition_penalty": 1.4},
    {"beams": 3, "samples": 2},
    {"stop": ["e", "xy"]},
    {"temperature": 1.0, "samples": 2, "stop": ["e", "xy"]},
    {"max_new_tokens": 1},
]


@pytest.mark.parametrize("settings", HOW, ids=str)
def test_a_row_gets_the_same_text_as_alone(generate, settings):
    together = generate(TEXTS, **settings)
    assert together == [generate([text], **settings)[0] for text in TEXTS]
    assert together[1] == together[4]
    assert all(len(each.texts) == settings.get("samples", 1) for each in together)
    assert any(text for each in together for text in each.texts)


def test_draws_depend_on_the_seed(generate):
    settings = {"temperature": 1.0, "samples": 4}
    first = generate(TEXTS, seed=1, **settings)
    assert generate(TEXTS, seed=1, **settings) == first
    assert generate(TEXTS, seed=2, **settings) != first
    assert len(set(first[0].texts)) > 1
    assert first[0].texts[0] != first[3].texts[0]


def test_every_input_and_every_sample_has_its_own_seed(tiny):
    one = Engine(tiny.backbone, tiny.tokenizer, GenerationSettings(temperature=1.0, samples=3))
    asked = [request(tiny, text) for text in ("ab", "cd", "ab")]
    seeds = one._seeds(asked, 4).reshape(4, 3)
    assert len({*seeds[:2].flat}) == 6
    assert seeds[2].tolist() == seeds[0].tolist()


class CountingDecoder(Decoder):
    """A decoder that counts the calls of `decode` while a program runs."""

    calls = 0

    def decode(self, tokens, cache, prefix):
        jax.debug.callback(self.count)
        return super().decode(tokens, cache, prefix)

    @classmethod
    def count(cls):
        cls.calls += 1


def test_decoding_stops_when_all_rows_have_ended(tiny):
    backbone = nnx.clone(tiny.backbone)
    backbone.__class__ = CountingDecoder
    one = Engine(backbone, tiny.tokenizer, GenerationSettings(max_new_tokens=40))
    prefix, state = one._start([request(tiny, "abc")], 1)
    (ids,) = one._ids(one._continue(prefix, state, 40))
    jax.effects_barrier()
    assert CountingDecoder.calls == 39
    one._end = ids[3]
    prefix, state = one._start([request(tiny, "abc")], 1)
    length = ids.index(ids[3]) + 1
    assert int(one._continue(prefix, state, 40).lengths[0]) == length
    jax.effects_barrier()
    assert CountingDecoder.calls == 39 + length - 1


def test_every_row_stops_at_its_own_limit_and_end_token(tiny):
    """Rows that have reached their limit continue with the same tokens when it is raised."""
    one = Engine(tiny.backbone, tiny.tokenizer, GenerationSettings(max_new_tokens=16))
    asked = [request(tiny, text) for text in ("abc", "a longer text", "z", "abc")]

    def started():
        return one._start(asked, 4)[1]

    everything = one._ids(one._continue(None, started(), 16))
    ends = np.full((4, 2), -1)
    ends[3] = [-1, everything[3][5]]
    state = dataclasses.replace(started(), ends=jnp.asarray(ends))
    limits = [3, 9, 1, 16], [12, 9, 16, 16]
    for until in limits:
        state = decoding.continue_decoding(tiny.backbone, None, state, np.array(until))
        length = everything[3].index(everything[3][5]) + 1
        expected = [ids[:n] for ids, n in zip(everything, [*until[:3], length], strict=True)]
        assert one._ids(state) == expected
    assert state.done.tolist() == [False, False, False, True]


@pytest.mark.parametrize("penalty", [None, 1e6])
def test_the_repetition_penalty_applies_to_the_input_and_the_generated_text(tiny, prefix, penalty):
    """A large penalty excludes every token that has occurred before."""
    how = GenerationSettings(max_new_tokens=40, repetition_penalty=penalty)
    one = Engine(tiny.backbone, tiny.tokenizer, how)
    one._end = -1  # otherwise the text ends before it repeats itself
    asked = dataclasses.replace(request(tiny, "abcdefg", prefix), opening=[100, ~0])
    packed, state = one._start([asked], 1)
    (ids,) = one._ids(one._continue(packed, state, 40))
    again = [token for i, token in enumerate(ids) if token in [*ids[:i], *asked.tokens, 100]]
    assert len(ids) == 40
    assert bool(again) == (penalty is None)


def test_a_stop_text_ends_the_text_and_is_removed(generate):
    (free,) = generate(["aaaaaaa"], max_new_tokens=30)
    stop = free.text[4:7]
    (stopped,) = generate(["aaaaaaa"], max_new_tokens=30, stop=["never there", stop])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (free.ended, stopped.ended) == ([False], [True])
    (searched,) = generate(["aaaaaaa"], max_new_tokens=30, beams=2)
    stop = searched.text[3:6]
    (cut,) = generate(["aaaaaaa"], max_new_tokens=30, beams=2, stop=[stop])
    assert cut.text == searched.text[: searched.text.index(stop)]


def test_the_stop_text_that_is_completed_first_ends_the_text(tiny, prefix, generate):
    one = Engine(tiny.backbone, tiny.tokenizer, GenerationSettings(stop=["bcdef", "cd"]))
    ids = tiny.tokenizer.encode("abcdefg", add_special_tokens=False)
    assert one._answer.text(ids) == ("ab", True)
    (free,) = generate(["aaaaaaa"], max_new_tokens=30)
    long, short = free.text[3:12], free.text[6:8]
    settings = {"max_new_tokens": 30, "stop": [long, short]}
    (stopped,) = generate(["aaaaaaa"], **settings)
    assert stopped.text == free.text[: free.text.index(short)]
    one = Engine(tiny.backbone, tiny.tokenizer, GenerationSettings(**settings))
    assert "".join(one.stream(request(tiny, "aaaaaaa", prefix))) == stopped.text


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"stop": [" ", "e"]}], ids=str)
def test_a_stream_yields_the_text_in_pieces(tiny, prefix, generate, settings):
    how = GenerationSettings(max_new_tokens=20, **settings)
    one = Engine(tiny.backbone, tiny.tokenizer, how)
    pieces = list(one.stream(request(tiny, "the fourth", prefix)))
    assert "".join(pieces) == generate(["the fourth"], max_new_tokens=20, **settings)[0].text
    assert len(pieces) > 1 or settings.get("stop")
    with pytest.raises(UserError, match="streaming supports neither beam search"):
        next(
            Engine(tiny.backbone, tiny.tokenizer, GenerationSettings(beams=2)).stream(
                request(tiny, "a")
            )
        )


def test_the_possible_start_of_a_stop_text_is_held_back(tiny):
    one = Engine(tiny.backbone, tiny.tokenizer, GenerationSettings(stop=["\n\n", "END"]))
    held = {"abc": 0, "abc\n": 1, "abc E": 1, "abc EN": 2, "ab\N{REPLACEMENT CHARACTER}": 1}
    assert {text: one._answer._uncertain(text) for text in held} == held


def out_of_memory(max_rows, function):
    """Wrap a function so that batches of more than `max_rows` rows run out of memory."""

    def start(backbone, prefix, tokens, *rest, **shape):
        if len(tokens) > max_rows:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        return function(backbone, prefix, tokens, *rest, **shape)

    return start


def test_a_batch_that_is_too_large_is_halved_until_it_fits(tiny, generate, monkeypatch, capsys):
    expected = generate(TEXTS)
    monkeypatch.setattr(engine.decoding, "start", out_of_memory(1, decoding.start))
    assert generate(TEXTS) == expected
    messages = capsys.readouterr().err
    assert "trying 2 instead of 4 inputs at a time" in messages
    assert "trying 1 instead of 2 inputs at a time" in messages
    assert messages.count("out of memory") == 2
    monkeypatch.setattr(engine.decoding, "start", out_of_memory(0, decoding.start))
    with pytest.raises(UserError, match="out of memory with a single input"):
        generate(TEXTS)
    one = Engine(tiny.backbone, tiny.tokenizer, GenerationSettings())
    with pytest.raises(UserError, match="out of memory with a single input"):
        next(one.stream(request(tiny, "a")))


def test_other_device_errors_are_raised(generate, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(engine.decoding, "start", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        generate(TEXTS)


def test_input_lengths_are_rounded_to_few_values():
    assert [engine._rounded(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 65, 97)] == [
        *(16, 16, 24, 24, 32, 48, 48, 64, 96, 128)
    ]


def test_the_prefixes_of_a_batch_have_a_bounded_total_length(prefix):
    long = dataclasses.replace(prefix, keys=jnp.zeros((3, 300, 2, 8)))
    other = dataclasses.replace(long)
    requests = [Request([1] * n, p) for n, p in ((1, long), (2, other), (3, long), (4, prefix))]
    assert list(engine._mixable_groups(requests)) == [[0, 2], [1, 3]]
    assert list(engine._mixable_groups(requests[2:])) == [[0, 1]]
    assert list(engine._mixable_groups([Request([1], None), *requests[::2]])) == [[0, 1, 2]]
