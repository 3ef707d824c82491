"""A short version of `attack/kill_loop.py`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "attack"))

from kill_loop import Attack


@pytest.fixture(scope="module")
def attack(tmp_path_factory):
    return Attack(tmp_path_factory.mktemp("attack"), seed=0)


@pytest.mark.parametrize("doubled", [False, True])
def test_stopped_runs_end_as_if_they_had_not_been_stopped(attack, doubled):
    attack.kill(2, doubled=doubled)


def test_flipped_bits_are_found(attack):
    attack.flip(2)


def test_a_run_on_a_full_disk_resumes_when_there_is_space(attack):
    attack.fill_disk(1)
