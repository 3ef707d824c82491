"""Read experiment files: YAML, `extends` and overrides, checked by the schema.

All mistakes in a file are reported together, each with file, line and key. Paths in a file
are relative to that file; paths in overrides are relative to the current folder.
"""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import pydantic

from softprompt.errors import UserError, shortened, shown
from softprompt.experiment.schema import Experiment
from softprompt.experiment.yaml_tree import (
    Origin,
    Origins,
    Tree,
    apply_override,
    flattened,
    read_tree,
    set_value,
)
from softprompt.experiment.yaml_values import Key, dump_yaml

Settings = TypeVar("Settings", bound=pydantic.BaseModel)

PATH_KEYS: Sequence[Key] = (
    ("base",),
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
    ("prompt", "init_prompts"),
    ("prefix", "init_prompts"),
    ("objective", "teacher", "context"),
    ("objective", "teacher", "run"),
    ("objective", "teacher", "base"),
)

SPLIT_ADVICE = "to take a tenth of the training data, set data.validation=0.1"
"""What to do without validation data."""

_ADVICE = {  # for a required key that is missing
    "base": "; for the default base model, add base: smollm2-135m-instruct",
    "data.validation": f"; {SPLIT_ADVICE}",
}
_SWEEP: Key = ("sweep",)
_MAX_LINES = 20  # mistakes that are listed

Causes = Callable[[Any], Sequence[str]]
"""Returns the overrides that cause one of pydantic's errors about several settings."""


class ExperimentFile:
    """An experiment file with overrides, before its values are checked.

    Args:
      path: the file.
      overrides: `key=value` strings that replace values of the file, such as `prompt.length=50`.

    Attributes:
      path: the file.
      sweep: the section `sweep` as nested sections; None if the file has none.
      overridden: the keys of the overrides.

    Raises:
      UserError: if the file is not YAML or an override is malformed, one line per mistake.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()):
        self.path = Path(path)
        self._overrides = list(overrides)
        self._tree, origins = read_tree(self.path)
        _expand_objective(self._tree, origins)  # so that an override can change its settings
        mistakes = []
        for override in overrides:
            try:
                apply_override(override, self._tree, origins)
            except UserError as error:
                mistakes.append(str(error))
            _expand_objective(self._tree, origins)
        if mistakes:
            raise UserError("\n".join(mistakes))
        self.overridden = {override.partition("=")[0] for override in overrides}
        self._tree.setdefault("name", self.path.stem)
        self.sweep = self._tree.pop("sweep", None)
        self._sweep_origins = {key: value for key, value in origins.items() if key[:1] == _SWEEP}
        self._origins = {key: value for key, value in origins.items() if key[:1] != _SWEEP}

    def experiment(self, parameters: Mapping[str, Any] | None = None) -> Experiment:
        """Return the checked experiment.

        Args:
          parameters: values of a trial by dotted key, which replace those of the file.

        Raises:
          UserError: one line per mistake, with file, line and key.
        """
        tree, origins = self._with_parameters(parameters or {})
        causes = partial(self._causes, parameters or {})
        return self._validated(Experiment, tree, origins, (), causes)

    def settings(
        self, schema: type[Settings], tree: Mapping[str, Any], name: str | None = None
    ) -> Settings:
        """Return the section `sweep`, or a part of it, checked by a schema.

        Args:
          schema: the schema of the section or of the part.
          tree: its values.
          name: the dotted key of the part; None for the whole section.

        Raises:
          UserError: one line per mistake, with file, line and key.
        """
        section = _SWEEP if name is None else (*_SWEEP, *name.split("."))
        beginning = f"{'.'.join(section)}."
        within = [override for override in self._overrides if override.startswith(beginning)]
        return self._validated(schema, tree, self._sweep_origins, section, lambda mistake: within)

    def where(self, name: str) -> str:
        """Return the place of a key of the section `sweep`, for error messages."""
        return self._sweep_origin(name).where

    def _sweep_origin(self, name: str) -> Origin:
        keys = (*_SWEEP, *name.split(".")), _SWEEP
        found = (self._sweep_origins[key] for key in keys if key in self._sweep_origins)
        return next(found, Origin(str(self.path), self.path.parent))

    def _with_parameters(self, parameters: Mapping[str, Any]) -> tuple[Tree, Origins]:
        """Return a copy of the settings with the parameters of a trial."""
        tree, origins = _copied(self._tree), dict(self._origins)
        for name, value in parameters.items():
            set_value(tuple(name.split(".")), value, self._sweep_origin(name), tree, origins)
        _resolve_paths(tree, origins)
        return tree, origins

    def _validated(
        self,
        schema: type[Settings],
        tree: Mapping[str, Any],
        origins: Origins,
        section: Key,
        causes: Causes,
    ) -> Settings:
        try:
            return schema.model_validate(tree)
        except pydantic.ValidationError as errors:
            found = errors.errors(include_url=False)
            lines = [
                _explain(error, schema, section, origins, self.path, causes)
                for error in found[:_MAX_LINES]
            ]
            if len(found) > _MAX_LINES:
                lines.append(f"{self.path}: and {len(found) - _MAX_LINES:,} more mistakes")
            raise UserError("\n".join(lines)) from None

    def _causes(self, parameters: Mapping[str, Any], mistake: Any) -> list[str]:
        """Return the overrides without which a trial would not have this mistake."""
        causes = []
        for place, override in enumerate(self._overrides):
            others = self._overrides[:place] + self._overrides[place + 1 :]
            tree, _ = ExperimentFile(self.path, others)._with_parameters(parameters)
            try:
                Experiment.model_validate(tree)
            except pydantic.ValidationError as errors:
                left = errors.errors(include_url=False)
                # Combinations are checked only if no key is missing.
                if any(e["type"] == "missing" or _is_same(e, mistake) for e in left):
                    continue
            causes.append(override)
        return causes


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
      path: the YAML file.
      overrides: `key=value` strings that replace values of the file, such as `prompt.length=50`.

    Raises:
      UserError: one line per mistake, with file, line and key.

    Examples:
      >>> load_experiment("experiments/sentiment.yaml", ["prompt.length=10"])
      Experiment('sentiment', method prompt, base 'smollm2-135m-instruct')
    """
    file = ExperimentFile(path, overrides)
    if file.sweep is not None:
        raise UserError(
            f"{file.where('')}: sweep: this section describes many trials; use softprompt sweep, "
            "or remove it"
        )
    return file.experiment()


