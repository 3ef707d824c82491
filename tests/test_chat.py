"""Chat templates: rendered as by transformers, and never more than one line of error."""

import contextlib
import dataclasses
import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from softprompt import TemplateSettings, UserError, make_task
from softprompt.data import chat
from softprompt.data.chat import ChatRenderer
from softprompt.files.confined import ConfinedProcess

CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\n# Tools' }}{% endif %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.tool_calls|length != 1 %}{{- raise_exception("one tool call") }}{%- endif %}
{%- endfor %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' -%}
    {% set first = messages[0]['content'] + '\\n\\n' %}{% set loop_messages = messages[1:] %}
{%- else -%}{% set first = '' %}{% set loop_messages = messages %}{%- endif -%}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim }}
{{ '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
MISTRAL = """\
{%- set ns = namespace(index=0, system='') %}
{%- macro turn(message) %}{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}
{%- endmacro %}
{{- bos_token }}
{%- for message in messages if message.content is string %}
    {%- if message['role'] == 'system' %}{%- set ns.system = message.content %}{%- continue %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' ~ ns.system ~ message.content ~ ' [/INST]' }}
        {%- set ns.index = ns.index + 1 %}
    {%- else %}{{- turn(message) }}{%- endif %}
    {%- if ns.index > 5 %}{%- break %}{%- endif %}
{%- endfor %}
"""
FILTERS = """\
{{ messages | tojson }}{{ dict(a=1, b="<&'ü") | tojson(indent=2) }}
{% for key, value in messages[0] | items %}{{ key }}={{ value | upper }};{% endfor %}
{{ tools is none }} {{ documents is none }} {{ missing is defined }}
{{ [1, 2] | map('string') | join }}
"""
MESSAGES = [
    {"role": "system", "content": " Be brief & <kind>. "},
    {"role": "user", "content": 'Who {{ are }} "you"?'},
    {"role": "assistant", "content": "Äh — 我.\n"},
    {"role": "user", "content": "  And \ue000 now?\n\n"},
]


def tokenizer_with(template) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MISTRAL, FILTERS])
@pytest.mark.parametrize("first", [0, 1])
def test_conversations_are_rendered_as_by_transformers(template, first):
    tokenizer, messages = tokenizer_with(template), MESSAGES[first:]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with contextlib.closing(ChatRenderer(tokenizer)) as renderer:
        assert renderer.render(messages) == expected
        assert renderer.render(messages[-1:]) != expected


def test_the_template_of_the_default_base_model_is_rendered_as_by_transformers(smollm2):
    expected = smollm2.tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    with contextlib.closing(ChatRenderer(smollm2.tokenizer)) as renderer:
        assert renderer.render(MESSAGES) == expected


FAILING = {
    "{{ 1 / 0 }}": "division by zero",
    "{% include 'a' %}": "no loader",
    "{% import 'a' as a %}": "no loader",
    "{{ 'a'() }}": "not callable",
    "{{ 10.0 ** 400 }}": "out of range",
    "{{ [1] + 1 }}": "can only concatenate",
    "{% for i in range(10 ** 9) %}{% endfor %}": "Range too big",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "nested too deeply",
    "{{ 'a' * 10 ** 10 }}": "too much memory",
    "{{ '%9999999999d' % 1 }}": "",
    "{{ ''.__class__.mro() }}": "unsafe",
    "{{ raise_exception('no system\nmessages') }}": "no system$",
    "{% set n = namespace(__class__=1) %}": "a namespace cannot hold '__class__'",
    "{% set n = namespace() %}{% set n.__init__ = 1 %}": "a namespace cannot hold '__init__'",
    "{{ '\ud800' }}": "surrogate",
    "{% if %}": "Expected an expression",
    "(" * 5 + "{{" + "(" * 100_000: "nested too deeply",
    "{{ 'a' * 3 * 10 ** 7 }}": "the result is too long",
}


@pytest.mark.parametrize("template", FAILING, ids=lambda template: template[:40])
def test_a_failing_template_is_one_line(template, tiny):
    with (
        contextlib.closing(ChatRenderer(tokenizer_with(template))) as renderer,
        pytest.raises(UserError, match=f"^the chat template of .*: .*{FAILING[template]}") as error,
    ):
        renderer.render(MESSAGES)
    assert "\n" not in str(error.value)


def test_endless_templates_and_templates_that_take_all_memory_are_stopped(monkeypatch):
    monkeypatch.setattr(chat, "RENDERING_SECONDS", 1)
    begin = time.monotonic()
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    doubling = (
        "{% set n = namespace(a='aaaaaaaa') %}"
        "{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}"
    )
    good = tokenizer_with("{{ messages[0].content }}")
    for template, message in (
        (loop, "takes more than 1 seconds"),
        (doubling, "memory|MiB|more than 1 sec"),
    ):
        with contextlib.closing(ChatRenderer(tokenizer_with(template))) as renderer:
            with pytest.raises(UserError, match=message):
                renderer.render(MESSAGES)
            renderer._template = good.chat_template  # the process starts again
            assert renderer.render(MESSAGES) == MESSAGES[0]["content"]
    assert time.monotonic() - begin < 20


def test_a_worker_that_does_not_start_is_one_line(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import a_module_that_does_not_exist")
    with (
        contextlib.closing(ConfinedProcess(worker, 2**30, 5)) as process,
        pytest.raises(UserError, match=r"^the file: the process that runs it does not start$"),
    ):
        process.ask("a", "the file")


@pytest.mark.parametrize("template", [None, 5, {"tool_use": "a"}])
def test_a_tokenizer_without_a_chat_template_is_named(template):
    tokenizer = tokenizer_with("")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="the base model has no chat template"):
        ChatRenderer(tokenizer)


def test_modules_in_the_current_folder_are_not_imported(tmp_path, monkeypatch):
    for name in ("jinja2", "json", "resource"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(ChatRenderer(tokenizer_with("{{ messages[0].role }}"))) as renderer:
        assert renderer.render(MESSAGES) == "system"


def test_a_template_that_leaves_out_or_repeats_a_message_is_rejected(tiny):
    settings = TemplateSettings(input="{text}", target="{label}", chat=True, system="Be kind.")
    for text in (
        "{{ messages[0].content }}",
        "{{ messages[0].content * 2 + messages[1].content }}",
    ):
        base = dataclasses.replace(tiny, tokenizer=tokenizer_with(text))
        with pytest.raises(UserError, match="template leaves out or repeats a message"):
            make_task(base, settings, None)


def test_a_process_only_starts_for_chat_templates(tiny, monkeypatch):
    monkeypatch.setattr(chat, "ConfinedProcess", None)
    make_task(tiny, TemplateSettings(input="{text}", target="{label}"), None)
