"""The prompt bank: each row of a mixed batch gets the same text as with its prompt alone."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import compiled_programs
from conftest import write_experiment

from softprompt import Generator, SoftPrompt, UserError, load_base, load_experiment, train
from softprompt.backbones.prefix import Prefix
from softprompt.data.task import make_task
from softprompt.evaluation.scoring import make_prefix
from softprompt.experiment.schema import TemplateSettings
from softprompt.inference.prompt import TrainedPrompt
from softprompt.methods.lora import LoRA
from softprompt.methods.prefix_tuning import PrefixTuning

NEW = {"max_new_tokens": 6}


def trained(base, method, template="{text}:", length=0, prefix_length=0):
    """Make a trained prompt from a function that returns a method for an opening."""
    task = make_task(
        base,
        TemplateSettings(input=template),
        None,
        virtual_tokens=length,
        prefix_length=prefix_length,
    )
    backbone = method(task.opening).adapt(base.backbone)
    made = method(task.opening)
    return TrainedPrompt(base, made, backbone, make_prefix(made, backbone), task, {})


def soft_prompt(base, seed, length, template="{text}:"):
    width = base.backbone.arch.hidden_size
    vectors = jax.random.normal(jax.random.key(seed), (length, width))
    return trained(base, lambda opening: SoftPrompt(vectors, opening), template, length)


def prefix_tuning(base, seed, length):
    shape = base.backbone.prefix_shape(length)
    keys, values = jax.random.normal(jax.random.key(seed), (2, *shape))
    return trained(base, lambda opening: PrefixTuning(keys, values, opening), prefix_length=length)


def lora(base):
    random = np.random.default_rng(0)
    arch = base.backbone.arch
    layers, width = len(arch.layers), arch.num_heads * arch.head_size
    path = "layers.attention.query"
    down, up = (
        random.normal(size=(layers, arch.hidden_size, 2)),
        random.normal(size=(layers, 2, width)),
    )
    matrices = {path: (jnp.asarray(down, jnp.float32), jnp.asarray(up, jnp.float32))}
    return trained(base, lambda opening: LoRA(matrices, {path: 0.5}, opening=opening))


@pytest.fixture(scope="module")
def t5(t5_folder):
    return load_base(str(t5_folder))


@pytest.fixture(params=["llama", "t5"])
def base(request, tiny, t5):
    return tiny if request.param == "llama" else t5


@pytest.fixture
def bank(base):
    """Prompts of several lengths and forms. The opening of "told" includes text."""
    return {
        "short": soft_prompt(base, 0, 2),
        "long": soft_prompt(base, 1, 9),
        "told": soft_prompt(base, 2, 3, "Letters {text}"),
        "keys": prefix_tuning(base, 3, 4),
        "inside": soft_prompt(base, 4, 2, "{text} {prompt}"),
    }


INPUTS = ["abc", "d", "efghijk", "abc", "lm", "abc", "abc", "no"]
NAMES = ["short", "long", None, "told", "keys", "inside", "long", None]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "samples": 2}, {"beams": 2}], ids=str
)
def test_a_row_of_a_mixed_batch_gets_the_text_of_its_prompt_alone(base, bank, settings):
    settings = NEW | settings
    mixed = Generator(base, bank).generate(INPUTS, NAMES, **settings)
    for result, text, name in zip(mixed, INPUTS, NAMES, strict=True):
        if name is not None:
            assert result == bank[name].generate([text], **settings)[0]
        assert result == Generator(base, bank).generate([text], name, **settings)[0]
    assert len({each.text for each in mixed if each.text}) > 4


def test_a_prompt_gives_the_same_text_as_prepending_its_vectors(tiny):
    """The reference uses no cache, no bank and no padding."""
    prompt = soft_prompt(tiny, 0, 5)
    (result,) = Generator(tiny, {"one": prompt, "two": soft_prompt(tiny, 1, 3)}).generate(
        ["hello"], "one", **NEW
    )
    tokens = tiny.tokenizer("hello:", add_special_tokens=False).input_ids
    for _ in range(NEW["max_new_tokens"]):
        embeddings = prompt.method(tiny.backbone.embedding(jnp.array([tokens])))
        tokens.append(int(tiny.backbone.logits(tiny.backbone(embeddings))[0, -1].argmax()))
    assert result.text == tiny.tokenizer.decode(tokens[-6:])


def test_methods_that_change_the_model_run_in_their_own_batches(tiny):
    bank = {"lora": lora(tiny), "soft": soft_prompt(tiny, 0, 2)}
    names = ["lora", "soft", "lora", None]
    texts = ["abc", "abc", "de", "abc"]
    mixed = Generator(tiny, bank).generate(texts, names, **NEW)
    for result, text, name in zip(mixed, texts, names, strict=True):
        if name:
            assert result == bank[name].generate([text], **NEW)[0]
    assert len({mixed[i].text for i in (0, 1, 3)}) == 3


def test_adding_and_removing_prompts_compiles_nothing(tiny):
    generator = Generator(tiny, {"a": soft_prompt(tiny, 0, 2), "b": soft_prompt(tiny, 1, 100)})
    others = [("c", soft_prompt(tiny, 2, 57)), ("d", prefix_tuning(tiny, 3, 11))]
    texts = ["abc", "de", "fgh", "i"]
    generator.generate(texts, ["a", "b", None, "a"], **NEW)
    generator.generate(texts, "a", **NEW)
    with compiled_programs() as compiled:
        for name, prompt in others:
            generator.add(name, prompt)
        mixed = generator.generate(texts, ["d", "b", "c", None], **NEW)
        for name in "cd":
            assert generator.generate(texts, name, **NEW) != mixed
        generator.remove("a")
        generator.generate(texts, ["b", "b", "c", None], **NEW)
        assert not compiled


def test_inputs_with_named_fields_can_be_streamed(tiny):
    prompt = soft_prompt(tiny, 0, 2, "{question} {text}:")
    generator = Generator(tiny, {"qa": prompt})
    fields = {"question": "ab", "text": "cd"}
    (result,) = generator.generate([fields], "qa", **NEW)
    assert "".join(generator.stream(fields, "qa", **NEW)) == result.text


def test_invalid_arguments_are_rejected(tiny, t5):
    generator = Generator(tiny, {"a": soft_prompt(tiny, 0, 2)})
    with pytest.raises(UserError, match="no prompt 'b' in the bank; it has 'a'"):
        generator.generate(["x"], "b")
    with pytest.raises(UserError, match="no prompt 'b' in the bank"):
        generator.remove("b")
    with pytest.raises(UserError, match="a prompt named 'a' already exists"):
        generator.add("a", soft_prompt(tiny, 0, 2))
    with pytest.raises(UserError, match="prompt 'b': it was trained on the base model"):
        generator.add("b", soft_prompt(t5, 0, 2))
    with pytest.raises(UserError, match="input 2: field 'text' is empty"):
        generator.generate(["x", " "], ["a", "a"])
    with pytest.raises(UserError, match="2 inputs but 1 prompt names"):
        generator.generate(["x", "y"], ["a"])
    with pytest.raises(UserError, match="give a list of inputs"):
        generator.generate("x", "a")
    with pytest.raises(UserError, match="temprature: unknown setting"):
        generator.generate(["x"], "a", temprature=1.0)
    with pytest.raises(UserError, match="top_p needs a temperature"):
        generator.generate(["x"], "a", top_p=0.5)
    with pytest.raises(
        UserError, match="max_new_tokens 1000: the context window of the base model has 128"
    ):
        generator.generate(["x"], "a", max_new_tokens=1000)
    assert generator.generate([], "a") == []
    assert generator.prompts == ["a"]


def test_truncation_of_a_long_input_is_logged(tiny, capsys):
    generator = Generator(tiny, {"a": soft_prompt(tiny, 0, 2)})
    (cut,) = generator.generate(["a" * 500], "a", max_new_tokens=20)
    assert "inputs: 1 truncated to 106 tokens" in capsys.readouterr().err
    assert cut == generator.generate(["a" * 105], "a", max_new_tokens=20)[0]


def test_the_bank_accepts_run_folders(tmp_path, tiny):
    path = write_experiment(tmp_path)
    text = path.read_text().replace('verbalizer: {low: " ab", high: " cd"}\n', "")
    path.write_text(text.replace("metric: accuracy", "metric: loss, samples: 0"))
    train(load_experiment(path, ["training.steps=1"]), tmp_path / "run")
    generator = Generator(tiny, {"letters": tmp_path / "run"})
    assert len(generator.generate(["abc"], "letters", **NEW)) == 1


def test_the_bank_accepts_methods(tiny):
    """Without a task, the input is the text alone."""
    vectors = jax.random.normal(jax.random.key(0), (4, tiny.backbone.arch.hidden_size))
    prompt = soft_prompt(tiny, 0, 4, "{text}")
    generator = Generator(tiny, {"method": SoftPrompt(vectors, [~i for i in range(4)])})
    generator.add("trained", prompt)
    first, second = generator.generate(["abc"] * 2, ["method", "trained"], **NEW)
    assert first == second


def test_the_repr_is_short(tiny):
    generator = Generator(tiny, {"a": soft_prompt(tiny, 0, 2)})
    assert repr(generator) == f"Generator({tiny.name!r}, prompts=['a'])"


def test_progress_is_reported(tiny):
    done = []

    class Bar(contextlib.AbstractContextManager):
        def __exit__(self, *_):
            pass

        def advance(self, count=1, note=""):
            done.append(count)

    generator = Generator(tiny, {"a": soft_prompt(tiny, 0, 2)})
    generator.generate(["abc", "d", "e"], "a", progress=lambda *_, **__: Bar(), **NEW)
    assert sum(done) == 3


@pytest.mark.parametrize(
    ("lengths", "rows", "width"),
    [
        ([128, 128, 128, 128], [3, 0, 1, 2], 512),
        ([100, 1, 130, 200, 81], [4, 0, None, 2, 1, 3], 512),
        ([600], [None, 0], 2048),
        ([1, 600, 2], [2, 1, 0], 2048),
        ([2100], [None, 0], 4096),
    ],
)
def test_packed_prefixes_are_concatenated(lengths, rows, width):
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(2, 2, n, 1, 4)).astype(np.float32) for n in lengths]
    packed = Prefix.packed([Prefix(*map(jnp.asarray, pair)) for pair in arrays], rows)
    joined = np.concatenate(arrays, axis=2)
    padding = [(0, 0), (0, 0), (0, width - joined.shape[2]), (0, 0), (0, 0)]
    np.testing.assert_array_equal([packed.keys, packed.values], np.pad(joined, padding))
    for row, (begin, end) in zip(rows, packed.spans, strict=True):
        expected = np.zeros((2, 0, 1, 4)) if row is None else arrays[row][0]
        np.testing.assert_array_equal(packed.keys[:, begin:end], expected)


def test_a_single_prompt_needs_no_packing(tiny):
    """All its batches share one padded prefix, which stays on the device."""
    prefix = soft_prompt(tiny, 0, 5).prefix
    packed = Prefix.packed([prefix], [0] * 4)
    assert packed is prefix.padded is Prefix.packed([prefix], [0])
    assert packed.keys.shape[1] == 128
    assert packed.spans.tolist() == [[0, 5]]
