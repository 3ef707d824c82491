"""Model cards say how to use an export, and no text from a run breaks their form."""

import ast
import dataclasses
import re

import pytest
import yaml
from conftest import write_experiment
from markdown_it import MarkdownIt  # comes with rich, which flax needs

from softprompt import load_experiment, load_prompt, train
from softprompt.backbones.families import FAMILIES
from softprompt.data.task import make_task
from softprompt.experiment.schema import GenerationSettings, TemplateSettings
from softprompt.interop.card import gguf_card
from softprompt.interop.export import export
from softprompt.interop.extended import extend

HOSTILE = (
    "`` ` ```\n```\n# Broken | out\n---\nlicense: mine\r<script>alert(1)</script> {{x}} \x85\u2028"
)


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    file = write_experiment(folder, shortest=5, longest=5)
    train(load_experiment(file, ["training.steps=1"]), folder / "run")
    return load_prompt(folder / "run")


ENGINES = {
    "peft": ["peft"],
    "merged": ["transformers", "vLLM"],
    "gguf": ["llama-cpp-python", "Ollama"],
    "embeds": ["vLLM"],
}


def cards(prompt, tmp_path):
    """Return the card of each format."""
    found = {}
    for form in ("peft", "merged", "embeds"):
        export(prompt, tmp_path / form, form)
        found[form] = (tmp_path / form / "README.md").read_bytes().decode()
    # The model cannot be written to a GGUF file: its tokenizer has no merges.
    written = extend(prompt, FAMILIES["llama"].names).written
    return found | {"gguf": gguf_card(prompt, written)}


def changed(prompt, input="{text} is", target="{label}", verbalizer=None, **description):
    """Return the prompt as if it had been trained for another task."""
    template = TemplateSettings(input=input, target=target)
    task = make_task(prompt.base, template, verbalizer, virtual_tokens=prompt.task.virtual_tokens)
    about = {**prompt.description, **description}
    return dataclasses.replace(prompt, task=task, description=about)


def tokens_of(card):
    """The tokens of a card, without its metadata."""
    return MarkdownIt("commonmark").parse(card.split("\n---\n", 1)[1])


def parts(card):
    """The metadata, the blocks of code, and the other tokens of a card."""
    _, metadata, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    tokens = tokens_of(card)
    blocks = [token.content.removesuffix("\n") for token in tokens if token.type == "fence"]
    return yaml.safe_load(metadata), blocks, [t for t in tokens if t.type != "fence"]


def headings(tokens):
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def test_every_card_has_template_label_texts_and_a_filled_example(prompt, tmp_path):
    for form, card in cards(prompt, tmp_path).items():
        _, blocks, tokens = parts(card)
        programs = [f"Use with {engine}" for engine in ENGINES[form]]
        after = ["Template", "Input", "Answer", "Generation"]
        assert headings(tokens) == ["letters", *programs, *after]
        blocks = blocks[len(programs) :]
        assert blocks[:2] == ["{text} is", "{label}"]
        written, example = blocks[2:]
        assert written.startswith("<|softprompt-0|>") == (form in ("merged", "gguf"))
        assert written.endswith("{text} is")
        assert example == written.format(text="An example of text.")
        shown = [child.content for token in tokens for child in token.children or ()]
        assert shown[shown.index("low") + 2] == '" ab"'
        assert shown[shown.index("high") + 2] == '" cd"'
        # The texts of the labels have three bytes, which are three tokens.
        assert {"Decoding: greedy decoding", "New tokens: at most 3"} <= set(shown)


def test_the_programs_on_cards_are_python_and_fill_in_the_example(prompt, tmp_path):
    """The name of a field may be a word of Python, and braces are doubled in a template."""
    changed_prompt = changed(prompt, "{{ {class} }}", " {label}")
    for form, card in cards(changed_prompt, tmp_path).items():
        _, blocks, _ = parts(card)
        programs = [t.content for t in tokens_of(card) if t.info == "python"]
        assert len(programs) == len(set(ENGINES[form]) - {"Ollama"})
        for program in programs:
            ast.parse(program)
            for line in program.splitlines():
                if line.startswith("text = "):
                    names = {}
                    exec(line, names)
                    assert names["text"] == blocks[len(ENGINES[form]) + 3]
                    assert names["text"].endswith("{ An example of class. }")


