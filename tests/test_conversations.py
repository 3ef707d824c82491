"""Conversations: every assistant turn is a target, in one row, as the chat template writes it."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import GOLDEN, batch_of, write_experiment

from softprompt import (
    Generator,
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
from softprompt.data.examples import Examples
from softprompt.generation.engine import Engine

SHORT = """\
{%- for message in messages %}
    {{- '<|start|>' + message.role[0] + message.content + '<|endoftext|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>a' }}{% endif %}
"""


def base_with_turn_end(folder):
    """Return a model whose chat template ends turns with another token than texts, as in Gemma."""
    base = folder / "base"
    shutil.copytree(GOLDEN / "llama-grouped", base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = SHORT.replace("<|endoftext|>", "<|pad|>")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    return base


def recorded_stops(monkeypatch):
    """Return a list that grows with the stop texts of each call of `Engine.generate`."""
    stops, generate = [], Engine.generate

    def recorded(self, *arguments, **options):
        stops.append(self._settings.stop)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(Engine, "generate", recorded)
    return stops


@pytest.fixture(scope="module")
def chat_base(tiny):
    """The small model with a chat template of few tokens, without marks."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = SHORT
    return dataclasses.replace(tiny, tokenizer=tokenizer)


def conversation(*contents: str, **more) -> dict:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def test_a_row_of_three_turns_has_the_loss_of_three_rows(chat_base):
    task = make_task(chat_base, TemplateSettings(messages="messages"), None, virtual_tokens=4)
    assert task.opening == [-1, -2, -3, -4]
    whole = task.example(Record(conversation("Hi", "a b", "And?", "cd", "So", "efg"), "a"))
    parts = [
        dataclasses.replace(task.example(Record(each, "a")), earlier=())
        for each in (
            conversation("Hi", "a b"),
            conversation("Hi", "a b", "And?", "cd"),
            conversation("Hi", "a b", "And?", "cd", "So", "efg"),
        )
    ]
    assert len(whole.earlier) == 2
    assert whole.earlier_targets == len("a b") + len("cd") + 2
    model = Model(SoftPrompt.from_vocabulary(chat_base, 4, jax.random.key(0)), chat_base.backbone)

    def loss(examples, **layout):
        return cross_entropy(model, batch_of(examples, **layout), jax.random.key(0))[:2]

    total, weight = loss([whole])
    expected, targets = loss(parts)
    assert weight == targets == 3 + 2 + 3 + 3
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    other = task.example(Record(conversation("x", "yz"), "a"))
    total, weight = loss([other, whole, whole, other], packs=2)
    alone, more = loss([other])
    np.testing.assert_allclose(total, 2 * (expected + alone), rtol=1e-5)
    assert weight == 2 * (targets + more)


def test_lengths_and_digests_count_earlier_targets(chat_base):
    task = make_task(chat_base, TemplateSettings(messages="messages"), None)
    rows = [conversation("Hi", "a b", "And?", "cd"), conversation("x", "yz")]
    examples = make_examples(task, rows)
    lengths = examples.lengths
    assert lengths.earlier.tolist() == [4, 0]
    assert lengths.answer.tolist() == [3, 3]
    assert lengths.targets.tolist() == [7, 3]
    assert lengths.read.tolist() == [2, 2]
    assert not lengths.branching
    assert lengths.answer_only().targets.tolist() == [7, 3]
    without = Examples([dataclasses.replace(e, earlier=()) for e in examples])
    assert without.digest != examples.digest


def test_the_virtual_tokens_of_a_task_stand_in_the_row(chat_base):
    template = TemplateSettings(messages="messages")
    task = make_task(chat_base, template, None, virtual_tokens=2, tasks=["a", "b"])
    alone = make_task(chat_base, template, None)
    row = conversation("Hi", "a b", "And?", "cd")
    example = task.example(Record({**row, "task": "b"}, "a"))
    expected = alone.example(Record(row, "a"))
    assert example.input == [~2, ~3, *expected.input]
    assert example.earlier == [(start + 2, stop + 2) for start, stop in expected.earlier]
    assert example.candidates == expected.candidates


def test_a_long_conversation_loses_its_first_turns(chat_base, caplog):
    system = {"role": "system", "content": "Be kind."}
    row = conversation("Hi", "a b", "And?", "cd", "So", "efg")
    row["messages"].insert(0, system)
    whole = make_task(chat_base, TemplateSettings(messages="messages"), None)
    length = sum(map(len, (whole.example(Record(row, "a")).input, "efg."))) - 1
    template = TemplateSettings(messages="messages", max_tokens=length)
    task = make_task(chat_base, template, None)
    (example,) = make_examples(task, [row])
    assert example.truncated
    assert "1 truncated to" in caplog.text
    assert "without their first turns" in caplog.text
    shorter = {"messages": [system, *row["messages"][3:]]}
    assert example.input == whole.example(Record(shorter, "a")).input
    assert len(example.earlier) == 1
    question = task.example(Record(row, "a"), with_answer=False)
    assert not question.truncated
    assert question.input == whole.example(Record(row, "a")).input
    tight = make_task(chat_base, TemplateSettings(messages="messages", max_tokens=20), None)
    with pytest.raises(UserError, match=r"^a: field 'messages': its last turn has .* at most 20"):
        tight.example(Record(row, "a"))


