"""Stores: data that is tokenized once, complete or absent, checked, and read by row numbers."""

import datetime
import json
import os
import resource
import shutil
import threading

import numpy as np
import pytest
from conftest import write_experiment_with_data

from softprompt import UserError, load_experiment, make_examples, train
from softprompt.data import datasets, store, stored_records
from softprompt.data.examples import Examples
from softprompt.data.preferences import preference_examples
from softprompt.data.records import read_source
from softprompt.data.splits import divide
from softprompt.data.stored_examples import StoredExamples
from softprompt.data.stored_records import StoredRecords, read_stored
from softprompt.data.task import make_task
from softprompt.experiment.schema import TemplateSettings


@pytest.fixture(autouse=True)
def large(tmp_path, monkeypatch):
    """Treat all files as large, and keep their stores in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stored_records, "LARGE", 1)


def write_jsonl(path, count=1200):
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "us"]
    rows = (
        {
            "text": " ".join(words[: 1 + i % 9]),
            "label": "high" if i % 3 else "low",
            "chosen": f"yes {i}",
            "rejected": "no",
        }
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "data.jsonl")


VERBALIZER = {"low": " ab", "high": " cd"}


def a_task(base, verbalizer=VERBALIZER, **settings):
    if "text" not in settings:
        settings = {"input": "{text} is", "max_tokens": 25} | settings
    template = TemplateSettings(**settings)
    return make_task(base, template, verbalizer, virtual_tokens=2)


def stores():
    folder = store.stores_folder()
    return sorted(folder.iterdir()) if folder.exists() else []


def store_with(file):
    (folder,) = (folder for folder in stores() if (folder / file).exists())
    return folder


def write_parquet(path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    values = {
        "text": ["a", "b", "c"],
        "day": [datetime.date(2020, 1, day) for day in (1, 2, 3)],
        "bytes": [b"\xff", None, b"1"],
    }
    parquet.write_table(pyarrow.table(values), path, row_group_size=2)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_stored_records_are_those_of_the_files(tmp_path, kind):
    if kind == "jsonl":
        write_jsonl(tmp_path / "b.jsonl")
        write_jsonl(tmp_path / "a.jsonl", 3)
    elif kind == "csv":
        (tmp_path / "a.csv").write_text('text,label\n"two\nlines",x\nb,y\n')
    elif kind == "txt":
        (tmp_path / "a.txt").write_text("one\r\ntwo")
    else:
        write_parquet(tmp_path / "a.parquet")
    expected, found = read_source([str(tmp_path)]), read_stored([str(tmp_path)])
    assert isinstance(found, StoredRecords)
    assert [record.where for record in found] == [record.where for record in expected]
    if kind == "parquet":
        for record in (expected[0], found[0]):
            with pytest.raises(UserError, match=r"row group 1, row 1: field 'day' is date, not te"):
                record.text("day")
    else:
        assert list(found) == list(expected)
        assert [found[i] for i in range(-1, 1)] == [expected[i] for i in range(-1, 1)]
        assert list(found[1:]) == list(expected[1:])
    if len(found) > 1:
        parts, same = (divide(records, {"test": 0.4}, 3) for records in (found, expected))
        for split, part in parts.items():
            assert [record.where for record in part] == [record.where for record in same[split]]
        again = divide(read_stored([str(tmp_path)]), {"test": 0.4}, 3)
        assert [record.where for record in again["test"]] == [r.where for r in parts["test"]]
        assert again["test"].digest == parts["test"].digest != again["train"].digest


def test_small_files_and_pipes_are_not_stored(tmp_path, source, monkeypatch):
    monkeypatch.setattr(stored_records, "LARGE", 10**6)
    assert not isinstance(read_stored(source), StoredRecords)
    monkeypatch.setattr(stored_records, "LARGE", 0)
    os.mkfifo(tmp_path / "pipe.jsonl")
    writer = threading.Thread(target=(tmp_path / "pipe.jsonl").write_text, args=('{"a": "b"}\n',))
    writer.start()
    assert read_stored(str(tmp_path / "pipe.jsonl"))[0].fields == {"a": "b"}
    writer.join()
    assert stores() == []


@pytest.mark.parametrize(
    ("verbalizer", "settings"),
    [
        (VERBALIZER, {}),
        (VERBALIZER, {"input": "{text}{prompt} is"}),
        (None, {"target": "{chosen}"}),
        (None, {"text": "text", "max_tokens": 7}),
    ],
)
def test_stored_examples_are_those_in_memory(tiny, source, verbalizer, settings):
    task = a_task(tiny, verbalizer, **settings)
    expected = make_examples(task, read_source(source))
    records = read_stored(source)
    for _ in range(2):  # written, then read
        found = make_examples(task, records)
        assert isinstance(found, StoredExamples)
        assert isinstance(expected, Examples)
        assert list(found) == list(expected)
        assert [found[i] for i in (7, 700, -1)] == [expected[i] for i in (7, 700, -1)]
        assert found[3:9] == expected[3:9]
        assert (found.digest, found.truncated) == (expected.digest, expected.truncated)
        np.testing.assert_array_equal(found.answers, expected.answers)
        for name, lengths in vars(expected.lengths).items():
            np.testing.assert_array_equal(getattr(found.lengths, name), lengths)
    assert expected.truncated > 0 or verbalizer is None
    shares = {"validation": 0.1}
    (part, _), (same, _) = (divide(r, shares, 0).values() for r in (records, read_source(source)))
    assert list(make_examples(task, part)) == list(make_examples(task, same))


def test_pairs_have_a_store_of_their_own(tiny, source):
    task = a_task(tiny, None, target="{chosen}")
    expected, records = preference_examples(task, read_source(source)), read_stored(source)
    make_examples(task, records)
    assert list(preference_examples(task, records)) == list(expected)
    assert len(stores()) == 3


def test_the_second_start_neither_reads_nor_tokenizes(tiny, source, monkeypatch):
    first = make_examples(a_task(tiny), read_stored(source))
    monkeypatch.setattr(stored_records, "read_rows", None)
    monkeypatch.setattr(datasets, "_numbered", lambda *_: None)
    again = make_examples(a_task(tiny), read_stored(source))
    assert (again.digest, len(again)) == (first.digest, 1200)


def test_everything_that_decides_the_tokens_has_a_store_of_its_own(tiny, tmp_path, source):
    records = read_stored(source)
    tasks = [
        a_task(tiny),
        a_task(tiny, {"high": " cd", "low": " ab"}),
        a_task(tiny, VERBALIZER | {"low": " x"}),
        a_task(tiny, input="{text} was"),
        a_task(tiny, max_tokens=20),
        a_task(tiny, input="{text}{prompt} is"),
    ]
    digests = [make_examples(task, records).digest for task in tasks]
    assert len(set(digests)) == len(tasks)
    assert [make_examples(task, read_source(source)).digest for task in tasks] == digests
    assert len(stores()) == 1 + len(tasks)
    write_jsonl(tmp_path / "data.jsonl", 1201)
    assert len(make_examples(tasks[0], read_stored(source))) == 1201
    tiny.tokenizer.chat_template, kept = "{{ messages }}", tiny.tokenizer.chat_template
    make_examples(tasks[0], records)
    tiny.tokenizer.chat_template = kept
    assert len(stores()) == 4 + len(tasks)
    # A task for prompts of another length has the same rows.
    make_examples(make_task(tiny, tasks[0].template, VERBALIZER, virtual_tokens=5), records)
    assert len(stores()) == 4 + len(tasks)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("examples.array_record", flip),
        ("counts.npy", flip),
        ("counts.npy", lambda path: path.unlink()),
        ("examples.array_record", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("contents.json", lambda path: path.write_text("{")),
        ("contents.json", lambda path: path.unlink()),
        ("records.array_record", flip),
    ],
)
def test_a_damaged_store_is_made_again(tiny, source, capsys, file, damage):
    expected = list(make_examples(a_task(tiny), read_stored(source)))
    folder = store_with("records.array_record" if "records" in file else "counts.npy")
    damage(folder / file)
    capsys.readouterr()
    assert list(make_examples(a_task(tiny), read_stored(source))) == expected
    assert f"{folder}: the stored data is damaged, so it is made again" in capsys.readouterr().err
    assert list(make_examples(a_task(tiny), read_stored(source))) == expected
    assert capsys.readouterr().err.count("made again") == 0
    assert len(stores()) == 2


def test_damage_while_a_store_is_open_is_one_line(tiny, source):
    examples = make_examples(a_task(tiny), read_stored(source))
    path = store_with("counts.npy") / "examples.array_record"
    content = bytearray(path.read_bytes())
    content[200:20_000] = bytes(19_800)
    with path.open("r+b") as file:
        file.write(content)
    with pytest.raises(UserError, match=r"array_record: is damaged .*delete the folder") as error:
        list(examples)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, lambda record: 1200),
        (0, lambda record: -1),
        (1, lambda tokens: [*tokens[1:], 100_000]),
        (1, lambda tokens: [*tokens[1:], -1]),  # these rows have no virtual tokens
        (1, lambda tokens: [*tokens[1:], 1.5]),
        (1, lambda tokens: tokens[1:]),
        (2, lambda candidates: "ab"),
        (2, lambda candidates: [[100_000, *candidates[0][1:]], *candidates[1:]]),
        (3, lambda answer: 0),
        (5, lambda earlier: [[0, 3]]),
    ],
)
def test_a_row_that_would_crash_the_program_is_refused(tiny, source, place, change):
    examples = make_examples(a_task(tiny), read_stored(source))
    row = list(examples._file.row(1))
    assert examples._checked(1, row) == row
    row[place] = change(row[place])
    with pytest.raises(UserError, match=r"is damaged \(example 1\); delete it, and start again"):
        examples._checked(1, row)


def test_nothing_is_left_of_a_store_that_cannot_be_completed(tiny, tmp_path, source):
    with open(source, "a") as file:
        file.write("not JSON")
    with pytest.raises(UserError, match=r"data\.jsonl:1201: not valid JSON"):
        read_stored(source)
    assert stores() == []
    write_jsonl(tmp_path / "data.jsonl")
    with pytest.raises(UserError, match=r"data\.jsonl:1: label 'high' is not in the verb|'low'"):
        make_examples(a_task(tiny, {"other": " ab"}), read_stored(source))
    assert len(stores()) == 1  # the records


def test_a_full_disk_keeps_the_data_in_memory(tiny, source, capsys):
    task = a_task(tiny)
    expected = list(make_examples(task, read_source(source)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        records = read_stored(source)
        assert not isinstance(records, StoredRecords)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the data is kept in memory, because it cannot be stored" in capsys.readouterr().err
    assert stores() == []
    records = read_stored(source)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        examples = make_examples(task, records, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(examples) == expected
    assert "train: kept in memory, because it cannot be stored" in capsys.readouterr().err
    assert len(stores()) == 1


def test_a_file_that_changes_while_it_is_read_is_rejected(source, monkeypatch):
    real = stored_records.read_rows

    def changing(path):
        yield from real(path)
        os.utime(path, ns=(0, 0))

    monkeypatch.setattr(stored_records, "read_rows", changing)
    with pytest.raises(UserError, match="was changed while it was read; start again"):
        read_stored(source)
    assert stores() == []


def test_processes_that_start_together_write_a_store_once(source, monkeypatch):
    written, started = [], threading.Barrier(4)
    real = stored_records._write_rows
    monkeypatch.setattr(
        stored_records, "_write_rows", lambda *args: written.append(1) or real(*args)
    )

    def start():
        started.wait()
        found.append(list(read_stored(source)))

    found = []
    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(read_source(source))] * 4
    assert written == [1]
    assert len(stores()) == 1


def test_what_a_killed_process_leaves_is_removed(source):
    folder = store.stores_folder()
    for name in ("0" * 64, "1" * 64):
        (folder / f"{name}.new").mkdir(parents=True)
        (folder / f"{name}.new" / "records.array_record").write_text("half")
    assert store._intact(folder / ("0" * 64)) is None
    descriptor = store._locked(folder / f"{'1' * 64}.new")  # another process still writes this one
    read_stored(source)
    assert [path.name for path in stores() if path.suffix] == [f"{'1' * 64}.new"]
    os.close(descriptor)


def test_a_store_that_was_used_long_ago_makes_place(tiny, source, monkeypatch):
    records = read_stored(source)
    tasks = [a_task(tiny, max_tokens=20 + i) for i in range(3)]
    for age, task in ((5, tasks[0]), (9, tasks[1])):
        make_examples(task, records)
        newest = max(stores(), key=lambda path: (path / "contents.json").stat().st_mtime)
        os.utime(newest / "contents.json", (age, age))
    oldest = min(stores(), key=lambda path: (path / "contents.json").stat().st_mtime)
    sizes = sum(path.stat().st_size for path in store.stores_folder().glob("*/*"))
    monkeypatch.setattr(store, "_MOST", sizes)
    make_examples(tasks[2], records)
    assert not oldest.exists()
    assert len(stores()) == 3
    assert len(list(make_examples(tasks[1], records))) == 1200


def test_a_run_trains_alike_from_a_store_and_from_memory(tmp_path, monkeypatch):
    file = write_experiment_with_data(
        tmp_path, {"train": ["train.jsonl", "validation.jsonl"], "validation": 0.2}
    )
    experiment = load_experiment(file, ["training.steps=4", "evaluation.every=2"])
    stored = train(experiment, tmp_path / "run")
    assert len(stores()) == 4  # the records, their digests, and two splits
    # The run goes on without the store: the data and their order are the same.
    monkeypatch.setattr(stored_records, "LARGE", 10**9)
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    again = train(experiment, tmp_path / "run")
    assert again["validation"] == stored["validation"]
