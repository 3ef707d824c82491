"""Many records at a time: the same examples, errors and progress as one by one."""

import itertools

import numpy as np
import pytest

from softprompt import UserError, make_examples, make_task
from softprompt.data import encoding
from softprompt.data.records import Record, read_records
from softprompt.data.task import Task
from softprompt.data.template import fill
from softprompt.experiment.schema import TemplateSettings
from softprompt.runtime.progress import silent

WORDS = (
    "A",
    "dull",
    "joy",
    "naïve",
    "映画",
    "🎬",
    "don't",
    "<|im_end|>",
    "  ",
    "12,5",
    "\n",
    "a\u0301",
)
SHOTS = [("A {joy}.", " yes"), ("Dull.", " no")]
CASES = {
    "labels": {"input": "Review: {text}\nSentiment:", "target": " {label}", "max_tokens": 20},
    "several fields": {"input": "{title}: {text} ({title})", "target": "{label}", "max_tokens": 18},
    "virtual tokens between fields": {
        "input": "{title} {prompt}{text} {tail}",
        "target": "{label}",
        "max_tokens": 24,
    },
    "free text": {"input": "{text} ->", "target": " {title}", "max_tokens": 24},
    "chat": {
        "input": "{title}\n{text}",
        "target": "{tail}",
        "chat": True,
        "system": "Be kind.",
        "max_tokens": 28,
    },
}


def records(count: int) -> list[Record]:
    """Return records of random words, with numbers among the values."""
    rng = np.random.default_rng(0)
    return [
        Record(
            {
                "text": " ".join(rng.choice(WORDS, rng.integers(1, 9))) + ".",
                "title": int(rng.integers(1000)) if i % 5 == 0 else f"No. {i}",
                "tail": "x" * int(rng.integers(1, 6)),
                "label": str(rng.choice(["good", "bad"])),
            },
            f"data.jsonl:{i + 1}",
        )
        for i in range(count)
    ]


def a_task(base, case: str, **options) -> Task:
    """Return the task of a case, with an input without fields before the records' own."""
    template = TemplateSettings(**CASES[case])
    verbalizer = {"good": " yes", "bad": " no"} if "label" in template.target else None
    return make_task(base, template, verbalizer, virtual_tokens=2, **options)


