"""Experiment files: YAML, `extends` and overrides, read into the schema of `config.py`.

A mistake is reported with file, line and key, all mistakes of a file at once. Paths in
a file are relative to that file; paths on the command line, to the current folder.
"""

import copy
import dataclasses
import difflib
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from softprompt.errors import UserError
from softprompt.experiment.schema import Experiment

Key = tuple[str, ...]
Settings = TypeVar("Settings", bound=pydantic.BaseModel)

_DEEPEST = 10  # levels of an experiment file, so that an alias inside itself ends


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a value was written, and the folder that its paths are relative to."""

    where: str
    folder: Path


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: `1e-3` is a number, `on` and `no` are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


class ExperimentFile:
    """An experiment file as it is written, with `key=value` overrides such as `prompt.length=50`.

    Args:
      path: the file.
      overrides: instead of what it says.

    Attributes:
      path: the file.
      sweep: its section `sweep`, as sections in sections; None if it has none.
      overridden: the keys of the overrides.

    Raises:
      UserError: if it is no YAML or an override is malformed, one line for each mistake.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()):
        self.path = Path(path)
        self._tree, self._origins = _read(self.path, ())
        mistakes = []
        for override in overrides:
            try:
                _apply(override, self._tree, self._origins)
            except UserError as error:
                mistakes.append(str(error))
        if mistakes:
            raise UserError("\n".join(mistakes))
        self.overridden = {override.partition("=")[0] for override in overrides}
        self._tree.setdefault("name", self.path.stem)
        self.sweep = self._tree.pop("sweep", None)

    def experiment(self, parameters: Mapping[str, Any] | None = None) -> Experiment:
        """The experiment, with the parameters of a trial by their keys.

        Raises:
          UserError: one line for each mistake, with file, line and key.
        """
        tree, origins = copy.deepcopy(self._tree), dict(self._origins)
        for name, value in (parameters or {}).items():
            _set(tuple(name.split(".")), value, self._sweep_origin(name), tree, origins)
        _resolve_paths(tree, origins)
        return self._validated(Experiment, tree, origins, ())

    def settings(
        self, schema: type[Settings], tree: Mapping[str, Any], name: str | None = None
    ) -> Settings:
        """The section `sweep`, of which `tree` was made, or a key of it, by its schema.

        Raises:
          UserError: one line for each mistake, with file, line and key.
        """
        section = ("sweep",) if name is None else ("sweep", *name.split("."))
        return self._validated(schema, tree, self._origins, section)

    def where(self, name: str) -> str:
        """Where the section `sweep` has a key."""
        return self._sweep_origin(name).where

    def _sweep_origin(self, name: str) -> _Origin:
        keys = ("sweep", *name.split(".")), ("sweep",)
        nearest = next((key for key in keys if key in self._origins), ())
        return self._origins.get(nearest, _Origin(str(self.path), self.path.parent))

    def _validated(
        self,
        schema: type[Settings],
        tree: Mapping[str, Any],
        origins: Mapping[Key, _Origin],
        section: Key,
    ) -> Settings:
        try:
            return schema.model_validate(tree)
        except pydantic.ValidationError as errors:
            lines = [_explain(e, schema, section, origins, self.path) for e in errors.errors()]
            raise UserError("\n".join(lines)) from None


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file, with `key=value` overrides such as `prompt.length=50`.

    Raises:
      UserError: one line for each mistake, with file, line and key.
    """
    file = ExperimentFile(path, overrides)
    if file.sweep is not None:
        raise UserError(f"{file.where('')}: sweep: a file of many trials, for softprompt sweep")
    return file.experiment()


def dump_experiment(experiment: Experiment, folder: Path) -> str:
    """YAML that `load_experiment` reads back as the same experiment from a file in `folder`."""
    tree = experiment.model_dump(exclude_none=True)
    for section, key in _PATH_KEYS:
        part = tree[section] if section else tree
        if part.get(key) is not None:
            part[key] = _each(part[key], partial(_relative, folder=folder))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flattened(value: Any, key: str = "") -> dict[str, Any]:
    """Sections in sections as one mapping, whose keys have dots."""
    if not isinstance(value, Mapping):
        return {key: value}
    parts = (flattened(v, f"{key}.{k}" if key else k) for k, v in value.items())
    return {k: v for part in parts for k, v in part.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which nested settings differ, as `key: old there, new now`."""
    was, now = flattened(old), flattened(new)
    return [
        f"{key}: {was.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Key, _Origin]]:
    resolved = path.resolve()
    if resolved in chain:
        raise UserError(f"{path}: extends itself, through {' -> '.join(map(str, chain))}")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}:{_yaml_problem(error)}") from None
    origins: dict[Key, _Origin] = {}
    tree = _build(node, (), path, origins) if node else {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}:1: an experiment is a mapping of keys to values")
    if isinstance(tree.get("sweep"), dict):
        tree["sweep"] = _nested(tree["sweep"], origins)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, origins
    if not isinstance(parent, str):
        raise UserError(f"{origins['extends',].where}: extends: the path of another file")
    if not (path.parent / parent).is_file():
        raise UserError(f"{origins['extends',].where}: extends: {parent}: no such file")
    below, below_origins = _read(path.parent / parent, (*chain, resolved))
    return _merge(below, tree), below_origins | origins


