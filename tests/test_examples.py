"""Records and templates: what becomes text and tokens, and what is refused, with its place."""

import re
import sys

import pytest

from softprompt import UserError
from softprompt.data.records import Record, read_records
from softprompt.data.task import make_task
from softprompt.experiment.schema import TemplateSettings

VERBALIZER = {"good": " yes", "bad": " no"}


def task(base, input="{title}: {text} ->", target="{label}", verbalizer=VERBALIZER, most=100):
    template = TemplateSettings(input=input, target=target, max_tokens=most)
    return make_task(base, template, verbalizer)


def record(**fields):
    return Record(fields, "file.jsonl:7")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_records_know_their_lines(tmp_path):
    source = write(tmp_path / "d.jsonl", '{"a": "x"}\n\n{"a": 1, "b": true}\n')
    records = read_records(source)
    assert [r.where for r in records] == [f"{source}:1", f"{source}:3"]
    assert (records[0].text("a"), records[1].text("a"), records[1].text("b")) == ("x", "1", "true")


def test_a_csv_column_may_lack_a_name(tmp_path):
    (record,) = read_records(write(tmp_path / "d.csv", ",text\n0,x\n"))
    assert record.text("text") == "x"


def test_a_long_csv_field_is_read(tmp_path):
    (record,) = read_records(write(tmp_path / "d.csv", f"text\n{'x' * 200_000}\n"))
    assert len(record.text("text")) == 200_000


def test_csv_records_know_their_lines_and_may_hold_newlines(tmp_path):
    source = write(tmp_path / "d.csv", 'text,label\n"two\nlines, one field",good\nb,bad\n')
    records = read_records(source)
    assert records[0].fields == {"text": "two\nlines, one field", "label": "good"}
    assert records[1].where == f"{source}:4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n', "d.jsonl:2: not valid JSON"),
        ("d.jsonl", "[1]\n", "d.jsonl:1: not a JSON object"),
        ("d.jsonl", '{"a": NaN}\n', "d.jsonl:1: not valid JSON (NaN is no number of JSON)"),
        ("d.jsonl", "\n", "d.jsonl: has no records"),
        ("d.csv", "a,b\n1\n", "d.csv:2: not as many columns as the header"),
        ("d.csv", "a,b\n1,2,3\n", "d.csv:2: not as many columns as the header"),
        ("d.txt", "x", "d.txt: unknown kind of dataset (known: .jsonl, .csv"),
    ],
)
def test_a_bad_dataset_is_refused_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        read_records(write(tmp_path / name, content))
    assert message in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:2: not UTF-8 text"):
        read_records(str(tmp_path / "d.jsonl"))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=re.escape("no/such.jsonl: cannot be read (No such file")):
        read_records("no/such.jsonl")


def test_hub_datasets_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="run: pip install datasets"):
        read_records("hub:stanfordnlp/sst2#train")


def test_an_example_is_its_filled_template_and_all_candidates(tiny):
    example = task(tiny).example(record(title="T", text="a{b}", label="bad"))
    decode = tiny.tokenizer.decode
    assert decode(example.input) == "T: a{b} ->"
    assert [decode(c) for c in example.candidates] == [" yes", " no"]
    assert (example.answer, example.truncated) == (1, False)


def test_free_text_ends_with_the_end_of_text_token(tiny):
    free = task(tiny, "{text}", "{a}, {{{b}}}", None)
    example = free.example(record(text="x", a="one", b="two"))
    assert tiny.tokenizer.decode(example.candidates[0]) == "one, {two}<|endoftext|>"
    assert example.candidates[0][-1] == tiny.tokenizer.eos_token_id
    assert example.answer == 0


def test_braces_are_written_twice(tiny):
    example = task(tiny, '{{"{text}"}}').example(record(text="x", label="bad"))
    assert tiny.tokenizer.decode(example.input) == '{"x"}'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"title": "t", "label": "good"}, "no field 'text' (its fields: title, label)"),
        ({"title": "t", "text": " ", "label": "good"}, "field 'text' is empty"),
        ({"title": "t", "text": "\ud800", "label": "good"}, "field 'text' has half a surrogate"),
        ({"title": "t", "text": None, "label": "good"}, "field 'text' is NoneType, not text"),
        ({"title": "t", "text": ["x"], "label": "good"}, "field 'text' is list, not text"),
        ({"title": "t", "text": "x"}, "no field 'label'"),
        (
            {"title": "t", "text": "x", "label": "fair"},
            "label 'fair' is not in the verbalizer (labels: good, bad)",
        ),
    ],
)
def test_a_record_that_will_not_do_is_refused_with_its_place(tiny, fields, message):
    with pytest.raises(UserError) as error:
        task(tiny).example(record(**fields))
    assert str(error.value).startswith(f"file.jsonl:7: {message}")


def test_an_input_too_long_loses_the_end_of_its_longest_field(tiny):
    fields = {"title": "title", "text": "abcdefghij", "label": "good"}
    example = task(tiny, most=17).example(record(**fields))
    assert tiny.tokenizer.decode(example.input) == "title: abc ->"  # 13, and 4 for " yes"
    assert example.truncated
    exact = task(tiny, most=24).example(record(**fields))
    assert tiny.tokenizer.decode(exact.input) == "title: abcdefghij ->"
    assert not exact.truncated


def test_a_template_too_long_by_itself_is_refused(tiny):
    with pytest.raises(UserError, match="20 tokens, 10 too many, and its longest"):
        task(tiny, most=14).example(record(title="title", text="abcdefghij", label="good"))
