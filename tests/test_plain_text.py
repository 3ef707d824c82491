"""Plain text: every token of a document is a target, in rows of a limited length."""

import copy
import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest
from conftest import batch_of, letter_tokenizer, write_experiment

from softprompt import (
    Model,
    Record,
    SoftPrompt,
    TemplateSettings,
    UserError,
    cross_entropy,
    load_base,
    load_experiment,
    load_prompt,
    make_examples,
    make_task,
    train,
)
from softprompt.cli.main import main
from softprompt.data.batches import TrainingBatches

TEXT = TemplateSettings(text="text", max_tokens=8)
END = 0  # the end-of-text token of the small model


def whole(example) -> list[int]:
    """Return the tokens of a row, in the order in which they are read and predicted."""
    return [*example.input, *example.candidates[0]]


def test_a_document_is_a_row(tiny):
    task = make_task(tiny, TEXT, None, virtual_tokens=3)
    assert task.opening == [-1, -2, -3]
    (example,) = make_examples(task, [{"text": "abcdefg"}])
    ids = tiny.tokenizer("abcdefg").input_ids
    assert whole(example) == [*ids, END]
    assert len(example.input) == 1
    (shortest,) = make_examples(task, [{"text": "a"}])
    assert whole(shortest) == [*tiny.tokenizer("a").input_ids, END]


@pytest.mark.parametrize("length", [8, 14, 15, 16, 50])
def test_a_long_document_is_divided_and_every_token_is_predicted_once(tiny, length):
    task = make_task(tiny, TEXT, None)
    text = "".join(chr(97 + i % 26) for i in range(length))
    examples = make_examples(task, [{"text": "hi"}, {"text": text}, {"text": "ho"}])
    rows = [whole(example) for example in examples][1:-1]
    ids = [*tiny.tokenizer(text).input_ids, END]
    assert all(len(row) == 8 for row in rows[:-1])
    assert 2 <= len(rows[-1]) <= 8
    assert all(row[-1] == following[0] for row, following in itertools.pairwise(rows))
    assert [token for example in examples[1:-1] for token in example.candidates[0]] == ids[1:]
    assert all(len(example.input) == 1 for example in examples)
    assert examples.truncated == 0
    assert len({example.record.where for example in examples}) == 3


