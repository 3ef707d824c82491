"""The compiled programs of trials.

On an accelerator, trials make a step together, in one program: `vmap` of the training step over
them. On a mesh with an axis `trials`, each device or group of devices runs its part of the trials.
On a CPU, the trials take turns, each in the program of a single run.

Axis letters: N trials.
"""

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
from softprompt.parallel.mesh import AXES, axis_size, divide_trials
from softprompt.parallel.sharding import keep_divided
from softprompt.training.session import Session
from softprompt.training.step import PROGRAM, train_step, update

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
    shared: nnx.State,
    batch: Batch,
    keys: Sequence[jax.Array],
    **program: Any,
) -> list[tuple[nnx.State, Any, dict[str, jax.Array]]]:
    """Make one `update` of N trials in one program. The trials share the backbone and the teacher.

    The trials of one device run side by side. With a mixture of experts they run one after
    another, because JAX has no `vmap` of `ragged_dot` with shared weights.

    Args:
      trainable, opt_state, constants, keys: one per trial. `(constants, shared)` is the
        `frozen` argument of `update`.
      shared: the frozen state that all trials share.
      batch: the batches of the trials, with a leading axis N, which the axis `trials` of the mesh
        must divide.
      program: the static arguments of `update`, the same for all trials.

    Returns:
      For each trial what `update` returns.
    """
    _, backbone, *_ = nnx.merge(program["graphdef"], trainable[0], constants[0], shared)
    mesh, has_experts = backbone.mesh, getattr(backbone.arch, "num_experts", 0)

    def some_trials(shared: nnx.State, arrays: Any, batch: Batch) -> Any:
        def one_trial(inputs: Any) -> Any:
            (trainable, opt_state, constants, key), batch = inputs
            return update(trainable, opt_state, (constants, shared), batch, key, **program)

        inputs = arrays, batch
        return jax.lax.map(one_trial, inputs) if has_experts else jax.vmap(one_trial)(inputs)

    trials = zip(trainable, opt_state, constants, keys, strict=True)
    stacked: Any = keep_divided(jax.tree.map(lambda *arrays: jnp.stack(arrays), *trials), mesh)
    results = keep_divided(divide_trials(some_trials, mesh)(shared, stacked, batch), mesh)
    return [jax.tree.map(itemgetter(i), results) for i in range(len(keys))]


def shared_settings(experiment: Experiment) -> str:
    """Return the settings, as JSON, that trials must have in common to share a program.

    Trials may differ in seed, learning rate, warm-up, number of steps, weight decay, and in
    the settings that `Method.varying_settings` names, such as the initialization. Few-shot
    demonstrations, for the student or the teacher, depend on the seed, and the trials share them.
    So with `shots` the seed must be the same.
    """
    varying = method_class(experiment.method).varying_settings(experiment)
    excluded: dict[str, Any] = {**_VARYING, **varying}
    teacher = experiment.objective.teacher
    if experiment.shots or (teacher and teacher.shots):
        del excluded["seed"]
    return experiment.model_dump_json(exclude=excluded)


def take_turns(session: Session) -> bool:
    """Whether trials make their steps one after another, each in the program of a single run.

    They do on a CPU. On two cores, the steps of several trials in one program take as long as one
    after another if all batches have the same shape. If they do not, the program pads each batch to
    the longest, and the steps take 15 to 23 % longer.
    """
    return jax.default_backend() == "cpu" and session.base.backbone.mesh is None


def step_group(
    sessions: Sequence[Session], inputs: Sequence[tuple[Batch, jax.Array]]
) -> list[tuple[nnx.State, Any, dict[str, jax.Array]]]:
    """Make one step of a group of trials; see `step_groups`.

    Devices that are left without a trial repeat the first one.

    Args:
      sessions: the trials.
      inputs: for each trial what `Session.next_inputs` returned.

    Returns:
      For each trial the arguments of `Session.accept`.
    """
    if take_turns(sessions[0]):
        return [
            train_step(*session.state.arrays, *each, **session.state.program)
            for session, each in zip(sessions, inputs, strict=True)
        ]
    idle = -len(sessions) % trial_devices(sessions[0])
    filled = [*sessions, *[sessions[0]] * idle], [*inputs, *[inputs[0]] * idle]
    return train_steps(*_arguments(*filled), **sessions[0].state.program)[: len(sessions)]


def trial_devices(session: Session) -> int:
    """Return the number of devices, or groups of devices, that divide the trials of a step."""
    return axis_size(session.base.backbone.mesh, "trials")


def device_count(session: Session) -> int:
    """Return the number of devices that a session uses."""
    return axis_size(session.base.backbone.mesh, AXES)


def step_groups(sessions: Sequence[Session], max_group: int) -> list[list[Session]]:
    """Divide trials into groups that make a step together.

    The trials of a group share a program. On each device their number is a power of two, so that
    few programs are compiled while trials start and end. A group has at most `max_group` trials, or
    one on each device if that is more. Trials that take turns are groups of their own.
    """
    if take_turns(sessions[0]):
        return [[session] for session in sessions]
    groups: list[list[Session]] = []
    left = list(sessions)
    while left:
        program = _program_key(left[0])
        same = [session for session in left if _program_key(session) == program]
        left = [session for session in left if _program_key(session) != program]
        devices = trial_devices(same[0])
        while same:
            width = devices * _trials_of_device(len(same), max_group, devices)
            groups.append(same[:width])
            same = same[width:]
    return groups


def trials_that_fit(session: Session, count: int) -> int:
    """Return how many trials like this one fit into memory together.

    On each device, this is a power of two. The temporary arrays of a step may use most of the free
    memory of an accelerator. A CPU, or a device that does not report its memory, gets one trial.

    Args:
      session: one of the trials.
      count: number of trials.
    """
    batch, key = session.batches.largest(), session.state.key
    budget = _free_memory()
    devices = trial_devices(session)
    width = _trials_of_device(count, MAX_GROUP, devices) if budget else 1
    while width > 1:
        arguments = _arguments([session] * width * devices, [(batch, key)] * width * devices)
        lowered = train_steps.lower(*arguments, **session.state.program)
        needed = lowered.compile().memory_analysis()
        if needed is None:
            width = 1
        elif needed.temp_size_in_bytes <= budget:
            break
        else:
            width = _largest_power_of_two(width * budget / needed.temp_size_in_bytes)
    return min(width * devices, count)


def _trials_of_device(count: int, most: int, devices: int) -> int:
    """Divide trials, of which at most `most` make a step together, over devices."""
    return _largest_power_of_two(min(-(-count // devices), most // devices))


def _largest_power_of_two(limit: float) -> int:
    """The largest power of two that is at most `limit`."""
    return 1 << (max(1, int(limit)).bit_length() - 1)


def _free_memory() -> float:
    """Bytes that the temporary arrays of a step may use on each device; 0 on a CPU."""
    statistics = jax.devices()[0].memory_stats()
    if not statistics or "bytes_limit" not in statistics:
        return 0
    return 0.8 * (statistics["bytes_limit"] - statistics["bytes_in_use"])


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
    """A key that is equal for trials with the same program, base model and teacher."""
    state = session.state
    arrays = state.trainable, state.opt_state, state.frozen[0]
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]
    shared = tuple(map(id, jax.tree.leaves(state.frozen[1])))
    return state.program, shapes, shared, session.rows
