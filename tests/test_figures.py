"""The figures of a report: labels can be read, and no content of a run breaks them."""

import json
import re
import time
from collections import defaultdict
from itertools import pairwise

import matplotlib
import pytest
from conftest import write_experiment

from softprompt import load_experiment
from softprompt.cli.main import main
from softprompt.report.collect import best, collect, varied
from softprompt.report.figures import STYLE, curves_figure, parallel_coordinates
from softprompt.storage.run_folder import write_config, write_summary
from softprompt.training.curves import step_ticks


@pytest.fixture
def write_run(tmp_path):
    """Write the folder of a finished run that was never trained."""
    file = write_experiment(tmp_path)

    def write_run(name, *overrides, accuracy=0.5, metrics=()):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        write_config(folder, load_experiment(file, overrides))
        measured = {"loss": 1.0, "accuracy": accuracy}
        summary = {"steps": 30, "train_seconds": 1.0, "peak_memory_bytes": 1, "test": measured}
        summary |= {"trainable_parameters": 1, "examples_per_second": 1.0}
        write_summary(folder, {**summary, "validation": measured})
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in metrics))
        return folder

    return write_run


@pytest.fixture(autouse=True)
def style():
    """Draw as on a page: with texts as text."""
    with matplotlib.rc_context(STYLE):
        yield


def record(step, split, **values):
    return json.dumps({"step": step, "split": split, **values})


def x_ticks(svg):
    """The texts on the horizontal axes."""
    found = re.findall(r'id="xtick_\d+">.*?<text[^>]*>([^<]*)</text>', svg, re.DOTALL)
    return [text for text in found if text.isdecimal()]


def test_learning_curves_have_ticks_at_the_evaluated_steps(write_run):
    lines = [record(step, "train", loss=1 / step) for step in range(1, 31)]
    lines += [record(step, "validation", loss=0.1, accuracy=0.5) for step in (10, 20, 30)]
    folder = write_run("a", metrics=lines)
    assert x_ticks(curves_figure(collect([folder]), None)) == ["10", "20", "30"] * 2


@pytest.mark.parametrize(
    ("steps", "ticks"),
    [
        ([30, 10, 20, 10], [10, 20, 30]),
        (range(10, 310, 10), [50, 100, 150, 200, 250, 300]),
        ([1, 2, 3, 100], [1, 100]),
        (range(100, 100_100, 100), [20_000, 40_000, 60_000, 80_000, 100_000]),
        ([7], [7]),
        ([], []),
    ],
)
def test_ticks_are_a_readable_part_of_the_steps(steps, ticks):
    assert step_ticks(steps) == ticks


def test_labels_of_parallel_coordinates_do_not_overlap(write_run):
    rates = [0.1, 0.101, 0.102, 0.5, 0.98, 1.0]
    for number, rate in enumerate(rates):
        overrides = [f"optimizer.learning_rate={rate}", f"prompt.length={number + 1}"]
        write_run(f"{number}", *overrides, accuracy=number / 1000)
    records = collect([write_run("last").parent])
    svg = parallel_coordinates(records, varied(records))
    heights = defaultdict(list)
    labels = r'text-anchor: end" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<'
    for x, y, text in re.findall(labels, svg):
        heights[x].append((float(y), text))
    assert len(heights) == 3
    for column in heights.values():
        ordered = sorted(y for y, _ in column)
        assert all(after - before > 9 for before, after in pairwise(ordered))
    shown = [text for _, text in heights[sorted(heights, key=float)[1]]]
    assert {"0.1", "0.5", "1"} <= set(shown)
    assert "optimizer.learning_rate" not in svg  # the name is on two lines


@pytest.mark.parametrize("value", ["1e308", "-1e308", "NaN", "-Infinity", "1e999"])
def test_metrics_that_cannot_be_drawn_do_not_break_a_page(write_run, capsys, value):
    """A number that is too large for a figure is left out; a file that is not JSON, its run."""
    for number, length in enumerate((2, 2, 4, 4)):
        write_run(f"run {number}", f"prompt.length={length}", f"seed={number}")
    broken = write_run("broken", "optimizer.learning_rate=0.2", "prompt.length=8")
    summary = broken / "summary.json"
    summary.write_text(summary.read_text().replace("0.5", value))
    line = '{"step": %d, "split": "%s", "loss": %s, "accuracy": 1}\n'
    text = "".join(line % (step, split, value) for step in (1, 2) for split in ("train", "test"))
    (broken / "metrics.jsonl").write_text(text)
    runs = broken.parent
    assert main(["report", str(runs)]) == 0
    is_json, errors = value.endswith("308"), capsys.readouterr().err
    assert (runs / "report.html").read_text().count("<svg ") >= 1 + is_json
    assert "Traceback" not in errors
    assert (f"{broken}: skipped (" in errors) != is_json
    assert (best(collect([runs])).folder == broken) == (value == "1e308")


def test_texts_of_runs_are_shortened_and_escaped(write_run):
    hostile = "</text></svg><script>alert(1)</script>中"
    for number in range(3):
        text = json.dumps(f"{number}{hostile}{'x' * 100_000}")
        init = ["prompt.init=text", f"prompt.init_text={text}"]
        write_run(f"{number}", *init, f"name={json.dumps('n' * 50)}", f"prompt.length={number + 1}")
    runs = write_run("other").parent
    assert main(["report", str(runs)]) == 0
    page = (runs / "report.html").read_text()
    assert "<script>alert" not in page
    assert len(page) < 300_000
    assert (runs / "runs.csv").stat().st_size > 300_000  # the data are complete


def test_base_models_are_named_by_the_end_of_their_paths(write_run, tmp_path):
    long = tmp_path / "a long name of a folder" / "and another one" / "models"
    for name in ("one", "two"):
        write_run(name, f"base={long / name}", "prompt.length=2")
        write_run(f"{name} longer", f"base={long / name}", "prompt.length=4")
    records = collect([tmp_path / "runs"])
    svg = parallel_coordinates(records, varied(records))
    assert "…/models/one<" in svg
    assert "…/models/two<" in svg


def test_a_report_of_many_runs_stays_small(write_run):
    lines = [record(step, "train", loss=step % 7) for step in range(1, 2001)]
    lines += [record(step, "validation", loss=0.1, accuracy=step % 3) for step in range(1, 2001)]
    for number in range(30):
        write_run(f"{number:03}", f"optimizer.learning_rate={1 + number / 7}", metrics=lines)
    records = collect([write_run("other").parent])
    start = time.monotonic()
    svg = curves_figure(records, "optimizer.learning_rate")
    assert time.monotonic() - start < 20
    assert len(svg) < 4_000_000  # 120,000 points with markers would take 13 MB


@pytest.mark.parametrize("output", ["letters.yaml", "letters.yaml/out", "a" * 300])
def test_a_report_that_cannot_be_written_is_refused_before_work(
    write_run, tmp_path, monkeypatch, capsys, output
):
    runs = write_run("a").parent
    monkeypatch.setattr("softprompt.report.page.collect", lambda _: pytest.fail("collected"))
    assert main(["report", str(runs), "--output", str(tmp_path / output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("choose another folder with --output")