def _build(node: yaml.Node, key: Key, path: Path, origins: dict[Key, _Origin]) -> Any:
    """A node's value; notes the line of every key on the way."""
    origins[key] = _Origin(f"{path}:{node.start_mark.line + 1}", path.parent)
    if len(key) > _DEEPEST:
        raise UserError(f"{origins[key].where}: nested too deep")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            if name in mapping:
                raise UserError(
                    f"{path}:{key_node.start_mark.line + 1}: {'.'.join((*key, name))}: given twice"
                )
            mapping[name] = _build(value_node, (*key, name), path, origins)
            origins[*key, name] = _Origin(f"{path}:{key_node.start_mark.line + 1}", path.parent)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_build(n, (*key, str(i)), path, origins) for i, n in enumerate(node.value)]
    try:
        return _Loader("").construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}:{node.start_mark.line + 1}: not a YAML value ({reason})") from None


def _nested(sweep: Mapping[str, Any], origins: dict[Key, _Origin]) -> dict[str, Any]:
    """The section `sweep`, whose keys may have dots, as sections in sections."""
    nested: dict[str, Any] = {}
    for name, value in sweep.items():
        *sections, last = name.split(".")
        given = {last: value}
        for section in reversed(sections):
            given = {section: given}
        for key in [key for key in origins if key[:2] == ("sweep", name)]:
            origins["sweep", *sections, last, *key[2:]] = origins[key]
        for before, now in itertools.product(flattened(nested), flattened(given)):
            if f"{before}.".startswith(f"{now}.") or f"{now}.".startswith(f"{before}."):
                raise UserError(f"{origins['sweep', name].where}: sweep.{now}: given twice")
        nested = _merge(nested, given)
    return nested


def _apply(override: str, tree: dict[str, Any], origins: dict[Key, _Origin]) -> None:
    """Set what `key=value` says."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"{override!r}: an override is written key=value")
    origin = _Origin(f"command line: {override}", Path())
    _set(tuple(name.split(".")), _parse_value(override, text), origin, tree, origins)


def _set(
    key: Key, value: Any, origin: _Origin, tree: dict[str, Any], origins: dict[Key, _Origin]
) -> None:
    place = tree
    for depth, section in enumerate(key[:-1], 1):
        if not isinstance(place.get(section), dict):
            place[section] = {}
            origins[key[:depth]] = origin
        place = place[section]
    place[key[-1]] = value
    origins[key] = origin


def _parse_value(override: str, text: str) -> Any:
    if override.startswith("template.") and text.startswith("{"):
        return text  # a field, not a YAML mapping
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError):
        raise UserError(f"command line: {override}: {text!r} is not a YAML value") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = (getattr(error, "problem", None) or str(error)).split("\n")[0]
    return f"{mark.line + 1 if mark else 1}: {problem}"


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Put `above` over `below`, section by section; a verbalizer is replaced whole."""
    for key, value in above.items():
        is_section = isinstance(value, Mapping) and key != "verbalizer"
        if is_section and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value
    return below


_PATH_KEYS = (
    (None, "base"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
    ("prompt", "init_prompts"),
    ("prefix", "init_prompts"),
)


def _resolve_paths(tree: dict[str, Any], origins: Mapping[Key, _Origin]) -> None:
    for section, key in _PATH_KEYS:
        part = tree.get(section) if section else tree
        if not isinstance(part, dict) or key not in part:
            continue
        origin = origins.get((section, key) if section else (key,))
        folder, is_base = origin.folder if origin else Path(), key == "base"
        part[key] = _each(part[key], partial(_resolved, folder=folder, is_base=is_base))


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A text changed, or every text of a list; the rest is the schema's to refuse."""
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _relative(value: str, folder: Path) -> str:
    if not os.path.isabs(value):
        return value
    return os.path.join(".", os.path.relpath(value, os.path.abspath(folder)))


def _resolved(value: str, folder: Path, *, is_base: bool) -> str:
    path = os.path.abspath(folder / Path(value).expanduser())
    if is_base:  # else a short name, a file in a package, or a hub id
        is_path = value.startswith((".", "/", "~")) or os.path.exists(path)
    else:
        is_path = not value.startswith("hub:")
    return path if is_path else value


def _explain(
    error: Any,
    schema: type[pydantic.BaseModel],
    section: Key,
    origins: Mapping[Key, _Origin],
    path: Path,
) -> str:
    """One line for one of pydantic's errors: where, which key, what is wrong."""
    key = (*section, *map(str, error["loc"]))
    written = key
    while written and written not in origins:
        written = written[:-1]
    where = origins[written].where if written in origins else str(path)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        model: Any = schema
        for part in error["loc"][:-1]:
            annotation = model.model_fields[part].annotation  # a section, or one or None
            model = next(m for m in (*get_args(annotation), annotation) if m is not NoneType)
        known = list(model.model_fields)
        if model is Experiment and not where.startswith("command line"):
            known.append("extends")
        close = difflib.get_close_matches(key[-1], known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        message = f"unknown key; {hint}"
    elif error["type"] == "missing":
        message = "missing"
    elif "input" in error and not isinstance(error["input"], dict):
        message = f"{message}, not {error['input']!r}"
    return f"{where}: {'.'.join(key)}: {message}" if key else f"{where}: {message}"
