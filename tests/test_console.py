"""What a person sees while work goes on."""

from types import SimpleNamespace

from softprompt.cli import progress as console


def test_the_time_left_is_that_of_the_units_and_not_of_what_comes_before(monkeypatch, capsys):
    clock = iter([100.0, 104.0, 112.0, 116.0, 124.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.Bar("train", 10, "steps", done=2) as bar:
        for _ in range(4):
            bar.advance(note="loss 1.0")
        bar.drop(1)
        bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "train 5/10 steps, 00:30 left, loss 1.0",
        "train 7/9 steps, 00:12 left",
    ]
