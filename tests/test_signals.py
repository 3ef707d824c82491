"""Signals: what the library does with them, and how the command line ends."""

import contextlib
import signal
import subprocess
import sys

import pytest

from softprompt.errors import Stopped
from softprompt.runtime.progress import silent
from softprompt.runtime.signals import SIGNALS, StopSignals


@contextlib.contextmanager
def handled(number, handler):
    """Install a handler for a signal, and afterwards the one that was there before."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_interrupts_nothing_and_the_second_has_its_usual_effect(number):
    arrived = []
    with handled(number, lambda *signal: arrived.append(signal[0])):
        with StopSignals() as stop:
            signal.raise_signal(number)
            assert (stop.requested, arrived) == (number, [])
            signal.raise_signal(number)
            assert arrived == [number]
        signal.raise_signal(number)
        assert arrived == [number, number]


def test_a_second_ctrl_c_raises_keyboard_interrupt():
    with handled(signal.SIGINT, signal.default_int_handler), StopSignals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    with handled(signal.SIGHUP, signal.SIG_IGN), StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested is None


def test_a_watched_bar_stops_the_work_at_its_next_advance():
    with StopSignals() as stop, stop.watched(silent)("evaluate", 2, "examples") as bar:
        bar.advance()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            bar.advance()
    assert stopped.value.number == signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_any_command_with_one_line(number):
    code = f"""\
import signal, sys
from softprompt.cli import inspect
from softprompt.cli.main import main
signal.signal({int(number)}, signal.SIG_DFL)  # the process may have inherited that it is ignored
inspect.run = lambda options: signal.raise_signal({int(number)})
sys.argv[1:] = ["inspect", "run"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == f"stopped by {signal.Signals(number).name}\n"
    assert done.returncode == 128 + number
