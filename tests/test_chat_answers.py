"""The answers in a conversation, found by marks of the chat template or by rendering."""

import contextlib

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from softprompt import UserError
from softprompt.backbones.formats.tokenizer import encode_texts
from softprompt.data.chat import ChatRenderer
from softprompt.data.conversations import target_spans

# Small templates in the style of five families. The answers are marked, with the token that ends
# a turn. `plain` removes the marks.
CHATML = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(first='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.first = message.content + '\\n\\n' %}
    {%- elif message.role == 'assistant' %}
        {{- '<start_of_turn>model\\n' }}
        {%- generation %}{{ message.content | trim + '<end_of_turn>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<start_of_turn>user\\n' + ns.first + message.content | trim + '<end_of_turn>\\n' }}
        {%- set ns.first = '' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}
"""
MISTRAL = """\
{%- macro turn(message) %}{{ ' ' ~ message.content ~ eos_token }}{% endmacro %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ turn(message) }}{% endgeneration %}
    {%- elif message.role == 'user' %}{{- '[INST] ' ~ message.content ~ '[/INST]' }}
    {%- else %}{{- message.content ~ '\\n\\n' }}
    {%- endif %}
{%- endfor %}
"""
PHI = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}{{- message.content + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}
"""
FAMILIES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "phi": PHI}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
]

TURNS = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "What is 2 + 2?\n\nThink."},
    {"role": "assistant", "content": "It is 4.\n\n\U0001f642 Äh — 我."},
    {"role": "user", "content": "  and 3 + 3?"},
    {"role": "assistant", "content": "It is 6."},
    {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": "8"},
]


def plain(template: str) -> str:
    """Return a template without marks."""
    return template.replace("generation %}", "if true %}").replace("endif true", "endif")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A byte-level tokenizer with merges, also of line breaks and punctuation."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [turn["content"] for turn in TURNS] * 5 + ["assistant\n", "user\n", ".\n\n\n"] * 9
    inner.train_from_iterator(texts, trainer)
    return inner


def tokenizer_with(bpe: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def mask_of(tokenizer, turns) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation, and 1 for those of the answers."""
    with contextlib.closing(ChatRenderer(tokenizer)) as renderer:
        (rendered,) = renderer.render_answers([turns])
    (encoding,) = encode_texts(tokenizer, [rendered.text])
    mask = [0] * len(encoding.ids)
    for start, stop in target_spans(encoding, rendered.answers, "a test"):
        mask[start:stop] = [1] * (stop - start)
    return encoding.ids, mask


@pytest.mark.parametrize("count", [3, 5, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_targets_are_those_of_transformers(bpe, family, count):
    tokenizer = tokenizer_with(bpe, FAMILIES[family])
    expected = tokenizer.apply_chat_template(
        TURNS[:count], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = mask_of(tokenizer, TURNS[:count])
    assert ids == expected["input_ids"]
    assert mask == expected["assistant_masks"]
    assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_found_without_marks(bpe, family):
    marked, unmarked = FAMILIES[family], plain(FAMILIES[family])
    assert "generation %}" not in unmarked
    if family == "phi":  # it ends a text, but not a turn, with another token
        unmarked = unmarked.replace("{% else %}{{- eos_token }}", "")
        marked = marked.replace("{% else %}{{- eos_token }}", "")
    expected = mask_of(tokenizer_with(bpe, marked), TURNS)
    assert mask_of(tokenizer_with(bpe, unmarked), TURNS) == expected


UNSPLITTABLE = {
    "{{ messages[-1].content }}": "does not write message 2 right after the generation prompt",
    "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' "
    "else m.content | upper }}\n{% endfor %}": (
        "changes the text up to message 2 when other messages follow"
    ),
    "a{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "leaves out",
    "a{% generation %}{{ messages[0].content }}{% generation %}b{% endgeneration %}"
    "{% endgeneration %}": "marks text twice",
    "{% set a %}{% generation %} b {% endgeneration %}{% endset %}{{ a | trim }}": (
        "changes the text that it marks"
    ),
    "{% generation %}a{% endgeneration %}": "nothing before it",
    "a{% if false %}{% generation %}a{% endgeneration %}{% endif %}": "writes no answer",
    "{% for m in messages %}{{ m.content }}.\n{{ '' if m.content == '8' else 'b' }}{% endfor %}": (
        "does not end every answer with"
    ),
    "{% for m in messages %}Q. {{ m.content }}\n{% endfor %}": "answer 1 shares a token",
}


@pytest.mark.parametrize("template", UNSPLITTABLE, ids=lambda template: template[:40])
def test_a_template_that_cannot_be_split_exactly_is_rejected(bpe, template):
    turns = [*TURNS[5:], *TURNS[1:3]] if "'8'" in template else TURNS[1:5]
    if template.startswith("{% for m in messages %}Q"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b.\n"}]
        bpe = Tokenizer.from_str(bpe.to_str())
        bpe.add_tokens([".\n\n"])
    with pytest.raises(UserError, match=UNSPLITTABLE[template]) as error:
        mask_of(tokenizer_with(bpe, template), turns)
    assert "\n" not in str(error.value)