def dump_experiment(experiment: Experiment, folder: Path) -> str:
    """Return YAML that `load_experiment` reads back from a file in `folder` as the same experiment.

    Absolute paths are written relative to the folder.
    """
    tree = experiment.model_dump(exclude_none=True)
    _change_paths(tree, lambda key: partial(_relative, folder=folder))
    return dump_yaml(tree)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, as `key: was 1, is now 2`."""
    was, now = flattened(old), flattened(new)
    return [
        f"{key}: was {was.get(key)!r}, is now {now.get(key)!r}"
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]


def _copied(tree: Tree) -> Tree:
    """Copy the sections of a tree. Their values are shared, because nothing changes them."""
    return {key: _copied(v) if isinstance(v, dict) else v for key, v in tree.items()}


def _expand_objective(tree: Tree, origins: Origins) -> None:
    """Write `objective: preference` as `objective: {name: preference}`."""
    if isinstance(name := tree.get("objective"), str):
        tree["objective"] = {"name": name}
        origins["objective", "name"] = origins[("objective",)]


def _resolve_paths(tree: Tree, origins: Origins) -> None:
    """Make all paths absolute."""

    def change(key: Key) -> Callable[[str], str]:
        folder = origins[key].folder if key in origins else Path()
        return partial(_resolved, folder=folder, is_base=key[-1] == "base")

    _change_paths(tree, change)


def _change_paths(tree: Tree, change: Callable[[Key], Callable[[str], str]]) -> None:
    """Replace every path `p` in a tree by `change(key)(p)`."""
    for key in PATH_KEYS:
        *sections, name = key
        section: Any = tree
        for each in sections:
            section = section.get(each) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.get(name) is not None:
            section[name] = _map_texts(section[name], change(key))


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change a text, or all texts of a list; the schema rejects other values later."""
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _relative(value: str, folder: Path) -> str:
    if not os.path.isabs(value):
        return value
    return os.path.join(".", os.path.relpath(value, os.path.abspath(folder)))


def _resolved(value: str, folder: Path, *, is_base: bool) -> str:
    if not value:  # the schema rejects it
        return value
    try:
        path = os.path.abspath(folder / Path(value).expanduser())
    except RuntimeError:  # `~` of an unknown user; the schema rejects it
        return value
    if is_base:  # otherwise a short name or the id of a model on the hub
        is_path = value.startswith((".", "/", "~")) or os.path.exists(path)
    else:
        is_path = not value.startswith("hub:")
    return path if is_path else value


def _explain(
    error: Any,
    schema: type[pydantic.BaseModel],
    section: Key,
    origins: Origins,
    path: Path,
    causes: Causes,
) -> str:
    """Return one line for one of pydantic's errors: where, which key, and what is wrong."""
    key = (*section, *map(str, error["loc"]))
    written = key
    while written and written not in origins:
        written = written[:-1]
    where = origins[written].where if written in origins else str(path)
    message = shown(str(error["msg"]).removeprefix("Value error, "), 300)
    if error["type"] == "extra_forbidden":
        model: Any = schema
        for part in error["loc"][:-1]:
            annotation = model.model_fields[part].annotation  # a section, or a section or None
            model = next(m for m in (*get_args(annotation), annotation) if m is not NoneType)
        known = list(model.model_fields)
        if model is Experiment and not where.startswith("override "):
            known.append("extends")
        close = difflib.get_close_matches(shown(key[-1]), known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        message = f"unknown key; {hint}"
    elif error["type"] == "missing":
        message = f"missing{_ADVICE.get('.'.join(key), '')}"
    elif error["type"] in ("model_type", "dict_type"):
        message = f"must be a mapping of keys to values, not {shortened(error['input'])}"
    elif isinstance(error["input"], dict):
        overrides = " and ".join(f"override {shown(override)}" for override in causes(error))
        if overrides and where.startswith("override "):
            where = overrides
        elif overrides:
            where = f"{where} with {overrides}"
    else:
        message = f"{message}, not {shortened(error['input'])}"
    name = ".".join(map(shown, key))
    return f"{where}: {name}: {message}" if name else f"{where}: {message}"


def _is_same(error: Any, other: Any) -> bool:
    """Whether two of pydantic's errors are about the same mistake."""
    return (error["loc"], error["msg"]) == (other["loc"], other["msg"])