@pytest.mark.parametrize("with_answer", [True, False])
def test_a_long_conversation_loses_as_few_turns_as_possible(chat_base, with_answer):
    words = [text for number in range(6) for text in ("ask " * (number % 3 + 1), "ab" * number)]
    turns = conversation(*(word.strip() or "a" for word in words))["messages"]
    whole = make_task(chat_base, TemplateSettings(messages="messages"), None)
    rows = [Record({"messages": turns[start:]}, "a") for start in range(0, len(turns), 2)]
    expected = [whole.example(row, with_answer=with_answer) for row in rows]
    assert not expected[0].truncated
    lengths = [sum(map(len, (each.input, *each.candidates))) for each in expected]
    for most in range(lengths[-1], lengths[0] + 1, 3):
        template = TemplateSettings(messages="messages", max_tokens=most)
        task = make_task(chat_base, template, None)
        found = task.example(rows[0], with_answer=with_answer)
        kept = next(i for i, length in enumerate(lengths) if length <= most)
        assert found.input == expected[kept].input
        assert found.truncated == (kept > 0)


MALFORMED = [
    (5, "must be a list of messages"),
    ([], "must be a list of messages"),
    ("Hi", "must be a list of messages, not text"),
    ([{"role": "user", "content": "a"}], "its last message is not from the assistant"),
    (["a"], "message 1 is not an object with role and content"),
    ([{"content": "a"}], "message 1: no field 'role'"),
    ([{"role": "user"}], "message 1: no field 'content'"),
    ([{"role": "user", "content": ["a"]}], "message 1: field 'content' is list, not text"),
    ([{"role": "user", "content": " "}], "message 1: field 'content' is empty"),
    (
        [{"role": "assistant", "content": "a", "weight": 0}],
        "message 1: 'weight' is not supported",
    ),
]


@pytest.mark.parametrize(("value", "message"), MALFORMED)
def test_a_malformed_conversation_is_named(chat_base, value, message):
    task = make_task(chat_base, TemplateSettings(messages="messages"), None)
    rows = [Record(conversation("a", "b"), "f:1"), Record({"messages": value}, "f:2")]
    with pytest.raises(UserError, match=rf"^f:2: field 'messages': {message}"):
        make_examples(task, rows)
    with pytest.raises(UserError, match=r"^f:3: no field 'messages' \(its fields: turns\)"):
        task.example(Record({"turns": []}, "f:3"))


def test_an_error_of_the_template_names_the_record(chat_base):
    tokenizer = copy.deepcopy(chat_base.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    base = dataclasses.replace(chat_base, tokenizer=tokenizer)
    task = make_task(base, TemplateSettings(messages="messages"), None)
    with pytest.raises(UserError, match=r"^f:1: the chat template of .*: no system messages$"):
        task.example(Record(conversation("a", "b"), "f:1"))


def test_a_base_without_a_chat_template_is_rejected(tiny):
    with pytest.raises(UserError, match="the base model has no chat template"):
        make_task(tiny, TemplateSettings(messages="messages"), None)


def test_an_encoder_decoder_is_rejected(t5_folder):
    with pytest.raises(UserError, match=r"^template.messages: base .* is an encoder-decoder"):
        make_task(load_base(str(t5_folder)), TemplateSettings(messages="messages"), None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("template={messages: m, input: '{a}'}", "messages cannot be used with input"),
        ("template={messages: m, text: a}", "text cannot be used with messages"),
        ("template={messages: m, chat: true}", "messages cannot be used with chat"),
        ("template={messages: m, system: a}", "system needs chat: true"),
        ("template={messages: m}", "verbalizer cannot be used with template.messages"),
        ("shots=2", "shots cannot be used with template.messages"),
    ],
)
def test_settings_that_do_not_fit_conversations_are_named(tmp_path, override, message):
    path = write_experiment(tmp_path)
    text = path.read_text().replace('template: {input: "{text} is"}\n', "")
    path.write_text(text)
    overrides = [override]
    if override == "shots=2":
        overrides += ["template={messages: m}", "verbalizer=null", "evaluation.metric=loss"]
    with pytest.raises(UserError, match=message):
        load_experiment(path, overrides)


