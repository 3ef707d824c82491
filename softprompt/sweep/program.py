"""One compiled program for many trials: `vmap` of the training step over them.

Axis letters: N trials.
"""

import os
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from softprompt.backbones.batch import Batch
from softprompt.data.batches import side_by_side
from softprompt.experiment.methods import method_class
from softprompt.experiment.schema import Experiment
from softprompt.training.run import Run
from softprompt.training.step import PROGRAM, update

_NUMBERS = {  # settings that are arrays in a program, or that the step does not read
    "name": True,
    "seed": True,
    "optimizer": {"learning_rate", "warmup_steps", "weight_decay"},
    "training": {"steps", "log_every"},
    "evaluation": True,
    "checkpoints": True,
    "scoring": True,
    "generation": True,
    "dept": {"learning_rate"},
}
_INITIAL = {"init", "init_top", "init_scale", "init_text", "init_prompts"}
MAX_GROUP = 64  # trials that make a step together


@partial(jax.jit, static_argnames=PROGRAM)
def train_steps(
    trainable: Sequence[nnx.State],
    opt_state: Sequence[Any],
    constants: Sequence[nnx.State],
    backbone: nnx.State,
    batch: Batch,
    keys: Sequence[jax.Array],
    **program: Any,
) -> list[tuple[nnx.State, Any, dict[str, jax.Array]]]:
    """`update` of N trials side by side, compiled; they share the backbone.

    Args:
      trainable, opt_state, constants, keys: of each trial; `(constants, backbone)` is its
        `frozen`.
      backbone: the frozen one.
      batch: the trials' batches, with a leading axis N.
      program: the rest of `update`'s arguments, the same for all trials.

    Returns:
      What `update` gives, of each trial.
    """

    def one(of_trial: Any, batch: Batch) -> Any:
        trainable, opt_state, constants, key = of_trial
        return update(trainable, opt_state, (constants, backbone), batch, key, **program)

    of_trials = zip(trainable, opt_state, constants, keys, strict=True)
    stacked: Any = jax.tree.map(lambda *each: jnp.stack(each), *of_trials)
    results = jax.vmap(one)(stacked, batch)
    return [jax.tree.map(itemgetter(i), results) for i in range(len(keys))]


def shared(experiment: Experiment) -> str:
    """The settings that trials of one program have in common, as JSON.

    They may differ in seed, first values, learning rate, warm-up, length of the schedule,
    weight decay, and in the length of a soft prompt: its vectors are padded. Not if they
    are made from something else (a reparametrization), and not for Adafactor, which looks
    at all of a matrix. Solved examples, which the seed draws, are part of the program.
    """
    excluded: dict[str, Any] = {**_NUMBERS, "prompt": set(_INITIAL), "prefix": set(_INITIAL)}
    length_may_vary = method_class(experiment.method).length_may_vary(experiment)
    if length_may_vary and experiment.optimizer.name != "adafactor":
        excluded["prompt"].add("length")
    if experiment.shots:
        del excluded["seed"]
    return experiment.model_dump_json(exclude=excluded)


def step_group(runs: Sequence[Run], inputs: Sequence[tuple[Batch, jax.Array]]) -> list[Any]:
    """A step of runs that are one of `parts`, from the inputs of each: what it is to take."""
    return train_steps(*_arguments(runs, inputs), **runs[0].program)


def parts(runs: Sequence[Run], widest: int) -> list[list[Run]]:
    """The runs in groups that make a step together.

    Those of a group have the same program, and their number is a power of two, at most
    `widest`, so that few programs are compiled while trials come and go.
    """
    found: list[list[Run]] = []
    left = list(runs)
    while left:
        first = _shapes(left[0])
        same = [run for run in left if _shapes(run) == first]
        left = [run for run in left if _shapes(run) != first]
        while same:
            width = _power_of_two(min(len(same), widest))
            found.append(same[:width])
            same = same[width:]
    return found


def trials_that_fit(run: Run, most: int, taken: float) -> int:
    """How many trials like this one can train side by side, a power of two.

    On an accelerator, as many as its free memory has room for; on a CPU, which gains little
    from more, as many as need no more memory than the process has anyway, and no more than
    a quarter of the machine's.

    Args:
      run: one of them.
      most: how many there are.
      taken: memory in bytes that the process had taken before the first of them.
    """
    batch, key, room = run.batches.largest(), run.key, _room(taken)
    width = _power_of_two(min(most, MAX_GROUP))
    while width > 1:
        inputs = [(batch, key)] * width
        lowered = train_steps.lower(*_arguments([run] * width, inputs), **run.program)
        needed = lowered.compile().memory_analysis()
        if needed is None:
            return 1
        if needed.temp_size_in_bytes <= room:
            break
        width = _power_of_two(width * room / needed.temp_size_in_bytes)
    return width


def _power_of_two(most: float) -> int:
    return 1 << (max(1, int(most)).bit_length() - 1)


def _room(taken: float) -> float:
    statistics = jax.devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return 0.8 * (statistics["bytes_limit"] - statistics["bytes_in_use"])
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(taken, machine / 4)


def _arguments(runs: Sequence[Run], inputs: Sequence[tuple[Batch, jax.Array]]) -> tuple[Any, ...]:
    return (
        [run.trainable for run in runs],
        [run.opt_state for run in runs],
        [run.frozen[0] for run in runs],
        runs[0].frozen[1],
        side_by_side([batch for batch, _ in inputs]),
        [key for _, key in inputs],
    )


def _shapes(run: Run) -> Any:
    """What decides whether two runs have the same program."""
    arrays = run.trainable, run.opt_state, run.frozen[0]
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]
    return run.program, shapes, id(run.base), run.rows
