"""The written form of an input, and the chat template that writes it."""

import copy

import pytest

from softprompt.data.template import compile_template
from softprompt.experiment.schema import TemplateSettings
from softprompt.interop.written import chat_template, written_input, written_parts

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
VIRTUAL = "<|softprompt-0|><|softprompt-1|>"
TEXT = 'An {odd} "text" \\n {{ 1 }} {% x %} 👍'


@pytest.fixture
def tokenizer(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = CHATML
    return tokenizer


def written_and_template(template, tokenizer):
    pieces = compile_template(template, [("a {b}", " c")], tokenizer, virtual=True)
    written = written_input(pieces, tokenizer, VIRTUAL)
    return written, chat_template(template, written, tokenizer, VIRTUAL)


@pytest.mark.parametrize(
    "template",
    [
        {"input": "Review: {text}\nIt is"},
        {"input": 'A "{{brace}}" \\ {{{{ 1 }}}} {text} ü👍\t{{% x %}}'},
        {"input": "{text}{prompt}"},
        {"input": "{record[prompt]} and {record[prompt]}"},
        {"input": "Rate {text}", "chat": True, "system": "Be brief."},
        {"text": "text"},
    ],
)
def test_the_chat_template_writes_a_message_as_the_input(template, tokenizer):
    written, tokenizer.chat_template = written_and_template(TemplateSettings(**template), tokenizer)
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": TEXT}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == written.format(text=TEXT, record={"prompt": TEXT})
    assert VIRTUAL in rendered


def test_the_chat_template_of_conversations_follows_the_virtual_tokens(tokenizer):
    template = TemplateSettings(messages="messages")
    pieces = compile_template(template, (), tokenizer, virtual=True)
    written = written_input(pieces, tokenizer, VIRTUAL)
    assert chat_template(template, written, tokenizer, VIRTUAL) == VIRTUAL + CHATML
    messages = [{"role": "user", "content": "Hi"}]
    plain = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written.format(messages="Hi") == VIRTUAL + plain


def test_an_input_of_several_fields_has_no_chat_template(tokenizer):
    _, template = written_and_template(TemplateSettings(input="{a} {b}"), tokenizer)
    assert template is None


def test_the_parts_of_a_written_input_are_texts_and_places_of_fields():
    assert written_parts("a {{b}} {c}d{record[e f]}") == ["a {b} ", None, "d", None]
