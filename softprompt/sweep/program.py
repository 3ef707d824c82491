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
from softprompt.objectives.model import Model
from softprompt.parallel.mesh import divide_trials
from softprompt.parallel.sharding import keep_divided
from softprompt.training.session import Session
from softprompt.training.step import PROGRAM, update

MAX_GROUP = 64  # trials that make a step together
_VARYING = {  # settings that are arrays in a program, or that the step does not read
    "name": True,
    "seed": True,
    "optimizer": {"learning_rate", "warmup_steps", "weight_decay"},
    "training": {"steps", "log_every"},
    "evaluation": True,
    "checkpoints": True,
    "scoring": True,
    "generation": True,
}


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
    """Make one `update` of N trials in one program. The trials share the backbone.

    Args:
      trainable, opt_state, constants, keys: one per trial. `(constants, backbone)` is the
        `frozen` argument of `update`.
      backbone: the frozen backbone.
      batch: the batches of the trials, with a leading axis N.
      program: the static arguments of `update`, the same for all trials.

    Returns:
      For each trial what `update` returns.
    """

    def one_trial(backbone: nnx.State, arrays: Any, batch: Batch) -> Any:
        trainable, opt_state, constants, key = arrays
        return update(trainable, opt_state, (constants, backbone), batch, key, **program)

    mesh = Model(*nnx.merge(program["graphdef"], trainable[0], constants[0], backbone)).backbone.mesh
    trials = zip(trainable, opt_state, constants, keys, strict=True)
    stacked: Any = keep_divided(jax.tree.map(lambda *arrays: jnp.stack(arrays), *trials), mesh)
    all_trials = divide_trials(jax.vmap(one_trial, in_axes=(None, 0, 0)), mesh)
    results = keep_divided(all_trials(backbone, stacked, batch), mesh)
    return [jax.tree.map(itemgetter(i), results) for i in range(len(keys))]


def shared_settings(experiment: Experiment) -> str:
    """Return the settings, as JSON, that trials must have in common to share a program.

    Trials may differ in seed, learning rate, warm-up, number of steps, weight decay, and in
    the settings that `Method.varying_settings` names, such as the initialization. Few-shot
    demonstrations are part of the program, so with `shots` the seed must be the same.
    """
    varying = method_class(experiment.method).varying_settings(experiment)
    excluded: dict[str, Any] = {**_VARYING, **varying}
    if experiment.shots:
        del excluded["seed"]
    return experiment.model_dump_json(exclude=excluded)


def step_group(
    sessions: Sequence[Session], inputs: Sequence[tuple[Batch, jax.Array]]
) -> list[tuple[nnx.State, Any, dict[str, jax.Array]]]:
    """Make one step of a group of trials; see `step_groups`.

    Args:
      sessions: the trials.
      inputs: for each trial what `Session.next_inputs` returned.

    Returns:
      For each trial the arguments of `Session.accept`.
    """
    return train_steps(*_arguments(sessions, inputs), **sessions[0].state.program)


def step_groups(sessions: Sequence[Session], max_group: int) -> list[list[Session]]:
    """Divide trials into groups that make a step together.

    The trials of a group share a program. Their number is a power of two and at most
    `max_group`, so that few programs are compiled while trials start and end.
    """
    groups: list[list[Session]] = []
    left = list(sessions)
    while left:
        program = _program_key(left[0])
        same = [session for session in left if _program_key(session) == program]
        left = [session for session in left if _program_key(session) != program]
        while same:
            width = _largest_power_of_two(min(len(same), max_group))
            groups.append(same[:width])
            same = same[width:]
    return groups


def trials_that_fit(session: Session, count: int, memory_before: float) -> int:
    """Return how many trials like this one fit into memory together, as a power of two.

    On an accelerator, these are all that fit into its free memory. A CPU gains little from more
    trials, so there they may need no more memory than the process uses already, and at most a
    quarter of the machine's memory.

    Args:
      session: one of the trials.
      count: number of trials.
      memory_before: bytes that the process used before the first trial's first step.
    """
    batch, key = session.batches.largest(), session.state.key
    budget = _memory_budget(memory_before)
    width = _largest_power_of_two(min(count, MAX_GROUP))
    while width > 1:
        arguments = _arguments([session] * width, [(batch, key)] * width)
        lowered = train_steps.lower(*arguments, **session.state.program)
        needed = lowered.compile().memory_analysis()
        if needed is None:
            return 1
        if needed.temp_size_in_bytes <= budget:
            break
        width = _largest_power_of_two(width * budget / needed.temp_size_in_bytes)
    return width


def _largest_power_of_two(limit: float) -> int:
    """The largest power of two that is at most `limit`."""
    return 1 << (max(1, int(limit)).bit_length() - 1)


def _memory_budget(memory_before: float) -> float:
    """Bytes that the temporary arrays of a step may use."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return 0.8 * (statistics["bytes_limit"] - statistics["bytes_in_use"])
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory_before, machine / 4)


def _arguments(
    sessions: Sequence[Session], inputs: Sequence[tuple[Batch, jax.Array]]
) -> tuple[Any, ...]:
    states = [session.state for session in sessions]
    return (
        [state.trainable for state in states],
        [state.opt_state for state in states],
        [state.frozen[0] for state in states],
        states[0].frozen[1],
        side_by_side([batch for batch, _ in inputs]),
        [key for _, key in inputs],
    )


def _program_key(session: Session) -> Any:
    """A key that is equal for trials that share a program."""
    state = session.state
    arrays = state.trainable, state.opt_state, state.frozen[0]
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]
    return state.program, shapes, id(session.base), session.rows
