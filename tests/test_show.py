"""What is trained on is shown as the model reads it, and likely mistakes are named once."""

import copy
import dataclasses
import json

import pytest
from conftest import example_of, letter_tokenizer, write_experiment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from softprompt import (
    Record,
    TemplateSettings,
    load_base,
    load_experiment,
    make_examples,
    make_task,
    train,
)
from softprompt.data.examples import Examples
from softprompt.data.mistakes import data_mistakes, template_mistakes
from softprompt.data.showing import counts_of, shown_example
from softprompt.sweep.runner import sweep
from softprompt.training import reporting

LABELS = {"low": " ab", "high": " cd"}
RECORD = {"text": "one\ttwo", "label": "high"}


def shown(task, record) -> str:
    return shown_example(task, task.example(Record(record, "a")))


def test_an_example_is_shown_as_it_is_read(tiny):
    template = TemplateSettings(input="Q {text}\n{prompt}A:")
    task = make_task(tiny, template, LABELS, virtual_tokens=3)
    assert shown(task, RECORD) == "Q·one⇥two⏎\n<3 virtual tokens>A:⟦·cd⟧"
    counts = counts_of(task, task.example(Record(RECORD, "a")))
    assert counts == "18 tokens, 3 of them virtual, 3 with loss"
    first = make_task(tiny, TemplateSettings(input="{text}"), LABELS, virtual_tokens=1)
    assert shown(first, RECORD) == "<1 virtual token>one⇥two⟦·cd⟧"


def test_the_shown_text_is_decoded_from_the_tokens(tiny):
    """Free text ends with the end-of-text token, and truncated text is not shown."""
    template = TemplateSettings(input="<|start|>{text}", target="{label}", max_tokens=8)
    task = make_task(tiny, template, None)
    record = {"text": "abcdefghi\U0001f642", "label": "\x1bx"}
    example = task.example(Record(record, "a"))
    assert shown_example(task, example) == "<|start|>abcd⟦\\x1bx<|endoftext|>⟧"
    assert counts_of(task, example) == "8 tokens, 3 with loss, truncated"


def test_shots_and_every_answer_of_a_conversation_are_shown(tiny):
    shots = [("one", " ab")]
    task = make_task(tiny, TemplateSettings(input="{text}"), LABELS, shots, virtual_tokens=2)
    assert shown(task, RECORD) == "<2 virtual tokens>one·ab⏎\n⏎\none⇥two⟦·cd⟧"
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ' ' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
    )
    base = dataclasses.replace(tiny, tokenizer=tokenizer)
    task = make_task(base, TemplateSettings(messages="messages"), None, virtual_tokens=2)
    turns = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "hijk", strict=True)
    ]
    assert shown(task, {"messages": turns}) == (
        "<2 virtual tokens>u·h<|endoftext|>⏎\na·⟦i<|endoftext|>⟧⏎\n"
        "u·j<|endoftext|>⏎\na·⟦k<|endoftext|>⟧"
    )


def test_an_encoder_decoder_shows_what_the_decoder_predicts(t5_folder):
    base = load_base(str(t5_folder))
    task = make_task(base, TemplateSettings(input="{text}"), None, virtual_tokens=2)
    record = {"text": "one two", "label": "six"}
    assert shown(task, record) == "<2 virtual tokens>one·two</s>\ndecoder: ⟦six</s>⟧"


