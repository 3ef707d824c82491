"""Model cards say how to use an export, and no text from a run breaks their form."""

import dataclasses
import re

import pytest
import yaml
from conftest import write_experiment
from markdown_it import MarkdownIt  # comes with rich, which flax needs

from softprompt import load_experiment, load_prompt, train
from softprompt.data.task import make_task
from softprompt.experiment.schema import TemplateSettings
from softprompt.interop.export import export

HOSTILE = (
    "`` ` ```\n```\n# Broken | out\n---\nlicense: mine\r<script>alert(1)</script> {{x}} \x85\u2028"
)


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    file = write_experiment(folder, shortest=5, longest=5)
    train(load_experiment(file, ["training.steps=1"]), folder / "run")
    return load_prompt(folder / "run")


def cards(prompt, tmp_path):
    """Return the cards of an adapter and of a merged model."""
    for form in ("peft", "merged"):
        export(prompt, tmp_path / form, form)
    return [(tmp_path / form / "README.md").read_bytes().decode() for form in ("peft", "merged")]


def changed(prompt, input="{text} is", target="{label}", verbalizer=None, **description):
    """Return the prompt as if it had been trained for another task."""
    template = TemplateSettings(input=input, target=target)
    task = make_task(prompt.base, template, verbalizer, virtual_tokens=prompt.task.virtual_tokens)
    about = {**prompt.description, **description}
    return dataclasses.replace(prompt, task=task, description=about)


def parts(card):
    """The metadata, the blocks of code, and the other tokens of a card."""
    _, metadata, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    tokens = MarkdownIt("commonmark").parse(body)
    blocks = [token.content.removesuffix("\n") for token in tokens if token.type == "fence"]
    return yaml.safe_load(metadata), blocks, [t for t in tokens if t.type != "fence"]


def headings(tokens):
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def test_both_cards_have_template_label_texts_and_a_filled_example(prompt, tmp_path):
    for card, opening in zip(cards(prompt, tmp_path), ("", "<|softprompt-0|>"), strict=True):
        _, blocks, tokens = parts(card)
        assert headings(tokens) == ["letters", "Template", "Input", "Answer"]
        assert blocks[1:3] == ["{text} is", "{label}"]
        written, example = blocks[3:]
        assert opening in written
        assert written.endswith("{text} is")
        assert example == written.format(text="An example of text.")
        shown = [child.content for token in tokens for child in token.children or ()]
        assert shown[shown.index("low") + 2] == '" ab"'
        assert shown[shown.index("high") + 2] == '" cd"'


def test_the_code_on_a_merged_card_fills_in_the_example(prompt, tmp_path):
    """The name of a field may be a word of Python, and braces are doubled in a template."""
    changed_prompt = changed(prompt, "{{ {class} }}", " {label}")
    _, blocks, _ = parts(cards(changed_prompt, tmp_path)[1])
    (line,) = [line for line in blocks[0].splitlines() if line.startswith("text = ")]
    names = {}
    exec(line, names)
    assert names["text"] == blocks[4]
    assert names["text"].endswith("{ An example of class. }")


def test_a_card_of_free_text_shows_a_whole_answer(prompt, tmp_path):
    for card in cards(changed(prompt, target=" = {summary}"), tmp_path):
        _, blocks, _ = parts(card)
        assert blocks[-1] == " = An example of summary."


def test_no_text_of_a_run_breaks_a_card(prompt, tmp_path):
    labels = {HOSTILE: HOSTILE, "```": "`"}
    hostile = changed(
        prompt, f"{HOSTILE}{{text}}", f"{HOSTILE}{{label}}", labels, experiment=HOSTILE
    )
    for card in cards(hostile, tmp_path):
        metadata, blocks, tokens = parts(card)
        assert metadata["model-index"][0]["name"] == HOSTILE
        assert set(metadata) == {"base_model", "library_name", "tags", "metrics", "model-index"}
        assert len(headings(tokens)) == 4
        assert len(blocks) == 5
        kinds = {child.type for token in tokens for child in token.children or ()}
        assert not {kind for kind in kinds | {t.type for t in tokens} if "html" in kind}
        items = [token for token in tokens if token.type == "list_item_open"]
        assert len(items) == len(labels)
        assert HOSTILE.replace("\r", "\n") in blocks[1]  # Markdown reads both as line breaks
