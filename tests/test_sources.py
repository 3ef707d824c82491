"""Sources of data: files of every kind, folders, patterns and lists."""

import datetime
import json
import sys

import datasets
import pyarrow as pa
import pytest
import yaml
from conftest import write_experiment_with_data
from pyarrow import parquet

from softprompt import UserError, load_experiment
from softprompt.data.records import Record, read_source
from softprompt.experiment.reading import dump_experiment


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path, columns, group=1000):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    parquet.write_table(table, path, row_group_size=group)


def texts_in(source):
    return [record.text("text") for record in read_source(source)]


@pytest.fixture
def folder(tmp_path):
    """A folder for each kind of file, with two or three files that hold the texts a to d."""
    for kind in ("jsonl", "csv", "parquet", "txt", "mixed"):
        (tmp_path / kind).mkdir()
    (tmp_path / "jsonl/2.jsonl").write_text(lines({"text": "c"}, {"text": "d"}))
    (tmp_path / "jsonl/1.jsonl").write_text(lines({"text": "a"}, {"text": "b"}))
    (tmp_path / "jsonl/.hidden.jsonl").write_text("not read")
    (tmp_path / "jsonl/README.md").write_text("not read")
    (tmp_path / "csv/2.csv").write_text("text\nc\nd\n")
    (tmp_path / "csv/1.csv").write_text("text\na\nb\n")
    write_parquet(tmp_path / "parquet/2.parquet", {"text": ["d"]})
    write_parquet(tmp_path / "parquet/1.parquet", {"text": ["a", "b", "c"]}, group=2)
    for name in "dbca":
        (tmp_path / f"txt/{name}.txt").write_text(name)
    (tmp_path / "mixed/a.jsonl").write_text(lines({"text": "a"}))
    (tmp_path / "mixed/b.csv").write_text("text\nb\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
@pytest.mark.parametrize("pattern", ["{kind}", "{kind}/*", "*/[0-9a-z].{kind}", "**/?.{kind}"])
def test_a_folder_or_a_pattern_is_read_in_the_order_of_the_names(folder, kind, pattern):
    (folder / "mixed/a.jsonl").unlink()
    (folder / "mixed/b.csv").unlink()
    (folder / "jsonl/README.md").unlink()
    assert texts_in(str(folder / pattern.format(kind=kind))) == list("abcd")


def test_a_folder_ignores_other_files_and_hidden_ones(folder):
    assert texts_in(str(folder / "jsonl")) == list("abcd")


def test_sources_in_a_list_are_read_one_after_another(folder):
    sources = [str(folder / name) for name in ("csv/2.csv", "parquet", "mixed/*.jsonl")]
    assert texts_in(sources) == list("cdabcda")


def test_the_characters_of_a_pattern_may_be_in_the_name_of_a_file_or_a_folder(tmp_path):
    inner = tmp_path / "data[1]*"
    inner.mkdir()
    (inner / "x[2].jsonl").write_text(lines({"text": "x"}))
    assert texts_in(str(inner / "x[2].jsonl")) == ["x"]
    assert texts_in(str(inner / "*.jsonl")) == ["x"]
    assert texts_in(str(inner)) == ["x"]


def test_a_text_file_is_one_record_with_all_its_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\n")
    (record,) = read_source(str(tmp_path / "a.txt"))
    assert record == Record({"text": "One.\r\n\r\nTwo.\n"}, str(tmp_path / "a.txt"))


def test_parquet_rows_know_their_row_group_and_have_plain_values(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    columns = {"text": ["a", "b", "c"], "stars": [1, 2, None], "messages": [messages] * 3}
    write_parquet(tmp_path / "a.parquet", columns, group=2)
    records = read_source(str(tmp_path / "a.parquet"))
    assert [record.where.removeprefix(str(tmp_path)) for record in records] == [
        "/a.parquet:row group 1, row 1",
        "/a.parquet:row group 1, row 2",
        "/a.parquet:row group 2, row 1",
    ]
    assert records[1].fields == {"text": "b", "stars": 2, "messages": messages}
    with pytest.raises(UserError, match="row group 2, row 1: field 'stars' is NoneType, not text"):
        records[2].text("stars")


def test_a_long_row_group_is_numbered_through(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"n": list(range(2500))}, group=2000)
    records = read_source(str(tmp_path / "a.parquet"))
    assert [record.fields["n"] for record in records] == list(range(2500))
    assert records[1999].where.endswith(":row group 1, row 2000")
    assert records[2000].where.endswith(":row group 2, row 1")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.parquet: needs the pyarrow package; run: pip install"):
        read_source(str(tmp_path / "a.parquet"))


def utf8_column(*values):
    """A text column of bytes that nobody has checked."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


MALFORMED = {
    "a.jsonl": (b'{"text": "a"}\n{"text"}\n', "a.jsonl:2: not valid JSON"),
    "b.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "b.jsonl:2: not UTF-8 text"),
    "c.jsonl": (b'{"x": "a"}\n{"text": 1, "x": {}}\n', "c.jsonl:2: field 'x' is dict, not text"),
    "d.jsonl": (b'{"x": "a"}\n{"text": "a"}\n', "d.jsonl:2: no field 'x' (its fields: text)"),
    "a.csv": (b"text,x\na,b\nc\n", "a.csv:3: not the same number of columns as the header"),
    "b.csv": (b"text,x\na,b\nc\n", "(no value for 'x')"),
    "c.csv": (b"text,x\na,b,c\n", "c.csv:2: not the same number of columns as the header (too"),
    "d.csv": (b'text,x\na,b\nc,"d\n\n', "d.csv:3: not valid CSV"),
    "e.csv": (b"text,text\na,b\n", "e.csv:1: 2 columns have the name 'text'"),
    "f.csv": (b"text,x\n\na, \n", "f.csv:3: field 'x' is empty"),
    "a.txt": (b"x\n\xff\n", "a.txt:2: not UTF-8 text"),
    "b.txt": (b" \n", "b.txt: field 'text' is empty"),
    "a.parquet": (b"", "a.parquet: not valid Parquet (Parquet file size is 0 bytes)"),
    "b.parquet": (b"PAR1" * 10, "b.parquet: not valid Parquet ("),
    "c.parquet": ({"x": ["a", ""]}, "c.parquet:row group 1, row 2: field 'x' is empty"),
    "d.parquet": ({"text": ["a"]}, "d.parquet:row group 1, row 1: no field 'x' (its fields: text)"),
    "e.parquet": (
        {"x": utf8_column(b"a", b"\xff")},
        "e.parquet:row group 1, row 2: field 'x' cannot be read ('utf-8' codec can't decode",
    ),
    "f.parquet": (
        {"x": pa.array([0, 10**18], pa.timestamp("us"))},
        "f.parquet:row group 1, row 2: field 'x' cannot be read (",
    ),
    "g.parquet": ({"x": [1.5, float("nan")]}, "g.parquet:row group 1, row 2: field 'x' is nan"),
    "h.parquet": (
        {"x": [datetime.date(2020, 1, 1)]},
        "h.parquet:row group 1, row 1: field 'x' is date, not text",
    ),
    "i.parquet": ({"x": pa.array([], pa.string())}, "i.parquet: has no records"),
    "j.parquet": (
        pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]),
        "j.parquet: two columns have the name 'x'",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_the_error_about_malformed_data_names_file_row_and_field(tmp_path, name):
    content, message = MALFORMED[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_parquet(path, content)
    field = "text" if name.endswith(".txt") else "x"
    with pytest.raises(UserError) as error:
        [record.text(field) for record in read_source(str(path))]
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_the_error_about_a_damaged_row_group_names_it(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": ["a" * 100, "b" * 100]}, group=1)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    content[start.dictionary_page_offset] ^= 0xFF
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet:row group 2: not valid Parquet \("):
        read_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("jsonl/3.jsonl", "jsonl/3.jsonl: no such file"),
        ("jsonl/*.csv", "jsonl/*.csv: no file matches *.csv in {folder}/jsonl"),
        ("no/**/x*", "no/**/x*: no file matches no/**/x* in {folder}"),
        ("mixed", "mixed: files of several kinds (.csv, .jsonl); name one of them, such as *.csv"),
        ("**/*", "files of several kinds (.csv, .jsonl, .md, .parquet, .txt)"),
        ("*", "*: no file matches * in {folder}"),
        (".", "has no .jsonl, .csv, .parquet, .txt file directly in it"),
        ("jsonl/README.md", "README.md: unknown kind of dataset (known: .jsonl, .csv, .parquet,"),
    ],
)
def test_a_source_that_names_no_data_is_rejected(folder, source, message):
    with pytest.raises(UserError) as error:
        read_source(str(folder / source))
    assert message.format(folder=folder) in str(error.value)


def test_a_folder_that_datasets_saved_is_read_row_by_row(tmp_path):
    rows = datasets.Dataset.from_dict({"text": list("abc"), "label": [0, 1, 0]})
    rows.with_format("numpy").save_to_disk(tmp_path / "saved", num_shards=2)
    records = read_source(str(tmp_path / "saved"))
    assert [record.text("text") for record in records] == list("abc")
    assert records[1].fields == {"text": "b", "label": 1}
    assert records[2].where == f"{tmp_path}/saved row 2"
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=r"splits: holds the splits test, train; name one of them"):
        read_source(str(tmp_path / "splits"))
    assert texts_in(str(tmp_path / "splits/test")) == ["a"]
    assert texts_in([str(tmp_path / "splits/test"), str(tmp_path / "saved")]) == list("aabc")


def test_a_damaged_saved_dataset_is_one_line(tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match=r"saved: cannot be loaded \(") as error:
        read_source(str(tmp_path / "saved"))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="saved: needs the datasets package; run: pip install"):
        read_source(str(tmp_path / "saved"))


def test_paths_in_lists_and_patterns_are_relative_to_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = {"train": ["a/*.jsonl", "~/b.parquet", "hub:x/y#z"], "validation": 0.1, "test": "t"}
    experiment = load_experiment(write_experiment_with_data(tmp_path, data))
    train_sources = [f"{tmp_path}/a/*.jsonl", f"{tmp_path}/home/b.parquet", "hub:x/y#z"]
    assert experiment.data.train == train_sources
    assert experiment.data.shares == {"validation": 0.1}
    assert experiment.data.sources == {"train": train_sources, "test": f"{tmp_path}/t"}
    (tmp_path / "run").mkdir()
    again = tmp_path / "run/config.yaml"
    again.write_text(dump_experiment(experiment, again.parent))
    assert yaml.safe_load(again.read_text())["data"]["train"][0] == "./../a/*.jsonl"
    assert load_experiment(again) == experiment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=0.5", "data.train: a source is a path or a list of paths, not 0.5"),
        ("data.train=[]", "data.train: a source is a path or a list of paths, not []"),
        ("data.train=[a.jsonl, 1]", "data.train: a source is a path or a list of paths"),
        ("data.train=''", "data.train: the path is empty"),
        ("data.train=['']", "data.train: the path is empty"),
        ('data.test=["a\\0"]', "data.test: a path cannot contain NUL"),
        ("data.train=[~nosuchuser/a]", "data.train: the home folder of this user is unknown"),
        ("data.validation=1", "data.validation: a share of the training data is a number between"),
        ("data.test=-0.1", "data.test: a share of the training data is a number between 0 and 1"),
        ("data.test=true", "data.test: a source is a path or a list of paths, not True"),
        ("data.test={}", "data.test: a source is a path or a list of paths"),
        ("data.validation=.nan", "data.validation: a share of the training data is a number"),
        (
            "data={train: a, validation: 0.5, test: 0.5}",
            "data: the shares of validation and test must be less than 1 together",
        ),
    ],
)
def test_an_invalid_source_is_one_line(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        load_experiment(
            write_experiment_with_data(tmp_path, {"train": "a", "validation": "b"}), [override]
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)