def test_a_run_on_conversations(tmp_path, capsys):
    base = base_with_turn_end(tmp_path)
    path = write_experiment(tmp_path)
    rows = [conversation("ab", "c", "de", "fg"), conversation("h", "ij")] * 8
    for split in ("train", "validation", "test"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    settings = [
        *(f"base={base}", "template={messages: messages}", "verbalizer=null"),
        *("evaluation.metric=loss", "evaluation.metrics=[exact_match]", "evaluation.samples=2"),
        *("training.steps=60", "evaluation.every=60", "generation.max_new_tokens=8"),
    ]
    path.write_text(path.read_text().replace('template: {input: "{text} is"}\n', ""))
    experiment = load_experiment(path, settings)
    summary = train(experiment, tmp_path / "run")
    assert summary["validation"]["loss"] < 5
    prompt = load_prompt(tmp_path / "run")
    assert prompt.task.template == experiment.template
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert samples[0]["input"] == {"messages": rows[0]["messages"][:3]}
    assert samples[0]["reference"] == "fg"
    # A text is a user message, and generation ends with the turn.
    assert prompt.task.stopping(prompt.generation).stop == ["<|pad|>"]
    whole = conversation("h")
    texts = [each.text for each in prompt.generate(["h", whole, conversation("h", "ij")])]
    assert texts[0] == texts[1] == texts[2]
    # The perplexity is that of the answer, not of the history.
    question = {"messages": rows[0]["messages"][:3]}
    example = dataclasses.replace(prompt.task.example(Record(rows[0], "a")), earlier=())
    model = Model(prompt.method, prompt.base.backbone)
    total, weight = cross_entropy(model, batch_of([example]), jax.random.key(0))[:2]
    np.testing.assert_allclose(
        prompt.perplexity([question], ["fg"]), np.exp(total / weight), rtol=1e-4
    )
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--metrics", "perplexity"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["loss"] == pytest.approx(summary["test"]["loss"])
    assert main(["generate", str(tmp_path / "run"), "h"]) == 0
    assert capsys.readouterr().out == f"{texts[0]}\n"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<|start|>u{messages}<|pad|>\n<|start|>a" in card
    assert "the token that ends its turn" in card


@pytest.mark.parametrize(("method", "stop"), [("none", ["<|pad|>"]), ("prompt", [])])
def test_a_base_model_alone_ends_an_answer_with_its_turn(tmp_path, monkeypatch, method, stop):
    """What is trained has learned to end it with the end-of-text token instead."""
    base = base_with_turn_end(tmp_path)
    stops = recorded_stops(monkeypatch)
    settings = [
        *(f"base={base}", f"method={method}", "verbalizer=null", "training.steps=1"),
        *("template={input: '{text} is', target: '{label}', chat: true}", "data.test=null"),
        *("evaluation.metric=loss", "evaluation.metrics=[exact_match]", "evaluation.samples=1"),
        *("evaluation.every=1", "generation.max_new_tokens=2"),
    ]
    train(load_experiment(write_experiment(tmp_path, 5, 5), settings), tmp_path / "run")
    evaluated = len(stops)
    prompt = load_prompt(tmp_path / "run")
    prompt.generate(["h"])
    Generator(prompt.base, {"run": prompt}).generate(["h"], "run", max_new_tokens=2)
    assert len(stops) == evaluated + 2 > 2
    assert all(each == stop for each in stops)


def test_pairs_of_prompt_and_completion_need_no_template(tiny):
    task = make_task(tiny, TemplateSettings(), None, virtual_tokens=2)
    named = make_task(tiny, TemplateSettings(input="{a}", target="{b}"), None, virtual_tokens=2)
    (example,) = make_examples(task, [{"prompt": "One, two,", "completion": " three"}])
    (expected,) = make_examples(named, [{"a": "One, two,", "b": " three"}])
    assert example.input == expected.input
    assert example.candidates == expected.candidates
    for fields in ({"text": "a"}, {"prompt": "a", "completion": "b", "messages": []}):
        with pytest.raises(UserError, match=r"^f:1: without a template, a record has the fields"):
            task.example(Record(fields, "f:1"))
    with pytest.raises(UserError, match=r"^f:1: no field 'completion'"):
        task.example(Record({"prompt": "a"}, "f:1"))


def test_a_template_can_name_the_field_prompt_and_mark_the_soft_prompt(tiny):
    template = TemplateSettings(input="{record[prompt]} {prompt}so", target=" {record[my label]}")
    task = make_task(tiny, template, {"x": "ab", "y": "c"}, virtual_tokens=2)
    encoded = task.example(Record({"prompt": "One", "my label": "y"}, "a"))
    ids = tiny.tokenizer
    assert encoded.input == [*ids("One ").input_ids, -1, -2, *ids("so").input_ids]
    assert encoded.candidates == [ids(" ab").input_ids, ids(" c").input_ids]
    assert encoded.answer == 1