def tokenized_alone(task: Task, record: Record) -> tuple[list[int], int]:
    """Tokenize the pieces of an input one by one; also return how many tokens are too many."""
    tokens: list[int] = []
    candidates: list[int] = [0]
    if task.verbalizer is None:
        ids = task.base.tokenizer(fill(task.template.target, record)[0], add_special_tokens=False)
        candidates.append(len(ids.input_ids) + 1)
    for text in (task.verbalizer or {}).values():
        text = task.template.target.replace("{label}", text)
        candidates.append(len(task.base.tokenizer(text, add_special_tokens=False).input_ids))
    for piece in task.pieces:
        if piece is None:
            tokens += [-1, -2]
        elif isinstance(piece, str):
            text = fill(piece, record)[0]
            tokens += task.base.tokenizer(text, add_special_tokens=False).input_ids
        else:
            tokens += piece
    return tokens, len(tokens) + max(candidates) - task.max_tokens


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shots", [(), SHOTS], ids=["", "demonstrations"])
def test_examples_of_many_records_equal_those_of_single_records(smollm2, case, shots, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_RECORDS", 32)
    task, rows = a_task(smollm2, case, demonstrations=shots), records(100)
    examples = list(task.examples(rows))
    assert examples == [task.example(row) for row in rows]
    assert 10 < sum(e.truncated for e in examples) < 90
    for example in examples:
        tokens, excess = tokenized_alone(task, example.record)
        assert example.truncated == (excess > 0)
        assert len(example.input) == len(tokens) - max(excess, 0)
        kept = iter(tokens)
        assert all(token in kept for token in example.input)  # in the same order


@pytest.mark.parametrize("case", CASES)
def test_inputs_without_answers_are_the_same(smollm2, case):
    task, rows = a_task(smollm2, case), records(20)
    alone = [task.example(row, with_answer=False) for row in rows]
    assert list(task.examples(rows, with_answer=False)) == alone


def test_of_equally_long_fields_the_first_is_truncated(tiny):
    template = TemplateSettings(input="{title}{prompt}{text}{tail}", target="{tail}", max_tokens=14)
    task = make_task(tiny, template, None, virtual_tokens=1)
    row = Record({"title": "abcdef", "text": "uvwxyz", "tail": "!"}, "")
    (example,) = task.examples([row])
    expected = [*tiny.tokenizer("abcd").input_ids, -1, *tiny.tokenizer("uvwxyz!").input_ids]
    assert example.input == [token for token in expected if token not in special(tiny)]


def special(base) -> set[int]:
    return set(base.tokenizer("").input_ids)


def test_prompts_of_several_tasks_are_the_same(tiny):
    template = TemplateSettings(input="{text}", target="{label}")
    verbalizer = {"good": " yes", "bad": " no"}
    options = {"virtual_tokens": 2, "tasks": ["good", "bad"], "task_field": "label"}
    task, rows = make_task(tiny, template, verbalizer, **options), records(20)
    examples = list(task.examples(rows))
    assert examples == [task.example(row) for row in rows]
    assert {tuple(example.input[:2]) for example in examples} == {(-1, -2), (-3, -4)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"title": ""}, "field 'title' is empty"),
        ({"label": "fair"}, "label 'fair' is not in the verbalizer (labels: good, bad)"),
        ({"title": "t" * 90, "text": "x" * 91}, "276 tokens, 160 too many"),
        ({"text": "half \ud800"}, "field 'text' has half of a surrogate pair"),
    ],
)
def test_the_first_bad_record_of_a_batch_is_named(tiny, fields, message):
    rows = records(12)
    for number, changes in ((7, fields), (9, {"label": "unknown"})):
        rows[number] = Record(rows[number].fields | changes, rows[number].where)
    template = TemplateSettings(input="{title}: {text} ({title})", target="{label}", max_tokens=120)
    task = make_task(tiny, template, {"good": " yes", "bad": " no"})
    with pytest.raises(UserError) as alone:
        task.example(rows[7])
    examples = task.examples(rows)
    assert len(list(itertools.islice(examples, 7))) == 7
    with pytest.raises(UserError) as error:
        next(examples)
    assert str(error.value) == str(alone.value)
    assert str(error.value).startswith(f"data.jsonl:8: {message}")


def test_a_bad_record_is_named_before_a_row_that_cannot_be_read(tiny):
    rows = [{"text": "fine"}, {"text": ""}, "not a mapping"]
    task = make_task(tiny, TemplateSettings(input="{text}", target="{text}"), None)
    with pytest.raises(UserError, match=r"^row 1: field 'text' is empty$"):
        make_examples(task, rows)
    with pytest.raises(UserError, match=r"^row 2: str, not a mapping of fields$"):
        make_examples(task, [rows[0], rows[0], rows[2]])


def test_the_progress_counts_examples_one_by_one(tiny):
    counts = []

    def progress(label, total, unit, **options):
        bar = silent(label, total, unit)
        bar.advance = lambda count=1: counts.append((label, total, unit, count))
        return bar

    task = make_task(tiny, TemplateSettings(input="{text}", target="{text}"), None)
    make_examples(task, [{"text": "fine"}] * 5, "test", progress)
    assert counts == [("tokenize test", 5, "examples", 1)] * 5


def test_long_records_are_tokenized_in_smaller_batches(monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 100)
    rows = [Record({"text": "x" * size, "number": 7}, "") for size in (40, 40, 40, 300, 1, 1)]
    assert list(map(len, encoding.record_batches(rows))) == [3, 1, 2]


def test_records_are_read_a_batch_ahead_only(tiny, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_RECORDS", 4)
    read = []
    rows = (read.append(row) or row for row in records(20))
    task = make_task(tiny, TemplateSettings(input="{text}", target="{text}"), None)
    next(task.examples(rows))
    assert len(read) == 4


def test_the_reviews_are_the_same_in_one_pass(smollm2):
    rows = read_records("experiments/data/movie_reviews/validation.jsonl")[:200]
    task = a_task(smollm2, "labels")
    rows = [Record({**row.fields, "label": "good"}, row.where) for row in rows]
    assert list(make_examples(task, rows)) == [task.example(row) for row in rows]
