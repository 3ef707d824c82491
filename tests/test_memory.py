"""Memory and time: checked and announced before training."""

import logging
import re
from types import SimpleNamespace

import jax
import pytest
from conftest import write_experiment

from softprompt import UserError, load_experiment, train
from softprompt.runtime import memory
from softprompt.runtime.memory import available_memory, memory_in_use
from softprompt.training import forecast, requirements
from softprompt.training.requirements import require_memory

OPENING = [-1, -2, -3]


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ([], "prompt.length or prompt.size or method"),
        (["prompt.reparametrization=lstm"], "prompt.length or prompt.size or method"),
        (
            ["method=prefix", "prefix.size=4"],
            "prefix.length or prefix.frozen or prefix.size or method",
        ),
        (["method=lora"], "lora.rank or method"),
        (["method=dept"], "dept.positions or dept.rank or method"),
        (["method=full"], "change method"),
    ],
)
def test_training_that_does_not_fit_into_memory_is_refused(
    experiment_file, tmp_path, monkeypatch, overrides, advice
):
    monkeypatch.setattr(requirements, "available_memory", lambda: 1000)
    with pytest.raises(UserError) as error:
        train(load_experiment(experiment_file, overrides), tmp_path / "run")
    assert "GiB are available" in str(error.value)
    assert str(error.value).endswith(advice)


def test_the_check_of_memory_allocates_nothing(experiment_file, tiny):
    experiment = load_experiment(experiment_file, ["method=lora"])
    lora = experiment.lora.model_copy(update={"rank": 10**9})
    with pytest.raises(UserError, match=r"method lora: .* need [\d,.]+ GiB"):
        require_memory(experiment.model_copy(update={"lora": lora}), tiny, OPENING, ())


def test_memory_is_measured_in_bytes():
    assert 2**26 < memory_in_use() < 2**37
    assert 2**26 < available_memory() < 2**50


@pytest.mark.parametrize(
    ("folder", "limit", "used", "prefix"),
    [
        (".", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
)
def test_cached_files_count_as_available_in_a_container(
    tmp_path, monkeypatch, folder, limit, used, prefix
):
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / limit).write_text("9000000\n")
    (group / used).write_text("8500000\n")
    (group / "memory.stat").write_text(
        f"anon 500000\n{prefix}inactive_file 6000000\n{prefix}active_file 2000000\n"
    )
    assert available_memory() == 8_500_000
    (group / limit).write_text("max\n")
    assert available_memory() > 2**26


def test_training_announces_its_memory_and_compiles_only_once(tmp_path, capsys, caplog):
    jax.clear_caches()
    experiment = load_experiment(write_experiment(tmp_path, 5, 5), ["training.steps=3"])
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        train(experiment, tmp_path / "run")
    announced = r"\ntraining 96 parameters, about \d\.\d\d GiB of memory at the peak\n"
    assert re.search(announced, capsys.readouterr().err)
    compiled = [r for r in caplog.records if r.getMessage().startswith("Compiling jit(update)")]
    assert len(compiled) == 1


def test_a_step_that_does_not_fit_into_memory_is_announced(
    experiment, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(forecast, "available_memory", lambda: 1000)
    train(experiment, tmp_path / "run")
    assert "GiB are available; set a smaller training.batch_size" in capsys.readouterr().err


def test_the_time_left_is_announced_once_without_the_first_step(monkeypatch, capsys):
    clock = iter([100.0, 102.0, 104.5, 106.5, 200.0])
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = SimpleNamespace(step=0)
    told = forecast.Forecast(SimpleNamespace(run=run, steps=2000))
    for _ in range(5):
        run.step += 1
        told.after_step()
    assert capsys.readouterr().err == "about 1:06:32 left, plus evaluations\n"
