"""Records, templates and datasets: encoding, digests, and errors that name the record."""

import os
import re
import sys
import threading
import types

import pytest
from conftest import example_of

from softprompt import UserError
from softprompt.data import formats
from softprompt.data.datasets import make_examples
from softprompt.data.examples import Example, Examples, data_digest, same_data
from softprompt.data.records import Record, read_records
from softprompt.data.task import make_task
from softprompt.experiment.schema import TemplateSettings
from softprompt.training.preparation import Preparation

VERBALIZER = {"good": " yes", "bad": " no"}


def task(base, input="{title}: {text} ->", target="{label}", verbalizer=VERBALIZER, max_tokens=100):
    template = TemplateSettings(input=input, target=target, max_tokens=max_tokens)
    return make_task(base, template, verbalizer)


def record(**fields):
    return Record(fields, "file.jsonl:7")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_records_remember_their_lines(tmp_path):
    source = write(tmp_path / "d.jsonl", '{"a": "x"}\n\n{"a": 1, "b": true}\n')
    records = read_records(source)
    assert [r.where for r in records] == [f"{source}:1", f"{source}:3"]
    assert (records[0].text("a"), records[1].text("a"), records[1].text("b")) == ("x", "1", "true")


def test_a_csv_column_without_a_name_is_accepted(tmp_path):
    (record,) = read_records(write(tmp_path / "d.csv", ",text\n0,x\n"))
    assert record.text("text") == "x"


def test_a_long_csv_field_is_read(tmp_path):
    (record,) = read_records(write(tmp_path / "d.csv", f"text\n{'x' * 200_000}\n"))
    assert len(record.text("text")) == 200_000


def test_csv_records_remember_their_lines_and_may_contain_newlines(tmp_path):
    source = write(tmp_path / "d.csv", 'text,label\n"two\nlines, one field",good\nb,bad\n')
    records = read_records(source)
    assert records[0].fields == {"text": "two\nlines, one field", "label": "good"}
    assert records[1].where == f"{source}:4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n', "d.jsonl:2: not valid JSON"),
        ("d.jsonl", "[1]\n", "d.jsonl:1: not a JSON object"),
        ("d.jsonl", '{"a": NaN}\n', "d.jsonl:1: not valid JSON (JSON has no number NaN)"),
        ("d.jsonl", "\n", "d.jsonl: has no records"),
        ("d.csv", "a,b\n1\n", "d.csv:2: not the same number of columns as the header"),
        ("d.csv", "a,b\n1,2,3\n", "d.csv:2: not the same number of columns as the header"),
        ("d.xml", "x", "d.xml: unknown kind of dataset (known: .jsonl, .csv"),
    ],
)
def test_the_error_about_an_invalid_dataset_names_file_and_line(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        read_records(write(tmp_path / name, content))
    assert message in str(error.value)


def test_bytes_that_are_not_utf8_are_rejected(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:2: not UTF-8 text"):
        read_records(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nul\0.jsonl", "embedded null byte"),
        ("folder.csv", "the folder has no .jsonl, .csv, .parquet, .txt file"),
        ("a" * 300 + ".csv", "File name too long"),
    ],
)
def test_a_path_that_cannot_be_read_is_one_line(tmp_path, name, message):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=message) as error:
        read_records(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert "\0" not in str(error.value)


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    for content, message in ((b'{"a": "b"}\n', None), (b"{}\n\xff", "pipe.jsonl:2: not UTF-8")):
        writer = threading.Thread(target=path.write_bytes, args=(content,))
        writer.start()
        if message is None:
            assert read_records(str(path))[0].fields == {"a": "b"}
        else:
            with pytest.raises(UserError, match=message):
                read_records(str(path))
        writer.join()


def test_an_endless_line_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 10)
    (tmp_path / "a.jsonl").write_text("{}\n" + " " * 11)
    with pytest.raises(UserError, match=r"a\.jsonl:2: longer than"):
        read_records(str(tmp_path / "a.jsonl"))


