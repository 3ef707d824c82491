"""Where the template puts virtual tokens, demonstrations and special tokens."""

import dataclasses

import numpy as np
import pytest
from plain_scores import SHOWN, VECTORS, VERBALIZER, P, ids, log_probability, scores
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from softprompt import SoftPrompt, UserError
from softprompt.data.records import Record
from softprompt.data.task import make_task
from softprompt.experiment.schema import TemplateSettings
from softprompt.methods.method import Method

POSITIONS = {  # template, demonstrations, and the parts of an input
    "front": ("{text}:", [], [VECTORS, "hello:"]),
    "after text": ("Say {prompt}{text}:", [], ["Say ", VECTORS, "hello:"]),
    "in place": ("{text}{prompt}:", [], ["hello", VECTORS, ":"]),
    "suffix": ("{text}:{prompt}", [], ["hello:", VECTORS]),
    "front, with shots": ("{text}:", SHOWN, [VECTORS, "aa: ab\n\nbb:xyz\n\n", "hello:"]),
    "after shots": ("{prompt}{text}:", SHOWN, ["aa: ab\n\nbb:xyz\n\n", VECTORS, "hello:"]),
}


@pytest.mark.parametrize("position", POSITIONS)
def test_the_template_decides_the_position_of_virtual_tokens(tiny, position):
    text, shown, parts = POSITIONS[position]
    task = make_task(tiny, TemplateSettings(input=text), VERBALIZER, shown, virtual_tokens=P)
    found = scores(tiny, SoftPrompt(VECTORS, task.opening), task, {"text": "hello"})
    expected = [log_probability(tiny, *parts, target) for target in VERBALIZER.values()]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (~0 in task.opening) == (position not in ("in place", "suffix"))


def test_text_that_all_inputs_share_is_in_the_opening(tiny):
    task = make_task(tiny, TemplateSettings(input="{text}:"), VERBALIZER, SHOWN)
    assert task.opening == ids(tiny, "aa: ab\n\nbb:xyz\n\n")
    found = scores(tiny, Method(task.opening), task, {"text": "hello"})
    shown = "aa: ab\n\nbb:xyz\n\n"
    expected = [log_probability(tiny, shown, "hello:", target) for target in VERBALIZER.values()]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_special_tokens_enclose_the_template(smollm2, tmp_path):
    """By default the prompt precedes the beginning-of-text token; `{prompt}` follows it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=smollm2.tokenizer.backend_tokenizer, bos_token="<|im_start|>"
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    base = dataclasses.replace(smollm2, tokenizer=tokenizer)
    record = Record({"text": "hello"}, "here")
    front = make_task(base, TemplateSettings(input="{text}:"), VERBALIZER, virtual_tokens=2)
    assert front.opening == [~0, ~1]
    assert front.example(record, with_answer=False).input == [1, *ids(base, "hello:"), 2]
    after_bos = make_task(
        base, TemplateSettings(input="{prompt}{text}:"), VERBALIZER, virtual_tokens=2
    )
    assert after_bos.opening == [1, ~0, ~1]
    assert after_bos.example(record, with_answer=False).input == [*ids(base, "hello:"), 2]


def test_the_chat_template_of_the_base_model_is_applied(smollm2):
    template = TemplateSettings(input="{prompt}Say {text}", chat=True, system="Be {{kind}}.")
    task = make_task(smollm2, template, VERBALIZER, SHOWN, virtual_tokens=2)
    example = task.example(Record({"text": "{hello}"}, "here"), with_answer=False)
    messages = [{"role": "system", "content": "Be {kind}."}]
    for text, target in SHOWN:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": target})
    messages.append({"role": "user", "content": "Say {hello}"})
    written = smollm2.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    before, _, after = written.partition("Say {hello}")
    assert task.opening == [*ids(smollm2, before), ~0, ~1]
    assert example.input == ids(smollm2, "Say {hello}" + after)


def test_a_base_model_without_a_chat_template_is_rejected(tiny):
    with pytest.raises(UserError, match=r"template\.chat: the base model has no chat template"):
        make_task(tiny, TemplateSettings(input="{text}", chat=True), VERBALIZER)


def test_a_field_named_prompt_is_rejected_if_the_template_has_a_prompt(tiny):
    task = make_task(tiny, TemplateSettings(input="{text}{prompt}"), VERBALIZER, virtual_tokens=1)
    with pytest.raises(UserError, match=r"write {record\[prompt\]} for the field 'prompt'"):
        task.example(Record({"text": "a", "prompt": "b"}, "here"), with_answer=False)
