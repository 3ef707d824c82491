"""The section `sweep` of an experiment file, and the trials that it describes."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pydantic
from pydantic import Field

from softprompt.errors import UserError, shown
from softprompt.experiment.reading import ExperimentFile
from softprompt.experiment.schema import Experiment, Section

MAX_TRIALS = 10_000
_LARGEST = 1e300


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise ValueError(f"must be a number below {_LARGEST} in absolute value")
    return value


Number = Annotated[int | float, pydantic.PlainValidator(_number)]
Value = Any  # the value of a parameter: any value that an experiment accepts


class Range(Section):
    """A uniform distribution from `low` to `high`, or with `log` a log-uniform one.

    It draws whole numbers if both ends are integers.
    """

    low: Number
    high: Number
    log: bool = False

    @pydantic.model_validator(mode="after")
    def _ends_fit(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        if self.log and self.low <= 0:
            raise ValueError("log needs a low above 0")
        return self

    @property
    def whole(self) -> bool:
        """Whether it draws whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, random: np.random.Generator) -> Number:
        """Draw a number, rounded to four digits if it is not whole."""
        low, high = float(self.low), float(self.high) + self.whole
        if self.log:
            drawn = float(np.exp(random.uniform(np.log(low), np.log(high))))
        else:
            drawn = float(random.uniform(low, high))
        if self.whole:
            return min(int(drawn), int(self.high))
        return min(max(float(f"{drawn:.4g}"), low), high)


Values = list[Value] | Range


class HalvingSettings(Section):
    """Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943).

    Attributes:
      rungs: steps at which trials are compared by `evaluation.metric`.
      factor: of n trials at a rung, the best n / factor continue.
    """

    rungs: Annotated[
        list[Annotated[int, Field(ge=1, le=1_000_000_000)]], Field(min_length=1, max_length=1000)
    ]
    factor: Annotated[int, Field(ge=2, le=MAX_TRIALS)] = 3

    @pydantic.model_validator(mode="after")
    def _rungs_rise(self) -> Self:
        if any(low >= high for low, high in itertools.pairwise(self.rungs)):
            raise ValueError("rungs must increase")
        return self


class SweepSettings(Section):
    """The trials of a sweep, and how they run.

    Attributes:
      parameters: for each key of the experiment, a list of values or a range to draw from.
      how: `grid` (every combination), `zip` (the first values of all keys, then the second
        values, and so on), `random` (draw every value) or `tpe` (Optuna chooses from the
        results so far).
      points: the keys and values of each trial. They replace lists of values and `how`.
      trials: number of trials, for `random` and `tpe`.
      halving: successive halving, which stops poor trials early.
      at_once: number of trials that train side by side. By default as many as fit into the memory
        of an accelerator, and one on a CPU.
      devices: number of devices that divide the trials; -1 for all. With `compute.mesh`, the number
        of groups of devices, each with that mesh.
      storage: database URL of the study, for `tpe`. By default a file in the sweep folder.
    """

    parameters: Mapping[str, Values]
    how: Literal["grid", "zip", "random", "tpe"] = "grid"
    points: Annotated[list[dict[str, Value]], Field(min_length=1)] | None = None
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    halving: HalvingSettings | None = None
    at_once: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    devices: Annotated[int, Field(ge=-1, le=100_000)] = 1
    storage: str | None = None

    @property
    def count(self) -> int:
        """The number of trials, found without making them."""
        if self.points is not None:
            return len(self.points)
        if self.trials is not None:
            return self.trials
        counts = [len(v) for v in self.parameters.values() if isinstance(v, list)]
        return counts[0] if self.how == "zip" else math.prod(counts)

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if bool(self.parameters) == bool(self.points):
            raise ValueError("give keys of the experiment with lists of values, or points")
        if self.points and (self.how != "grid" or self.trials is not None):
            raise ValueError("points list the trials; remove how and trials")
        drawn = self.how in ("random", "tpe")
        ranges = [name for name, v in self.parameters.items() if isinstance(v, Range)]
        if ranges and not drawn:
            raise ValueError(f"{ranges[0]}: a range needs how: random or how: tpe")
        if drawn != (self.trials is not None):
            raise ValueError("how: random and how: tpe need trials; grid and zip do not accept it")
        lists = {name: v for name, v in self.parameters.items() if not isinstance(v, Range)}
        for name, values in lists.items():
            if self.how != "zip" and len({*map(repr, values)}) < len(values):
                raise ValueError(f"{shown(name)}: a value is given twice")
        counts = {*map(len, lists.values())}
        if self.how == "zip" and len(counts) > 1:
            raise ValueError("how: zip needs the same number of values for every key")
        if self.storage and self.how != "tpe":
            raise ValueError("storage needs how: tpe")
        if self.devices == 0:
            raise ValueError("devices: must be 1 or more, or -1 for all devices")
        return self