def test_carriage_returns_end_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b\r1,2\r3,4\r\n5,6")
    assert [record.text("b") for record in read_records(str(tmp_path / "a.csv"))] == ["2", "4", "6"]
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r{"a": 2}\r\n{"a": 3}')
    assert [record.text("a") for record in read_records(str(tmp_path / "a.jsonl"))] == list("123")


def test_an_error_names_a_missing_file():
    with pytest.raises(
        UserError, match=re.escape("no/such.jsonl: no such file; there is no folder")
    ):
        read_records("no/such.jsonl")


def test_hub_datasets_need_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="run: pip install datasets"):
        read_records("hub:stanfordnlp/sst2#train")


def test_hub_datasets_are_read_row_by_row(monkeypatch):
    class Rows:
        features = dict.fromkeys(("text", "label"))

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            assert index < 3  # no other row is read
            return {"text": f"row {index}", "label": None}

    hub = types.SimpleNamespace(load_dataset=lambda name, split: Rows())
    monkeypatch.setitem(sys.modules, "datasets", hub)
    records = read_records("hub:a/b#train")
    assert len(records) == 1000
    assert [record.text("text") for record in records[:3]] == ["row 0", "row 1", "row 2"]
    with pytest.raises(UserError, match="hub:a/b#train row 2: field 'label' is NoneType"):
        records[2].text("label")


def test_any_sequence_of_mappings_is_a_dataset(tiny):
    rows = [{"title": "T", "text": "a", "label": "bad"}, record(title="U", text="b", label="good")]
    examples = make_examples(task(tiny), read_records(rows))
    assert [example.answer for example in examples] == [1, 0]
    assert [tiny.tokenizer.decode(e.input) for e in examples] == ["T: a ->", "U: b ->"]
    assert make_examples(task(tiny), rows).digest == examples.digest
    with pytest.raises(UserError, match="row 1: no field 'text'"):
        make_examples(task(tiny), [*rows[:1], {"title": "T", "label": "bad"}])
    with pytest.raises(UserError, match="row 0: str, not a mapping of fields"):
        make_examples(task(tiny), ["text"])
    with pytest.raises(UserError, match="sequence of rows: has no records"):
        read_records([])


def test_sequences_replace_the_sources_of_an_experiment(experiment):
    """The digests agree, so a run may also be resumed with the same data as a sequence."""
    rows = [dict(record.fields) for record in read_records(experiment.data.train)]
    from_files = Preparation().prepare(experiment).examples
    moved = experiment.data.model_copy(update={"train": "no/such.jsonl"})
    experiment = experiment.model_copy(update={"data": moved})
    assert same_data(
        data_digest(from_files), Preparation().prepare(experiment, {"train": rows}).examples
    )
    with pytest.raises(UserError, match="train row 30: no field 'text'"):
        Preparation().prepare(experiment, {"train": [*rows, {"label": "low"}]})
    with pytest.raises(UserError, match="records: 'dev' is not one of train, validation, test"):
        Preparation().prepare(experiment, {"train": rows, "dev": rows})


def splits(answer=1, first=5):
    """Return examples with virtual tokens, with several candidates, and without an answer."""
    train = [example_of([1, ~0], [[first, 6], [7]], answer), example_of([2], [[3]], 0)]
    test = [Example([9], [[4], [8]], None, Record({}, "a test"), truncated=True)]
    return {"train": Examples(train), "test": Examples(test)}


def test_the_digest_recognizes_the_data():
    digest = data_digest(splits())
    assert same_data(digest, splits())
    for other in (
        splits(answer=0),
        splits(first=4),
        {"train": splits()["train"]},
        {"test": splits()["train"], "train": splits()["test"]},
    ):
        assert not same_data(digest, other)
        assert data_digest(other) != digest
    assert Examples([example_of([1, 2], [[3]], 0)]).digest != (
        Examples([example_of([1], [[2, 3]], 0)]).digest
    )


