"""Self-study: the questions, the answers, and continuing an interrupted study."""

import copy
import dataclasses
import fcntl
import json
import shutil

import pytest
from conftest import GOLDEN

from softprompt import Record, TemplateSettings, UserError, load_base, make_task
from softprompt.data.teacher import teacher_text
from softprompt.experiment.objective_settings import TeacherSettings
from softprompt.experiment.schema import GenerationSettings
from softprompt.generation.engine import Engine, Request
from softprompt.inference import study as module
from softprompt.inference import study_chunks
from softprompt.inference.study import Study, StudySettings, study_template
from softprompt.inference.study_file import write_study
from softprompt.inference.study_prompts import (
    KINDS,
    SEED_PROMPTS,
    SeedPrompt,
    answer_in,
    question_in,
    same_question,
)
from softprompt.inference.study_reading import Reading
from softprompt.runtime.progress import silent

DOCUMENT = """\
The mill at Ferndale was built in 1871 by Ada Holm.

It has four wheels and grinds rye on Monday.

The river is high in May, and then nobody works.
"""
SETTINGS = {"questions": 12, "max_new_tokens": 8, "batch_size": 4}
TEMPLATE = TemplateSettings(input="{prompt}\nQ: {question}\nA:", target=" {answer}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden Llama with a longer context window."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(GOLDEN / "llama-grouped", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load_base(str(folder))


@pytest.fixture(autouse=True)
def random_text_counts(monkeypatch):
    """The golden model writes random characters: the words are the codes of the first ones."""
    generate = Reading.generate

    def question(text, prompt, chunk):
        codes = " ".join(str(ord(character)) for character in text[:4])
        return f"{prompt.begin} {codes}{prompt.end}" if text else None

    def ended(self, *arguments, **settings):
        return [(text, True) for text, _ in generate(self, *arguments, **settings)]

    monkeypatch.setattr(module, "question_in", question)
    monkeypatch.setattr(module, "answer_in", lambda text: text.strip())
    monkeypatch.setattr(Reading, "generate", ended)
    monkeypatch.setattr(study_chunks, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(module, "_QUESTION_TOKENS", 8)


def test_all_kinds_and_all_chunks_occur_and_no_question_twice(base):
    questions = module.study(DOCUMENT, base, TEMPLATE, **SETTINGS)
    assert len(questions) == 12
    assert {each.kind for each in questions} == {*KINDS}
    assert [each.chunk for each in questions] == sorted(each.chunk for each in questions)
    assert {each.chunk for each in questions} == {1, 2}
    assert len({same_question(each.question) for each in questions}) == 12
    for each in questions:
        begins = [prompt.begin for prompt in SEED_PROMPTS[each.kind]]
        assert each.question.startswith(tuple(begins))


def test_the_seed_changes_the_questions(base):
    first, again, other = (
        module.study(DOCUMENT, base, TEMPLATE, **SETTINGS, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert not {each.question for each in first} & {each.question for each in other}


def test_the_answers_are_greedy_and_read_what_the_teacher_of_distillation_reads(base, tmp_path):
    (tmp_path / "manual.txt").write_text(DOCUMENT)
    settings = TeacherSettings(context=str(tmp_path / "manual.txt"))
    task = make_task(base, TEMPLATE, None, virtual_tokens=5)
    opening = teacher_text(settings, base, TEMPLATE, None, [], 0, task).first
    engine = Engine(base.backbone, base.tokenizer, GenerationSettings(max_new_tokens=8))
    for each in module.study(DOCUMENT, base, TEMPLATE, **SETTINGS)[:3]:
        record = Record({"question": each.question}, "a")
        row = task.example(record, with_answer=False).input
        (expected,) = engine.generate([Request([*opening, *row], None)], 1)
        assert each.answer == expected.text.strip()


def test_a_chat_model_answers_after_its_chat_template(base, monkeypatch):
    tokenizer = copy.deepcopy(base.tokenizer)
    assert study_template(base).input == "{prompt}\n\nQuestion: {question}\nAnswer:"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"
    )
    chat = dataclasses.replace(base, tokenizer=tokenizer)
    template = study_template(chat)
    assert (template.chat, template.target) == (True, "{answer}")
    (question,) = module.study(DOCUMENT, chat, questions=1, max_new_tokens=8)
    row = f"<user>{DOCUMENT}\n\n{question.question}<end><assistant>"
    tokens = tokenizer(row, add_special_tokens=False).input_ids
    engine = Engine(base.backbone, tokenizer, GenerationSettings(max_new_tokens=8))
    assert engine.generate([Request(tokens, None)], 1)[0].text.strip() == question.answer


class Interrupt:
    """A progress callback that interrupts the work after some batches."""

    def __init__(self, batches):
        self.left = batches

    def __call__(self, *arguments, **keywords):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def advance(self, count):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def written(base, path, progress=silent, **settings):
    study = Study(DOCUMENT, base, TEMPLATE, StudySettings(**SETTINGS | settings))
    return write_study(study, path, progress)


def test_an_interrupted_study_ends_with_the_same_file(base, tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert written(base, whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    assert [set(json.loads(line)) for line in lines] == [
        {"question", "answer", "kind", "chunk"}
    ] * 12
    with pytest.raises(KeyboardInterrupt):
        written(base, path, Interrupt(1))
    assert path.read_bytes() == b"".join(lines[:4])
    # A process that is killed while it writes leaves a part of a batch and half a line.
    path.write_bytes(b"".join(lines[:6]) + lines[6][:9])
    with pytest.raises(KeyboardInterrupt):
        written(base, path, Interrupt(1))
    assert path.read_bytes() == b"".join(lines[:8])
    assert written(base, path) == 8
    assert path.read_bytes() == whole.read_bytes()
    assert written(base, path) == 12
    assert path.read_bytes() == whole.read_bytes()


def test_a_continued_study_does_not_repeat_a_question(base):
    """Questions of the second batch that equal earlier ones are replaced."""
    study = Study(DOCUMENT, base, TEMPLATE, StudySettings(**SETTINGS))
    _, second, _ = study.write()
    again = next(study.write(second))
    assert not {each.question for each in second} & {each.question for each in again}


def test_an_existing_file_is_not_overwritten(base, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("mine\n")
    with pytest.raises(UserError, match=r"q.jsonl: exists already, but q.study.json is not"):
        written(base, path)
    assert path.read_text() == "mine\n"
    path.unlink()
    with pytest.raises(UserError, match=r"q.csv: a study writes JSON Lines"):
        written(base, path.with_suffix(".csv"))
    with pytest.raises(KeyboardInterrupt):
        written(base, path, Interrupt(1))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"other settings \(seed: was 0, is now 1\)"):
        written(base, path, seed=1)
    for number, damage, message in (
        (2, b'{"question": "a"', "q.jsonl:2: not valid JSON"),
        (1, b'{"question": "a"}', "q.jsonl:1: answer: Field required"),
        (3, b"\xff", "q.jsonl:3: not UTF-8"),
    ):
        lines = before.splitlines()
        lines[number - 1] = damage
        path.write_bytes(b"\n".join(lines) + b"\n")
        with pytest.raises(UserError, match=message):
            written(base, path)
        assert path.read_bytes() == b"\n".join(lines) + b"\n"
    path.write_bytes(before * 4)
    with pytest.raises(UserError, match="has 16 lines, more than the 12 questions"):
        written(base, path)
    path.write_bytes(before)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"q.jsonl: another process is writing it"):
            written(base, path)


def test_what_cannot_be_studied_is_refused(base, tiny, t5_folder):
    for arguments, message in (
        ((DOCUMENT, tiny, TEMPLATE), "has 148 tokens; base .* a context window of 128 tokens"),
        ((" \n", base, TEMPLATE), "the document has no text"),
        ((DOCUMENT, base, TEMPLATE, StudySettings(questions=0)), "questions 0: must be 1 or more"),
        ((DOCUMENT, load_base(str(t5_folder))), "an encoder-decoder cannot study"),
        ((DOCUMENT, base, TemplateSettings(input="{text}", target="{answer}")), "the fields quest"),
        ((DOCUMENT, base, TemplateSettings(input="{question}")), "the fields question and answer"),
        (
            (DOCUMENT, base, TemplateSettings(input="{question}{prompt}", target="{answer}")),
            r"\{prompt\} must come before \{question\}",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Study(*arguments)


def test_a_model_without_new_questions_ends_in_one_line(base, monkeypatch):
    monkeypatch.setattr(module, "question_in", lambda text, prompt, chunk: prompt.begin)
    monkeypatch.setattr(module, "_MOST_ATTEMPTS", 3)
    with pytest.raises(UserError, match=r"wrote \d+ questions and then no new ones"):
        module.study(DOCUMENT, base, TEMPLATE, **SETTINGS | {"questions": 60})


def test_a_document_is_divided_where_paragraphs_end():
    texts = [DOCUMENT, DOCUMENT.replace("\n\n", "\n"), DOCUMENT.replace("\n", " "), "word " * 40]
    texts += ["x" * 150, "x" * 99]
    ends = ["\n\n", "\n", ". ", " ", "x", "x"]
    for text, end in zip(texts, ends, strict=True):
        offsets = [(i, i + 1) for i in range(len(text))]
        parts = [text[begin:stop] for begin, stop in study_chunks.chunks_of(text, offsets)]
        assert "".join(parts) == text
        assert len(parts) == (1 if len(text) < 100 else 2)
        assert parts[0].endswith(end)
        assert len(text) < 100 or 30 < len(parts[0]) <= 100


CHUNK = "The mill at Ferndale was built in 1871."
PROMPT = SeedPrompt("Questions about facts in this document:", "What is the", "?")


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (" height of the mill at Ferndale", "What is the height of the mill at Ferndale?"),
        (' age of "ferndale".', 'What is the age of "ferndale?'),
        (" year 1871", "What is the year 1871?"),
        ("", None),
        (" 1871", "What is the 1871?"),
        (" name of a mill", None),
        (" fact in this document", None),
        (" mill" * 38 + " Ferndale", None),
    ],
)
def test_a_question_is_about_the_chunk_and_neither_short_nor_long(text, question):
    assert question_in(text, PROMPT, CHUNK) == question


def test_questions_that_differ_in_case_and_punctuation_are_the_same():
    assert same_question("Who is  Ada Holm?") == same_question("who is Ada holm.")
    assert same_question("Who is Ada?") != same_question("Who was Ada?")


def test_an_answer_ends_where_it_repeats_itself():
    loop = "It is one two three four five six. "
    assert answer_in(f" So. {loop * 3}") == f"So. {loop.strip()}"
    assert answer_in("It is red. It is red.") == "It is red. It is red."
    assert answer_in(" ..\n\n.. ") == ""


def test_the_command_writes_the_file_with_the_template_of_an_experiment(folder, call, tmp_path):
    (tmp_path / "manual.txt").write_text(DOCUMENT)
    (tmp_path / "compress.yaml").write_text(f"""\
base: {folder}
data: {{train: questions.jsonl, validation: questions.jsonl, test: questions.jsonl}}
template: {{input: "{{prompt}}\\nQ: {{question}}\\nA:", target: " {{answer}}"}}
objective: {{name: distill, teacher: {{context: manual.txt}}}}
method: prefix
prefix: {{length: 4}}
training: {{steps: 2, batch_size: 4}}
evaluation: {{every: 2, samples: 0}}
""")
    command = ["study", tmp_path / "manual.txt", "--experiment", tmp_path / "compress.yaml"]
    path = tmp_path / "questions.jsonl"
    options = ["--questions", "12", "--max-new-tokens", "8", "--batch-size", "4", "--output", path]
    status, output, _ = call(*command, *options)
    assert (status, output) == (0, f"{path}\n")
    written_by_command = path.read_bytes()
    base = load_base(str(folder))
    assert json.loads(written_by_command.splitlines()[0]) == (
        module.study(DOCUMENT, base, TEMPLATE, **SETTINGS)[0]._asdict()
    )
    status, output, _ = call("show", tmp_path / "compress.yaml", "--number", "1")
    assert (status, output.count("Q:·")) == (0, 1)
    experiment = (tmp_path / "compress.yaml").read_text()
    for old, new, message in (
        ("data:", "compute: {mesh: {data: 2}}\ndata:", "mesh {data: 2}: needs 2 devices"),
        ("template: {", "template: {max_tokens: 20, ", "template.max_tokens 20: too few for a"),
    ):
        (tmp_path / "other.yaml").write_text(experiment.replace(old, new, 1))
        command[-1], options[-1] = tmp_path / "other.yaml", tmp_path / "others.jsonl"
        status, _, errors = call(*command, *options)
        assert status == 1
        assert message in errors.splitlines()[-1]
    command[-1], options[-1] = tmp_path / "compress.yaml", path
    status, _, errors = call(*command, *options, "--seed", "1")
    assert (status, errors.count("\n")) == (1, 1)
    assert "seed: was 0, is now 1" in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no text"),
        (b" \n ", "has no text"),
        (b"\xff", "not UTF-8"),
        (None, "no such file"),
    ],
)
def test_a_document_that_cannot_be_read_is_named(content, message, call, tmp_path):
    path = tmp_path / "manual.txt"
    if content is not None:
        path.write_bytes(content)
    status, _, errors = call("study", path)
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"{path}: ")
    assert message in errors
    assert {each.name for each in tmp_path.iterdir()} <= {"manual.txt"}