_OWN = SweepSettings.model_fields.keys() - {"parameters"}
_SECTIONS = {
    name
    for name, field in Experiment.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
_VALUES = Experiment.model_fields.keys() - _SECTIONS


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of a sweep.

    Attributes:
      number: counted from 0.
      parameters: values by keys of the experiment.
      experiment: the experiment with these parameters.
      folder: the run folder.
    """

    number: int
    parameters: Mapping[str, Value]
    experiment: Experiment
    folder: Path

    @property
    def name(self) -> str:
        """The number and the parameters on one line, with short keys if they are unambiguous."""
        last = [name.split(".")[-1] for name in self.parameters]
        keys = last if len({*last}) == len(last) else [*self.parameters]
        given = dict(zip(keys, self.parameters.values(), strict=True))
        return f"trial {self.number} ({format_parameters(given)})"


class Space:
    """The trials that a file describes.

    Args:
      file: the experiment file.
      folder: the sweep folder.

    Raises:
      UserError: if the file has no valid section `sweep`, or one of too many trials.
    """

    def __init__(self, file: ExperimentFile, folder: Path):
        if file.sweep is None:
            raise UserError(f"{file.path}: has no section sweep; list the values to try there")
        if not isinstance(file.sweep, dict):
            raise UserError(f"{file.where('')}: sweep: must be a mapping of keys to values")
        self.file, self.folder = file, folder
        own = {k: v for k, v in file.sweep.items() if k in _OWN}
        if isinstance(points := own.get("points"), list):
            own["points"] = [_flat(each) if isinstance(each, dict) else each for each in points]
        others = _flat({k: v for k, v in file.sweep.items() if k not in _OWN})
        for name in others:
            self._require_key(name)
        values = {name: self._values(name, value) for name, value in others.items()}
        self.sweep = file.settings(SweepSettings, {**own, "parameters": values})
        self._require_few()
        for name in itertools.chain(*(self.sweep.points or ())):
            self._require_key(name)
        if self.sweep.how == "tpe":
            self._require_values()
        else:
            self.trials()

    def trials(self) -> list[Trial]:
        """Return all trials in order. The trials of `tpe` are chosen later, one by one."""
        return [self.trial(i, parameters) for i, parameters in enumerate(self._points())]

    def trial(self, number: int, parameters: Mapping[str, Value]) -> Trial:
        """Return the trial with these parameters.

        Raises:
          UserError: if they are not valid for the experiment.
        """
        experiment = self.file.experiment(parameters)
        if self.sweep.devices == -1 and -1 in dict(experiment.compute.mesh or {}).values():
            raise UserError(
                f"{self.file.where('devices')}: sweep.devices: an axis of compute.mesh is -1, too; "
                "set one of them to a number"
            )
        halving, every = self.sweep.halving, experiment.evaluation.every
        for rung in halving.rungs if halving else ():
            if rung % every or rung >= experiment.training.steps:
                raise UserError(
                    f"{self.file.where('halving')}: sweep.halving.rungs: {rung} must be a multiple "
                    f"of evaluation.every ({every}) and less than training.steps "
                    f"({experiment.training.steps})"
                )
        return Trial(number, parameters, experiment, self.folder / "trials" / f"{number:03d}")

    def longest(self, experiment: Experiment, context: int) -> int:
        """Return the number of virtual tokens of the longest prompt of any trial.

        Args:
          experiment: the experiment of one trial.
          context: context window of the base model. Prompts that do not fit are ignored.
        """
        lengths = [experiment.prompt.length]
        if isinstance(values := self.sweep.parameters.get("prompt.length"), Range):
            lengths.append(min(int(values.high), context - 1))
        else:
            lengths += values or []
        lengths += [each.get("prompt.length", 1) for each in self.sweep.points or []]
        return max((length for length in lengths if length < context), default=0)

    def _require_key(self, name: str) -> None:
        """Reject keys in which trials must not differ."""
        where = self.file.where(name)
        if name.split(".")[0] not in Experiment.model_fields or name == "name":
            raise UserError(f"{where}: sweep.{shown(name)}: unknown key")
        if name in _SECTIONS:
            raise UserError(f"{where}: sweep.{name}: is a section; give its keys, as {name}.KEY")
        if name == "evaluation.metric":
            raise UserError(f"{where}: sweep.{name}: trials are compared by one metric")
        if name in self.file.overridden:
            raise UserError(f"override {name}: trials differ in it; set sweep.{name} instead")

    def _require_few(self) -> None:
        """Count the trials before they are made."""
        count = self.sweep.count
        if count > MAX_TRIALS:
            raise UserError(
                f"{self.file.where('')}: sweep: describes {_counted(count)} trials; at most "
                f"{MAX_TRIALS:,} are possible, so remove values, or draw from them with "
                "how: random"
            )
        values = sum(len(v) for v in self.sweep.parameters.values() if isinstance(v, list))
        if values > MAX_TRIALS:
            raise UserError(
                f"{self.file.where('')}: sweep: lists {values:,} values; at most {MAX_TRIALS:,} "
                "are possible"
            )

    def _require_values(self) -> None:
        """Check each value that `tpe` may choose, with the first values of the other keys."""
        choices = {
            name: [values.low, values.high] if isinstance(values, Range) else values
            for name, values in self.sweep.parameters.items()
        }
        first = {name: values[0] for name, values in choices.items()}
        for name, values in choices.items():
            for value in values:
                self.trial(0, {**first, name: value})

    def _values(self, name: str, value: Value) -> Values:
        if isinstance(value, Mapping):
            return self.file.settings(Range, value, name)
        if isinstance(value, list) and value:
            return value
        raise UserError(
            f"{self.file.where(name)}: sweep.{shown(name)}: must be a list of values, "
            "or {low: ..., high: ...}"
        )

    def _points(self) -> Iterator[Mapping[str, Value]]:
        sweep, names = self.sweep, list(self.sweep.parameters)
        if sweep.points is not None:
            yield from sweep.points
        elif sweep.how == "random":
            random = np.random.default_rng(self.file.experiment().seed)
            for _ in range(sweep.trials or 0):
                yield {name: _draw(v, random) for name, v in sweep.parameters.items()}
        else:
            choices: list[Sequence[Value]] = [
                v for v in sweep.parameters.values() if not isinstance(v, Range)
            ]
            points = (
                zip(*choices, strict=True) if sweep.how == "zip" else itertools.product(*choices)
            )
            for point in points:
                yield dict(zip(names, point, strict=True))


def format_parameters(parameters: Mapping[str, Value]) -> str:
    """Format parameters as overrides: `key=value`, separated by spaces."""
    return " ".join(f"{name}={format_value(value)}" for name, value in parameters.items())


def format_value(value: Value) -> str:
    """Format the value of a parameter as YAML on one line."""
    plain = isinstance(value, str) and "\n" not in value
    return value if plain else json.dumps(value, ensure_ascii=False)


def _draw(values: Values, random: np.random.Generator) -> Value:
    if isinstance(values, Range):
        return values.draw(random)
    return values[int(random.integers(len(values)))]


def _counted(count: int) -> str:
    return f"{count:,}" if count < 10**15 else f"about 10^{math.log10(count):.0f}"


def _flat(tree: Mapping[str, Value]) -> dict[str, Value]:
    """Flatten sections into keys with dots."""
    flat: dict[str, Value] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in _VALUES:
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat
