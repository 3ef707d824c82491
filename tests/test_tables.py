"""Tables on a terminal fit its width; everywhere else they are complete."""

import pytest

from softprompt.cli.tables import print_table
from softprompt.report.tables import fitted, shorten, shorten_path, table

ROWS = [
    {
        "run": f"/home/someone/experiments/of this year/runs/letters/trials/{number:03}",
        "prompt.length": number,
        "optimizer.learning_rate": 0.3,
        "template.input": "A long text that says what to do with {text}",
        "seed": 0,
        "validation accuracy": number / 100,
    }
    for number in range(3)
]


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Make standard output a terminal of a width."""

    def terminal(width):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(width))

    return terminal


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 40, 10])
def test_a_table_fits_every_width(width):
    rows, out = fitted(ROWS, width, keep={"validation accuracy"}, paths={"run"})
    lines = table(rows, "text").splitlines()
    assert max(map(len, lines)) <= width
    assert len(rows[0]) + len(out) == len(ROWS[0])
    assert next(iter(rows[0])) == "run"


def test_columns_that_say_nothing_are_left_out_first_and_asked_ones_last():
    narrower = [fitted(ROWS, width, keep={"validation accuracy"})[1] for width in range(200, 9, -1)]
    order = list(dict.fromkeys(name for out in narrower for name in out))
    assert order[0] in ("seed", "template.input", "optimizer.learning_rate")
    assert order[-2:] == ["prompt.length", "validation accuracy"]


def test_a_heading_loses_its_section_where_the_rest_is_unambiguous():
    rows, _ = fitted(ROWS, 130)
    assert {"length", "learning_rate"} < set(rows[0])
    clash = [{"a": "x" * 60, "prompt.length": 1, "prefix.length": 2}]
    assert list(fitted(clash, 70)[0][0]) == ["a", "prompt.length", "prefix.length"]


def test_a_path_is_shortened_at_the_front():
    assert shorten_path("/home/someone/runs/a/b", 12) == "…/runs/a/b"
    assert shorten_path("/home/" + "x" * 50, 12) == f"…{'x' * 11}"
    assert shorten_path("runs/a", 12) == "runs/a"
    rows, _ = fitted(ROWS, 100, paths={"run"})
    assert [row["run"][-10:] for row in rows] == [f"trials/{n:03}" for n in range(3)]


def test_a_cell_cannot_control_the_terminal():
    assert shorten("a\nb\x1b[2J\ud800") == r"a\nb\x1b[2J\ud800"


def test_a_terminal_gets_a_table_that_fits_and_the_names_of_the_rest(terminal, capsys):
    terminal(60)
    print_table(ROWS, "--wide shows all", keep={"validation accuracy"}, paths={"run"})
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 60
    assert "0.02" in shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith("left out to fit the terminal: ")
    assert "template.input" in line
    print_table(ROWS, "--wide shows all", wide=True)
    shown = capsys.readouterr()
    assert ROWS[2]["run"] in shown.out
    assert not shown.err


def test_a_pipe_gets_everything(capsys):
    print_table(ROWS, "--wide shows all", paths={"run"})
    shown = capsys.readouterr()
    assert all(row["run"] in shown.out and row["template.input"] in shown.out for row in ROWS)
    assert not shown.err
