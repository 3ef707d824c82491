"""Experiment files as trees of settings, with the place where each value was written.

A tree is a mapping of sections. `extends` and overrides are merged into it here; the schema
checks it later.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.errors import UserError, shortened, shown
from softprompt.experiment.yaml_values import MAX_DEPTH, InvalidYAML, Key, parse_yaml
from softprompt.files.reading import MEBIBYTE, read_text

Tree = dict[str, Any]

_MAX_FILES = 10  # files that extend each other
_MAX_PARAMETERS = 200  # keys of a sweep; an experiment has fewer


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value was written.

    Attributes:
      where: the place for error messages, such as `file:line`.
      folder: the folder that paths in the value are relative to.
    """

    where: str
    folder: Path


Origins = dict[Key, Origin]


def read_tree(path: Path) -> tuple[Tree, Origins]:
    """Read a YAML file and the files that it extends.

    Raises:
      UserError: if a file cannot be read or is not a YAML mapping, with its line.
    """
    return _read(path, ())


def apply_override(override: str, tree: Tree, origins: Origins) -> None:
    """Set a key of a tree as `key=value` says, for example `prompt.length=50`.

    Raises:
      UserError: if the override is malformed.
    """
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"{shortened(override)}: an override has the form key=value")
    where = f"override {shown(override)}"
    if override.startswith("template.") and text.startswith("{"):
        text = json.dumps(text)  # a text that begins with a field, not a YAML mapping
    try:
        value, lines = parse_yaml(text)
    except InvalidYAML as problem:
        raise UserError(f"{where}: {shortened(text)} is not a YAML value ({problem})") from None
    key, origin = tuple(name.split(".")), Origin(where, Path())
    set_value(key, value, origin, tree, origins)
    for replaced in [other for other in origins if other[: len(key)] == key]:
        del origins[replaced]
    origins |= {(*key, *inner): origin for inner in lines}


def set_value(key: Key, value: Any, origin: Origin, tree: Tree, origins: Origins) -> None:
    """Set a key of a tree, and create the sections that it needs.

    Raises:
      UserError: if the key has too many parts.
    """
    _require_depth(key, origin)
    section = tree
    for depth, name in enumerate(key[:-1], 1):
        if not isinstance(section.get(name), dict):
            section[name] = {}
            origins[key[:depth]] = origin
        section = section[name]
    section[key[-1]] = value
    origins[key] = origin


def flattened(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    parts = (flattened(v, f"{key}.{k}" if key else k) for k, v in value.items())
    return {k: v for part in parts for k, v in part.items()}


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[Tree, Origins]:
    """Read a file; `chain` holds the files that extend it."""
    text = read_text(path, MEBIBYTE)
    resolved = path.resolve()
    if resolved in chain:
        raise UserError(f"{path}: extends itself, through {' -> '.join(map(str, chain))}")
    if len(chain) >= _MAX_FILES:
        raise UserError(f"{path}: more than {_MAX_FILES} files extend each other")
    try:
        tree, lines = parse_yaml(text)
    except InvalidYAML as problem:
        raise UserError(f"{path}:{problem.line}: {problem}") from None
    origins = {key: Origin(f"{path}:{line}", path.parent) for key, line in lines.items()}
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}:1: an experiment must be a mapping of keys to values")
    if isinstance(tree.get("sweep"), dict):
        tree["sweep"] = _nest(tree["sweep"], origins)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, origins
    where = origins["extends",].where
    if not isinstance(parent, str):
        raise UserError(f"{where}: extends: must be the path of another file")
    if not os.path.exists(path.parent / parent):
        raise UserError(f"{where}: extends: {shown(parent)}: no such file")
    below, below_origins = _read(path.parent / parent, (*chain, resolved))
    return _merge(below, tree), below_origins | origins


def _nest(sweep: Mapping[str, Any], origins: Origins) -> Tree:
    """Return the section `sweep` with its dotted keys as nested sections."""
    if len(sweep) > _MAX_PARAMETERS:
        raise UserError(f"{origins['sweep',].where}: sweep: more than {_MAX_PARAMETERS} keys")
    written: dict[str, list[Key]] = {name: [] for name in sweep}
    for key in origins:
        if key[0:1] == ("sweep",) and key[1:]:
            written[key[1]].append(key)
    nested: Tree = {}
    for name, value in sweep.items():
        origin, inner = origins["sweep", name], tuple(name.split("."))
        _require_depth(inner, origin)
        for key in written[name]:
            origins["sweep", *inner, *key[2:]] = origins[key]
        _insert(inner, value, nested, origin)
    return nested


def _insert(key: Key, value: Any, tree: Tree, origin: Origin) -> None:
    """Insert a value into nested sections, and reject a key that they have already."""
    section = tree
    for name in key[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{origin.where}: sweep.{shown('.'.join(key))}: given twice")
    if not isinstance(value, dict):
        if key[-1] in section:
            raise UserError(f"{origin.where}: sweep.{shown('.'.join(key))}: given twice")
        section[key[-1]] = value
    elif not value:
        section.setdefault(key[-1], {})
    for name, inner in value.items() if isinstance(value, dict) else ():
        _insert((*key, name), inner, tree, origin)


def _require_depth(key: Key, origin: Origin) -> None:
    if len(key) > MAX_DEPTH:
        raise UserError(f"{origin.where}: {shown('.'.join(key))}: unknown key")


def _merge(below: Tree, above: Mapping[str, Any]) -> Tree:
    """Put `above` over `below`, section by section. A verbalizer is replaced as a whole."""
    for key, value in above.items():
        is_section = isinstance(value, Mapping) and key != "verbalizer"
        if is_section and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value
    return below
