"""Tables about runs and report pages; pages are also opened in a browser."""

import csv
import dataclasses
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from conftest import write_experiment

from softprompt import UserError, load_experiment
from softprompt.cli.main import main
from softprompt.report.collect import collect, varied
from softprompt.report.figures import spread_figure
from softprompt.report.rows import chosen_rows, run_rows, seed_rows
from softprompt.report.tables import table

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STRINGS_FOR_NUMBERS = """{"steps": 1, "train_seconds": 1.0, "peak_memory_bytes": 1, "test": {},
    "trainable_parameters": 1, "examples_per_second": 1.0,
    "validation": {"accuracy": "0.5", "loss": "1"}}"""
SWEEP = """\
sweep:
  prompt.length: [2, 4]
  optimizer.learning_rate: [0.1, 0.03, 3e38]
  seed: [0, 1]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep of the letters experiment; a third of its trials fail."""
    parent = tmp_path_factory.mktemp("of letters")
    path = write_experiment(parent, 5, 5)
    path.write_text(path.read_text() + SWEEP)
    arguments = ["training.steps=4", "evaluation.every=2", "training.log_every=1"]
    arguments += ["sweep.at_once=2"]  # fewer programs to compile than with more trials at once
    assert main(["sweep", str(path), *arguments, "--folder", str(parent / "sweep")]) == 1
    return parent / "sweep"


@pytest.fixture(scope="module")
def page(folder):
    """The report page of the sweep."""
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


def test_collect_finds_runs_and_the_settings_that_differ(folder):
    records = collect([folder])
    assert varied(records) == ["prompt.length", "optimizer.learning_rate"]
    states = [record.state for record in records]
    assert (states.count("finished"), states.count("failed")) == (8, 4)
    assert all("lower optimizer" in r.error for r in records if r.state == "failed")
    for record in records:
        if record.state == "finished":
            summary = json.loads((record.folder / "summary.json").read_text())
            assert (record.validation, record.test) == (summary["validation"], summary["test"])
            assert record.quality == summary["test"]["accuracy"]


def test_rows_by_settings_hold_mean_and_range_over_seeds(folder):
    records = collect([folder])
    rows = seed_rows(records, ["prompt.length"])
    assert [row["prompt.length"] for row in rows] == [2, 4]
    for row in rows:
        values = [
            r.quality
            for r in records
            if r.state == "finished" and r.settings["prompt.length"] == row["prompt.length"]
        ]
        assert row["runs"] == len(values) == 4
        np.testing.assert_allclose(
            [row["mean"], row["lowest"], row["highest"]],
            [np.mean(values), min(values), max(values)],
        )


def test_the_runs_command_lists_sorts_and_filters_runs(folder, capsys):
    command = ["runs", str(folder), "--json"]

    def listed(*arguments):
        capsys.readouterr()
        assert main([*command, *arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert len(listed()) == 12
    best_first = [row["validation accuracy"] for row in listed("--sort", "accuracy")]
    present = [value for value in best_first if value is not None]
    assert present == sorted(present, reverse=True)
    assert best_first[len(present) :] == [None] * 4
    assert [r["seed"] for r in listed("--sort", "seed", "--reverse")] == [1] * 6 + [0] * 6
    chosen = listed("--where", "length=4", "--where", "state=finished")
    assert {(row["prompt.length"], row["state"]) for row in chosen} == {(4, "finished")}
    assert len(chosen) == 4
    assert main(["runs", str(folder), "--sort", "color"]) == 1
    assert "no column 'color'; the columns are run, prompt.length" in capsys.readouterr().err
    assert main(["runs", str(folder / "nowhere")]) == 1
    assert "contains no runs" in capsys.readouterr().err
    assert main(["runs", str(folder), "--where", "seed=0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].split()[:2] == ["run", "prompt.length"]


def test_the_runs_command_fits_the_terminal_unless_asked_for_everything(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    assert main(["runs", str(folder), "--sort", "length"]) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 70
    heading = shown.out.splitlines()[0]
    assert all(name in heading for name in ("run", "length", "validation accuracy"))
    assert "left out to fit the terminal: " in shown.err
    assert "error" in shown.err
    assert main(["runs", str(folder), "--wide"]) == 0
    assert "lower optimizer.learning_rate" in capsys.readouterr().out


def test_runs_with_a_lower_loss_come_first():
    rows = [{"validation loss": 2.0}, {"validation loss": 1.0}]
    assert chosen_rows(rows, [], "loss")[0] == {"validation loss": 1.0}
    with pytest.raises(UserError, match="has the form column=value"):
        chosen_rows(rows, ["loss"], None)


def test_a_table_can_be_read_back_from_csv_and_markdown(folder):
    rows = run_rows(collect([folder]), ["prompt.length"])
    again = list(csv.DictReader(io.StringIO(table(rows, "csv"))))
    assert [row["prompt.length"] for row in again] == [str(row["prompt.length"]) for row in rows]
    lines = table([{"a": "x|y\nz", "b": 0.12345}], "markdown").splitlines()
    assert [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines] == [
        ["a", "b"],
        ["-------", "-----:"],
        [r"x\|y\nz", "0.1235"],
    ]


def in_browser(page, tmp_path):
    """Return the content of a page after its scripts have run, and their errors."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")
def test_a_browser_shows_figures_and_tables_without_errors(page, tmp_path):
    shown, errors = in_browser(page, tmp_path)
    assert errors == []
    assert shown.count("<figure") == shown.count("<svg ") == 4
    rows = {
        name: re.search(f'id="{name}">.*?</table>', shown, re.DOTALL)[0].count("<tr>") - 1
        for name in ("settings", "runs", "samples", "tokens")
    }
    length = int(re.search("prompt.length=([24])", shown)[1])
    assert rows == {"settings": 4, "runs": 12, "samples": 8, "tokens": length}
    for text in ("Best run", "test accuracy", "learning curves", "8 finished, 4 failed"):
        assert text in shown

    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("<script>", "<script>nothing.here();"))
    assert any("nothing is not defined" in error for error in in_browser(broken, tmp_path)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")
def test_a_click_on_a_heading_sorts_the_table(page, tmp_path):
    clicked = tmp_path / "clicked.html"
    click = "document.querySelectorAll('#settings th')[3].click();"
    clicked.write_text(page.read_text().replace("</script>", f"{click}</script>"))
    shown, errors = in_browser(clicked, tmp_path)
    assert errors == []
    settings = re.search('id="settings">.*?</table>', shown, re.DOTALL)[0]
    assert 'aria-sort="ascending">mean' in settings
    means = [
        float(re.findall("<td>(.*?)</td>", row)[3])
        for row in re.findall("<tr>(<td>.*?)</tr>", settings, re.DOTALL)
    ]
    assert len(means) == 4
    assert means == sorted(means)


def test_a_page_is_self_contained_and_has_the_command_that_repeats_the_best_run(page):
    text = page.read_text()
    links = set(re.findall(r"https?://[^\"'<> ]+", text))
    assert links == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # XML namespaces
    assert not re.search(r"<(link|img|iframe)|src=|@import|url\(\s*['\"]?http", text)
    command = re.search("<pre>(softprompt train .*?)</pre>", text)[1]
    config = shlex.split(html.unescape(command))[2]
    records = [r for r in collect([page.parent]) if r.state == "finished"]
    best = max(records, key=lambda r: (r.validation["accuracy"], -r.validation["loss"]))
    assert os.path.samefile(config, best.folder / "config.yaml")
    assert load_experiment(config).prompt.length == best.settings["prompt.length"]
    for name in ("runs.csv", "runs.md", "settings.csv", "settings.md"):
        assert (page.parent / name).read_text().count("\n") > 4


def test_text_from_runs_is_escaped_on_the_page(folder, tmp_path):
    """A run from someone else cannot put a script on the page."""
    shutil.copytree(folder / "trials" / "000", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(re.sub("^name: .*", "name: <script>alert(1)", text, flags=re.M))
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text()


def test_a_page_shows_the_beginning_of_a_very_long_input(folder, tmp_path):
    shutil.copytree(folder / "trials" / "000", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(re.sub("validation: .*", "validation: ../long.jsonl", config.read_text()))
    long = {"text": "<script>" + "a" * 1_000_000, "label": "low"}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "(1,000,008 characters)" in page
    assert len(page) < 200_000


def test_runs_with_different_metrics_are_not_compared(folder, tmp_path, capsys):
    for number in ("000", "001"):
        shutil.copytree(folder / "trials" / number, tmp_path / number)
    config = tmp_path / "001" / "config.yaml"
    config.write_text(config.read_text().replace("metric: accuracy", "metric: loss"))
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "runs with a metric other than accuracy: 1" in capsys.readouterr().err
    tables = [
        list(csv.DictReader(io.StringIO((tmp_path / "out" / f"{name}.csv").read_text())))
        for name in ("runs", "settings")
    ]
    assert [len(rows) for rows in tables] == [2, 1]
    assert tables[1][0]["runs"] == "1"


def test_dollar_signs_in_settings_are_not_parsed_as_formulas(folder, tmp_path):
    for number in ("000", "001"):
        shutil.copytree(folder / "trials" / number, tmp_path / number)
        config = tmp_path / number / "config.yaml"
        init = f"init: text\n  init_text: 'a $^$ | b {number}'"
        config.write_text(re.sub("init: .*", init, config.read_text()))
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "a $^$ | b 000" in (tmp_path / "out" / "report.html").read_text()
    assert r"a $^$ \| b 000" in (tmp_path / "out" / "settings.md").read_text()


def test_a_run_found_by_two_paths_is_counted_once(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert len(collect([folder, folder.relative_to(folder.parent)])) == 12


def test_a_report_does_not_overwrite_other_files(folder, tmp_path, capsys):
    for name in ("report.html", "runs.csv"):
        (tmp_path / name).write_text("mine")
        assert main(["report", str(folder), "--output", str(tmp_path)]) == 1
        assert (
            f"{name}: not written by a report; choose another folder with --output"
            in capsys.readouterr().err
        )
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "damaged", ["", "{}", "[1]", '{"validation": 5}', '{"steps": "a"}', STRINGS_FOR_NUMBERS]
)
def test_a_run_with_a_damaged_summary_is_skipped(folder, tmp_path, capsys, damaged):
    for number in ("000", "001"):
        shutil.copytree(folder / "trials" / number, tmp_path / number)
    (tmp_path / "001" / "summary.json").write_text(damaged)
    assert main(["runs", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "summary.json: damaged" in captured.err
    assert len(captured.out.splitlines()) == 2


@pytest.mark.parametrize("command", ["runs", "report"])
@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "trial.json"])
@pytest.mark.parametrize("kind", ["deep", "huge number", "pipe", "folder", "loop"])
def test_a_run_with_a_hostile_file_is_skipped_and_named(
    folder, tmp_path, capsys, command, name, kind
):
    for number in ("000", "001"):
        shutil.copytree(folder / "trials" / number, tmp_path / number)
    path = tmp_path / "001" / name
    path.unlink()
    if kind == "deep":
        path.write_text('{"a":' * 100_000 + "\n")
    elif kind == "huge number":
        path.write_text('{"state": "failed", "step": 1%s, "split": "train"}\n' % ("0" * 400))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    arguments = ["--output", str(tmp_path / "page")] if command == "report" else []
    assert main([command, str(tmp_path), *arguments]) == 0
    captured = capsys.readouterr()
    if kind != "loop":  # a link to itself leads to no file, so the run has none
        assert f"{tmp_path / '001'}: skipped (" in captured.err
        assert str(path) in captured.err
    assert all(len(line) < 500 for line in captured.err.splitlines())


@pytest.mark.parametrize(
    "damaged",
    [
        '{"step": 4}',
        '{"step": 4, "split": "train", "loss": "1"}',
        '{"step": [], "split": "train"}',
        '{"step": -1, "split": "train"}',
        '{"step": true, "split": "train"}',
        '{"step": 4, "split": {}}',
        '{"step": 4, "split": "train", "loss": true}',
        '{"step": 4, "split": "train", "loss": 1%s}' % ("0" * 400),
    ],
)
def test_a_run_with_damaged_metrics_is_skipped(folder, tmp_path, capsys, damaged):
    for number in ("000", "001"):
        shutil.copytree(folder / "trials" / number, tmp_path / number)
    (tmp_path / "001" / "metrics.jsonl").write_text(f"{damaged}\n")
    assert main(["runs", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "metrics.jsonl:1: not a record of metrics; move the file away" in captured.err
    assert len(captured.out.splitlines()) == 2


def test_the_page_shows_errors_even_if_all_runs_failed_at_the_start(tmp_path, capsys):
    path = write_experiment(tmp_path, 5, 5)
    path.write_text(path.read_text() + "sweep:\n  prompt.length: [90000, 100000]\n")
    command = ["sweep", str(path), "--folder", str(tmp_path / "sweep")]
    assert main([*command, "--dry-run"]) == 0
    assert "2 trials to run, base" in capsys.readouterr().out
    assert main(command) == 1
    assert main(["report", str(tmp_path / "sweep")]) == 0
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert text.count("000 virtual tokens") == 2
    assert "2 failed" in text
    assert "<h2>Figures</h2>" not in text


def test_values_that_are_not_numbers_are_not_joined_by_a_line(folder):
    records = [r for r in collect([folder]) if r.state == "finished"]
    categorical = [
        dataclasses.replace(r, settings={**r.settings, "prompt.length": f"of {r.settings['seed']}"})
        for r in records
    ]
    numeric, not_numeric = (
        spread_figure(each, "prompt.length", []) for each in (records, categorical)
    )
    curve = (
        r'<g id="line2d_\d+">\s*<path d="M [\d. ]+\s+L [\d. ]+[^"]*" clip-path[^>]*stroke: #1f6feb'
    )
    assert re.search(curve, numeric)
    assert not re.search(curve, not_numeric)


def test_runs_can_be_filtered_by_a_setting_that_does_not_differ(folder, capsys):
    assert main(["runs", str(folder), "--where", "method=prompt", "--where", "seed=0.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "method" in lines[0]
    assert len(lines) == 1 + 6