@pytest.fixture(scope="module")
def starting(tiny):
    """The small model with a tokenizer that adds two tokens before a text."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "<|start|> <|pad|> $A", special_tokens=[("<|start|>", 1), ("<|pad|>", 2)]
    )
    return dataclasses.replace(tiny, tokenizer=tokenizer)


def test_start_tokens_are_read_and_not_predicted(starting):
    task = make_task(starting, TEXT, None, virtual_tokens=2)
    assert task.opening == [-1, -2]  # a row needs a token of its own
    (example,) = make_examples(task, [{"text": "ab"}])
    assert example.input == [1, 2]
    ids = starting.tokenizer("ab", add_special_tokens=False).input_ids
    assert example.candidates == [[*ids, END]]
    first, second = make_examples(task, [{"text": "abcdefgh"}])
    assert first.input == [1, 2]
    assert len(whole(first)) == 8
    assert len(second.input) == 1
    with pytest.raises(UserError, match=r"^f:1: a row of 2 tokens has no space .* after 2 others"):
        make_task(starting, TemplateSettings(text="text", max_tokens=2), None).example(
            Record({"text": "ab"}, "f:1")
        )


def test_the_virtual_tokens_of_a_task_stand_in_every_row(tiny):
    task = make_task(tiny, TEXT, None, virtual_tokens=2, tasks=["a", "b"])
    rows = make_examples(task, [{"text": "abcdefgh", "task": "b"}])
    assert [example.input[:2] for example in rows] == [[~2, ~3]] * 2
    assert [len(whole(example)) for example in rows] == [8, 6]


def test_documents_do_not_attend_to_each_other(tiny):
    """The loss of a pack of documents is the sum of theirs alone."""
    task = make_task(tiny, TEXT, None, virtual_tokens=3)
    examples = list(make_examples(task, [{"text": t} for t in ("abc", "zyxwvutsrq", "abc")]))
    model = Model(SoftPrompt.from_vocabulary(tiny, 3, jax.random.key(0)), tiny.backbone)

    def loss(rows):
        return cross_entropy(model, batch_of(rows), jax.random.key(0))[0]

    np.testing.assert_allclose(loss(examples), sum(loss([e]) for e in examples), rtol=1e-5)
    batch = TrainingBatches(make_examples(task, [{"text": "abc"}] * 4), 4, 0)[0]
    assert batch.lengths.tolist() == [[3] * 4]
    assert (batch.target_candidates >= 0).sum() == 3 * 4


def test_the_bar_counts_documents(tiny):
    counts = []

    class Bar:
        def __init__(self, label, total, unit, done=0):
            self.total = total

        def __enter__(self):
            return self

        def __exit__(self, *args):
            counts.append(self.total)

        def advance(self, count=1, note=""):
            counts.append(count)

    task = make_task(tiny, TEXT, None)
    make_examples(task, [{"text": "a" * 30}, {"text": "b"}], progress=Bar)
    assert counts == [1, 1, 2]


def test_a_malformed_document_is_named(tiny):
    task = make_task(tiny, TEXT, None)
    rows = [Record({"text": "a"}, "f:1"), Record({"text": ["a"]}, "f:2")]
    with pytest.raises(UserError, match=r"^f:2: field 'text' is list, not text"):
        make_examples(task, rows)
    with pytest.raises(UserError, match=r"^f:3: no field 'text' \(its fields: body\)"):
        task.example(Record({"body": "a"}, "f:3"))


def test_an_encoder_decoder_is_rejected(t5_folder):
    with pytest.raises(UserError, match=r"^template.text: base .* is an encoder-decoder"):
        make_task(load_base(str(t5_folder)), TEXT, None)


def test_a_tokenizer_without_an_end_token_is_rejected(tiny):
    tokenizer = letter_tokenizer()
    tokenizer.eos_token = None
    task = make_task(dataclasses.replace(tiny, tokenizer=tokenizer), TEXT, None)
    with pytest.raises(UserError, match="no end-of-text token"):
        task.example(Record({"text": "a"}, "f:1"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.metrics=[chrf]", "template.text is measured by loss and perplexity, not chrf"),
        ("verbalizer={a: b, c: d}", "verbalizer cannot be used with template.text"),
        ("shots=1", "shots cannot be used with template.text"),
        ("template.chat=true", "text cannot be used with chat"),
    ],
)
def test_settings_that_do_not_fit_plain_text_are_named(text_file, override, message):
    with pytest.raises(UserError, match=message):
        load_experiment(text_file, [override])


@pytest.fixture
def text_file(tmp_path):
    path = write_experiment(tmp_path)
    text = path.read_text().replace('{input: "{text} is"}', "{text: text, max_tokens: 6}")
    text = text.replace('verbalizer: {low: " ab", high: " cd"}\n', "")
    path.write_text(text.replace("metric: accuracy", "metric: perplexity"))
    return path


def test_a_run_on_plain_text(text_file, tmp_path, capsys):
    experiment = load_experiment(text_file)
    assert experiment.template.model_dump(exclude_none=True) == {
        **{"text": "text", "chat": False, "max_tokens": 6}
    }
    summary = train(experiment, tmp_path / "run")
    for values in (summary["validation"], summary["test"]):
        assert set(values) == {"loss", "perplexity"}
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    prompt = load_prompt(tmp_path / "run")
    assert prompt.task.template == experiment.template
    with pytest.raises(UserError, match="perplexity needs free text"):
        prompt.perplexity(["a"], ["b"])
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["perplexity"] == pytest.approx(summary["test"]["perplexity"])
    # Generation continues a text, without an end-of-text token before the new one.
    example = prompt.task.example(Record({"text": "aaa"}, "a"), with_answer=False)
    assert example.input == prompt.base.tokenizer("aaa").input_ids
    (written,) = prompt.generate(["aaa"], max_new_tokens=2)
    assert main(["generate", str(tmp_path / "run"), "--max-new-tokens", "2", "aaa"]) == 0
    assert capsys.readouterr().out == f"{written.text}\n"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Plain text, which the model continues:\n\n```\n{text}\n```" in card
