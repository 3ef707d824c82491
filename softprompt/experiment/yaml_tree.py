"""YAML files as trees of settings, with the place where each value was written.

A tree is a mapping of sections. `extends` and overrides are merged into it here; the schema
checks it later.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from softprompt.errors import UserError

Key = tuple[str, ...]
"""A key with the sections that contain it."""

Tree = dict[str, Any]

_MAX_DEPTH = 10  # nested levels; a YAML alias that contains itself would never end


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


class _Loader(yaml.SafeLoader):
    """Reads numbers and booleans as YAML 1.2 does: `1e-3` is a number, `on` and `no` are text."""


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
    """Quotes text that `_Loader` would read as a number or a boolean."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_tree(path: Path) -> tuple[Tree, Origins]:
    """Read a YAML file and the files that it extends.

    Raises:
      UserError: if a file cannot be read or is not a YAML mapping, with its line.
    """
    return _read(path, ())


def dump_tree(tree: Mapping[str, Any]) -> str:
    """Return YAML that `read_tree` reads back as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply_override(override: str, tree: Tree, origins: Origins) -> None:
    """Set a key of a tree as `key=value` says, for example `prompt.length=50`.

    Raises:
      UserError: if the override is malformed.
    """
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"{override!r}: an override has the form key=value")
    if override.startswith("template.") and text.startswith("{"):
        value = text  # a field, not a YAML mapping
    else:
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, LookupError):
            raise UserError(f"override {override}: {text!r} is not a YAML value") from None
    set_value(tuple(name.split(".")), value, Origin(f"override {override}", Path()), tree, origins)


def set_value(key: Key, value: Any, origin: Origin, tree: Tree, origins: Origins) -> None:
    """Set a key of a tree, and create the sections that it needs."""
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
    origins: Origins = {}
    tree = _build(node, (), path, origins) if node else {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}:1: an experiment must be a mapping of keys to values")
    if isinstance(tree.get("sweep"), dict):
        tree["sweep"] = _nest(tree["sweep"], origins)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, origins
    if not isinstance(parent, str):
        raise UserError(f"{origins['extends',].where}: extends: must be the path of another file")
    if not (path.parent / parent).is_file():
        raise UserError(f"{origins['extends',].where}: extends: {parent}: no such file")
    below, below_origins = _read(path.parent / parent, (*chain, resolved))
    return _merge(below, tree), below_origins | origins


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return the line and the description of a syntax error."""
    mark = getattr(error, "problem_mark", None)
    problem = (getattr(error, "problem", None) or str(error)).split("\n")[0]
    return f"{mark.line + 1 if mark else 1}: {problem}"


def _build(node: yaml.Node, key: Key, path: Path, origins: Origins) -> Any:
    """Return the value of a YAML node, and record the line of every key."""
    origins[key] = Origin(f"{path}:{node.start_mark.line + 1}", path.parent)
    if len(key) > _MAX_DEPTH:
        raise UserError(f"{origins[key].where}: nested too deeply")
    if isinstance(node, yaml.MappingNode):
        mapping: Tree = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            where = f"{path}:{key_node.start_mark.line + 1}"
            if name in mapping:
                raise UserError(f"{where}: {'.'.join((*key, name))}: given twice")
            mapping[name] = _build(value_node, (*key, name), path, origins)
            origins[*key, name] = Origin(where, path.parent)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_build(n, (*key, str(i)), path, origins) for i, n in enumerate(node.value)]
    try:
        return _Loader("").construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{origins[key].where}: not a YAML value ({reason})") from None


def _nest(sweep: Mapping[str, Any], origins: Origins) -> Tree:
    """Return the section `sweep` with its dotted keys as nested sections."""
    nested: Tree = {}
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


def _merge(below: Tree, above: Mapping[str, Any]) -> Tree:
    """Put `above` over `below`, section by section. A verbalizer is replaced as a whole."""
    for key, value in above.items():
        is_section = isinstance(value, Mapping) and key != "verbalizer"
        if is_section and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value
    return below