SAMPLING = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 9,
    "stop": ["\n"],
}


def test_cards_and_programs_show_the_settings_of_generation(prompt, tmp_path):
    sampling = dataclasses.replace(
        changed(prompt, target="{answer}"), generation=GenerationSettings(**SAMPLING)
    )
    programs = {}
    for card in cards(sampling, tmp_path).values():
        _, blocks, tokens = parts(card)
        shown = [token.content for token in tokens]
        for line in ("sampling at temperature 0.5", "Top k: 7", "at most 9", 'Stop texts: `"\\n"`'):
            assert any(line in text for text in shown), line
        names = [name.removeprefix("Use with ") for name in headings(tokens) if "Use with" in name]
        programs |= dict(zip(names, blocks, strict=False))
    for engine, arguments in {
        "transformers": "max_new_tokens=9, do_sample=True, temperature=0.5, top_k=7, top_p=0.9, "
        "repetition_penalty=1.1, stop_strings=['\\n'], tokenizer=tokenizer)",
        "vLLM": "SamplingParams(temperature=0.5, max_tokens=9, top_k=7, top_p=0.9, "
        "repetition_penalty=1.1, stop=['\\n'])",
        "llama-cpp-python": "max_tokens=9, temperature=0.5, top_k=7, top_p=0.9, min_p=0.0, "
        "repeat_penalty=1.1, stop=['\\n'])",
        "Ollama": "PARAMETER temperature 0.5\nPARAMETER num_predict 9\nPARAMETER top_k 7\n"
        'PARAMETER top_p 0.9\nPARAMETER repeat_penalty 1.1\nPARAMETER stop "\\n"',
    }.items():
        assert arguments in programs[engine], engine


def test_a_modelfile_writes_text_that_looks_like_code_as_a_string(prompt, tmp_path):
    card = cards(changed(prompt, 'a """{{{{ {text} b', "{answer}"), tmp_path)["gguf"]
    (_, modelfile, *_) = parts(card)[1]
    names = "".join(f"<|softprompt-{i}|>" for i in range(prompt.task.virtual_tokens))
    text = names + 'a \\"\\"\\"{{ '
    assert f'TEMPLATE """{{{{ "{text}" }}}}{{{{ .Prompt }}}} b"""' in modelfile


def test_a_card_of_free_text_shows_a_whole_answer(prompt, tmp_path):
    for card in cards(changed(prompt, target=" = {summary}"), tmp_path).values():
        _, blocks, _ = parts(card)
        assert blocks[-1] == " = An example of summary."


def test_no_text_of_a_run_breaks_a_card(prompt, tmp_path):
    labels = {HOSTILE: HOSTILE, "```": "`"}
    hostile = changed(
        prompt, f"{HOSTILE}{{text}}", f"{HOSTILE}{{label}}", labels, experiment=HOSTILE
    )
    for form, card in cards(hostile, tmp_path).items():
        metadata, blocks, tokens = parts(card)
        assert metadata["model-index"][0]["name"] == HOSTILE
        assert set(metadata) == {"base_model", "library_name", "tags", "metrics", "model-index"}
        assert len(headings(tokens)) == 5 + len(ENGINES[form])
        assert len(blocks) == 4 + len(ENGINES[form])
        kinds = {child.type for token in tokens for child in token.children or ()}
        assert not {kind for kind in kinds | {t.type for t in tokens} if "html" in kind}
        items = [token for token in tokens if token.type == "list_item_open"]
        assert len(items) == len(labels) + 2  # and two settings of generation
        assert HOSTILE.replace("\r", "\n") in blocks[-4]  # Markdown reads both as line breaks