def test_the_digest_of_earlier_versions_recognizes_the_data():
    """Checkpoints of earlier versions contain one digest of the examples of all splits."""
    saved = "dda3f5221b446ec7a3f2ceebc1b567f3ea295b0c59efe0e8883c38385d74dfe6"
    assert same_data(saved, splits())
    assert not same_data(saved, splits(answer=0))


def test_a_dataset_knows_the_lengths_of_its_examples():
    dataset = Examples(
        [
            example_of([1, 2, 3], [[5, 6], [7]], 1),
            example_of([1], [[5, 6], [7, 8, 9]], 0),
            Example([4, 5], [], None, Record({}, "a test"), truncated=True),
        ]
    )
    lengths = dataset.lengths
    assert lengths.input.tolist() == [3, 1, 2]
    assert lengths.answer.tolist() == [1, 2, 0]
    assert lengths.longest.tolist() == [2, 3, 0]
    assert lengths.targets.tolist() == [3, 5, 0]
    assert lengths.read.tolist() == [1, 3, 0]
    assert lengths.branching
    assert not Examples([dataset[0], dataset[2]]).lengths.branching
    assert not lengths.answer_only().branching
    assert lengths.answer_only().targets.tolist() == [1, 2, 0]
    assert dataset.truncated == 1
    assert dataset[-1] is dataset[2]
    assert dataset[1:] == [dataset[1], dataset[2]]
    assert dataset[:5] is dataset
    assert Examples.of(dataset) is dataset


def test_an_example_contains_the_filled_template_and_all_candidates(tiny):
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


def test_double_braces_are_literal_braces(tiny):
    example = task(tiny, '{{"{text}"}}').example(record(text="x", label="bad"))
    assert tiny.tokenizer.decode(example.input) == '{"x"}'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"title": "t", "label": "good"}, "no field 'text' (its fields: title, label)"),
        ({"title": "t", "text": " ", "label": "good"}, "field 'text' is empty"),
        (
            {"title": "t", "text": "\ud800", "label": "good"},
            "field 'text' has half of a surrogate pair",
        ),
        ({"title": "t", "text": None, "label": "good"}, "field 'text' is NoneType, not text"),
        ({"title": "t", "text": ["x"], "label": "good"}, "field 'text' is list, not text"),
        ({"title": "t", "text": "x"}, "no field 'label'"),
        ({"title": "t", "text": 10**5000, "label": "good"}, "field 'text': Exceeds the limit"),
        ({1: "t", 2: "x"}, "no field 'label' (its fields: 1, 2)"),
        (
            {"title": "t", "text": "x", "label": "fair"},
            "label 'fair' is not in the verbalizer (labels: good, bad)",
        ),
    ],
)
def test_the_error_about_an_invalid_record_names_file_and_line(tiny, fields, message):
    with pytest.raises(UserError) as error:
        task(tiny).example(Record(fields, "file.jsonl:7"))
    assert str(error.value).startswith(f"file.jsonl:7: {message}")


def test_a_long_input_is_truncated_at_the_end_of_its_longest_field(tiny):
    fields = {"title": "title", "text": "abcdefghij", "label": "good"}
    example = task(tiny, max_tokens=17).example(record(**fields))
    assert tiny.tokenizer.decode(example.input) == "title: abc ->"  # 13 tokens, and 4 for " yes"
    assert example.truncated
    exact = task(tiny, max_tokens=24).example(record(**fields))
    assert tiny.tokenizer.decode(exact.input) == "title: abcdefghij ->"
    assert not exact.truncated


@pytest.mark.parametrize("lengths", [{"virtual_tokens": 10**12}, {"prefix_length": 10**12}])
def test_more_virtual_tokens_than_the_context_window_are_rejected_at_once(tiny, lengths):
    with pytest.raises(UserError, match="128 tokens, too short for 1000000000000 virtual"):
        make_task(tiny, TemplateSettings(input="{text}{prompt}"), None, **lengths)


def test_a_template_that_is_too_long_without_fields_is_rejected(tiny):
    with pytest.raises(UserError, match="20 tokens, 10 too many, and its longest"):
        task(tiny, max_tokens=14).example(record(title="title", text="abcdefghij", label="good"))
