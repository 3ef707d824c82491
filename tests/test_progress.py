"""Progress bars and log messages on the command line."""

import logging
import re
import sys
from types import SimpleNamespace

from softprompt.cli import progress
from softprompt.runtime import bars


def test_the_time_left_does_not_count_the_time_before_the_first_unit(monkeypatch, capsys):
    clock = iter([100.0, 104.0, 112.0, 116.0, 124.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.Bar("train", 10, "steps", done=2) as bar:
        for _ in range(4):
            bar.advance(note="loss 1.0")
        bar.drop(1)
        bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "train 5/10 steps, 00:30 left, loss 1.0",
        "train 7/9 steps, 00:12 left",
    ]


def test_each_log_message_is_printed_once(capsys):
    """This holds even if another library has added a handler to the root logger."""
    root, other = logging.getLogger(), logging.StreamHandler(sys.stderr)
    root.addHandler(other)
    try:
        logging.getLogger("softprompt.training").info("resuming")
    finally:
        root.removeHandler(other)
    assert capsys.readouterr().err.splitlines() == ["resuming"]


def test_a_notebook_shows_bars_by_default_and_a_script_shows_nothing(monkeypatch, capsys):
    def work():
        with bars.bars_in_notebooks("train", 10, "steps", done=3) as bar:
            bar.advance(2, note="loss 1.0")
            bar.drop(1)
        return capsys.readouterr().err

    assert work() == ""
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace())
    monkeypatch.setattr(bars, "_DELAY", 0)
    assert re.search(r"train: .*5/9 .*steps/s, loss 1\.0", work())


def test_short_work_shows_no_bar(capsys):
    with bars.ProgressBar("tokenize", 10, "examples") as bar:
        bar.advance(10)
    assert capsys.readouterr().err.strip() == ""