def test_a_leading_space_is_visible_although_the_tokenizer_hides_it(tiny):
    words = ["<unk>", "▁one", "▁two", "▁", "a", "▁a", "one"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<unk>")
    assert tokenizer.decode([2]) == "two"
    base = dataclasses.replace(tiny, tokenizer=tokenizer)
    task = make_task(base, TemplateSettings(input="{text}"), None)
    example = example_of([1], [[2, 0]], 0)
    assert shown_example(task, example) == "·one⟦·two<unk>⟧"


def mistakes(base, template: dict, labels=None, records=None, **more) -> list[str]:
    task = make_task(base, TemplateSettings(**template), labels, **more)
    return list(template_mistakes(task, make_examples(task, records or [RECORD] * 3)))


def test_a_good_template_has_no_mistakes(tiny):
    assert mistakes(tiny, {"input": "Q {text} A:"}, LABELS, virtual_tokens=2) == []
    assert mistakes(tiny, {"input": "{text}", "target": " {label}"}) == []
    assert mistakes(tiny, {"input": "Q {text} A: {prompt}"}, LABELS, virtual_tokens=2) == []
    assert mistakes(tiny, {"text": "text"}) == []


DOUBLED = (
    "row 0: the input ends with a space and the text of label 'low' begins with one, so the model "
    "reads two; remove one of them"
)


@pytest.mark.parametrize(
    ("template", "labels", "expected"),
    [
        ({"input": "{text} "}, LABELS, DOUBLED),
        (
            {"input": "{text}", "target": " {label}"},
            LABELS,
            "row 0: the text of label 'low' begins with two spaces; remove one of them",
        ),
        (
            {"input": "{text} ", "target": " {label}"},
            None,
            "row 0: the input ends with a space and the target begins with one, so the model reads "
            "two; remove one of them",
        ),
        (
            {"input": "{text} "},
            {"low": "ab", "high": "cd"},
            "template.input ends with a space, but most tokenizers join a space with the word "
            "after it; move it to the beginning of the texts of the verbalizer",
        ),
        (
            {"input": "{text} "},
            None,
            "template.input ends with a space, but most tokenizers join a space with the word "
            "after it; move it to the beginning of template.target",
        ),
        (
            {"input": "{text}"},
            {"low": " ab", "high": " abc"},
            "the text of label 'high' begins with the text of label 'low', so it is never more "
            "probable; use other texts",
        ),
    ],
)
def test_a_likely_mistake_of_a_template_is_named(tiny, template, labels, expected):
    assert mistakes(tiny, template, labels) == [expected]


def test_a_space_at_the_end_of_a_field_is_found_in_a_later_record(tiny):
    records = [RECORD, {**RECORD, "text": "one "}]
    (found,) = mistakes(tiny, {"input": "{text}"}, LABELS, records)
    assert found.startswith("row 1: the input ends with a space")


def test_two_beginning_of_text_tokens_are_found(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    base = dataclasses.replace(tiny, tokenizer=tokenizer)
    for more in ({}, {"virtual_tokens": 3}):
        assert mistakes(base, {"input": "{text}"}, LABELS, **more) == []
        (found,) = mistakes(base, {"input": "<|start|>{text}"}, LABELS, **more)
        assert found.startswith("a row begins with two beginning-of-text tokens (<|start|>)")


def test_mistakes_of_the_data_are_named(tiny):
    task = make_task(tiny, TemplateSettings(input="{text}", max_tokens=8), LABELS)
    low = {"text": "short", "label": "low"}
    long = {"text": "much too long", "label": "low"}
    assert (
        list(data_mistakes(task, make_examples(task, [low, long, {**low, "label": "high"}]))) == []
    )
    truncated, missing = data_mistakes(task, make_examples(task, [low, long, long]))
    assert truncated.startswith("2 of 3 training examples are truncated; raise template.max_tokens")
    assert missing.startswith("label 'high' of the verbalizer never occurs in the training data")
    free = make_task(tiny, TemplateSettings(input="{text}"), None)
    assert list(data_mistakes(free, Examples([example_of([3], [[4]], 0)]))) == []


def test_training_logs_an_example_and_each_mistake_once(tmp_path, capsys):
    path = write_experiment(tmp_path, 5, 5)
    experiment = load_experiment(path, ["training.steps=1", 'template.input="{text} is "'])
    train(experiment, tmp_path / "run")
    written = capsys.readouterr().err
    text = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["text"]
    assert f"<3 virtual tokens>{text}·is·⟦·" in written
    assert "(15 tokens, 3 of them virtual, 3 with loss; loss on ⟦…⟧; · is a space" in written
    assert written.count("likely mistake: ") == 1
    assert f"{tmp_path}/train.jsonl:1: the input ends with a space" in written


def test_a_sweep_logs_each_dataset_once(space, capsys):
    section = (
        "  training.steps: [1, 2]\n  template.input: ['{text} is ', '{text} was']\n  at_once: 1\n"
    )
    sweep(space(section, "evaluation.every=2"))
    written = capsys.readouterr().err
    assert written.count("; loss on ⟦…⟧") == 2
    assert written.count("·is·⟦·") == written.count("·was⟦·") == 1
    assert written.count("likely mistake: ") == 1


def test_a_long_example_is_shortened_in_the_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reporting, "_LONGEST_EXAMPLE", 40)
    path = write_experiment(tmp_path, 40, 40)
    train(load_experiment(path, ["training.steps=1"]), tmp_path / "run")
    text = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["text"]
    assert f"\n  <3 virtual tokens>{text[:2]} … " in capsys.readouterr().err


def test_the_command_shows_examples_and_trains_nothing(tmp_path, call):
    path = write_experiment(tmp_path, 5, 5)
    records = [
        json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()
    ]
    status, out, err = call("show", path, "--split", "validation", "--number", 2)
    assert status == 0
    legend, *examples = out.split("\n\n")
    assert legend == "loss on ⟦…⟧; · is a space, ⏎ a line break, ⇥ a tab"
    ends = {"low": "·ab", "high": "·cd"}
    assert examples == [
        f"{tmp_path}/validation.jsonl:{number} (14 tokens, 3 of them virtual, 3 with loss):\n"
        f"<3 virtual tokens>{record['text']}·is⟦{ends[record['label']]}⟧" + "\n" * (number == 2)
        for number, record in enumerate(records[:2], 1)
    ]
    assert "likely mistake" not in err
    assert not (tmp_path / "runs").exists()
    assert call("show", path)[1].count("virtual tokens>") == 3
    assert call("show", path, "--number", 999)[1].count("virtual tokens>") == 30
    _, _, err = call("show", path, 'template.input="{text} is "')
    assert err.count("likely mistake: ") == 1


def test_the_rows_of_plain_text_are_shown(tmp_path, call):
    path = write_experiment(tmp_path, 9, 9)
    changes = ["template={text: text, max_tokens: 6}", "verbalizer=null", "evaluation.metric=loss"]
    path.write_text(path.read_text().replace('template: {input: "{text} is"}\n', ""))
    _, out, _ = call("show", path, *changes, "--number", 2)
    text = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["text"]
    rows = [part.splitlines()[1] for part in out.split("\n\n")[1:]]
    assert rows == [
        f"<3 virtual tokens>{text[0]}⟦{text[1:6]}⟧",
        f"<3 virtual tokens>{text[5]}⟦{text[6:9]}<|endoftext|>⟧",
    ]


def test_a_split_without_data_is_named(tmp_path, call):
    path = write_experiment(tmp_path)
    status, _, err = call("show", path, "data.test=null", "--split", "test")
    assert status == 1
    assert f"{path}: has no data.test; choose another --split (train, validation)" in err


def test_a_tokenizer_that_cannot_write_the_letter_still_shows_text(tiny):
    base = dataclasses.replace(tiny, tokenizer=letter_tokenizer())
    task = make_task(base, TemplateSettings(input="{text}"), None)
    assert shown(task, {"text": "one two", "label": "x"}) == "one·two</s>⟦x</s>⟧"
