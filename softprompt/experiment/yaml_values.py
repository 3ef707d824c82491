"""YAML text as plain values, with the line of each, and YAML text of plain values.

Text from outside may be hostile, so its depth, its number of values (after aliases are
expanded) and the length of its numbers are limited.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from softprompt.errors import shortened, shown

Key = tuple[str, ...]
"""A key with the sections that contain it."""

MAX_DEPTH = 10  # nested levels; a YAML alias that contains itself would never end
_MAX_VALUES = 100_000  # the points of a large sweep; reading so many takes three seconds
_MAX_DIGITS = 1000  # characters of a number; converting a longer one may take minutes

_PREFIX = "tag:yaml.org,2002:"
_NUMBERS = (f"{_PREFIX}int", f"{_PREFIX}float")
_SCALARS = (*_NUMBERS, f"{_PREFIX}str", f"{_PREFIX}bool", f"{_PREFIX}null")
_COLLECTIONS = (f"{_PREFIX}map", f"{_PREFIX}seq")


class InvalidYAML(Exception):
    """Text is not YAML that an experiment may contain.

    Args:
      line: the line, counted from 1.
      problem: what is wrong there.
    """

    def __init__(self, line: int, problem: str):
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Reads plain values as YAML 1.2 does: `1e-3` is a number; `on` and `2024-05-01` are text."""

    _depth = 0
    _values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, unless there are too many."""
        self._depth, self._values = self._depth + 1, self._values + 1
        line = self.peek_event().start_mark.line + 1
        if self._depth > MAX_DEPTH:
            raise InvalidYAML(line, "nested too deeply")
        if self._values > _MAX_VALUES:
            raise _too_many(line)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":int", ":null"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_PREFIX}bool", re.compile("^(true|false)$"), list("tf"))
_FLOAT = re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$")
_Loader.add_implicit_resolver(f"{_PREFIX}float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that is not text in YAML 1.1, such as `on`, or in YAML 1.2, such as `1e-3`."""


_Dumper.add_implicit_resolver(f"{_PREFIX}float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> tuple[Any, dict[Key, int]]:
    """Parse YAML text that holds one value.

    Returns:
      The value, and the line of every value in it by its key. Items of a list have their
      numbers as keys. Mappings have only text as keys: `1: x` is read as `"1": x`.

    Raises:
      InvalidYAML: if the text is not YAML, has values of other types than text, numbers,
        booleans, lists and mappings, or exceeds a limit.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidYAML(line, f"the character #x{error.character:04x} is not allowed") from None
    except yaml.YAMLError as error:
        raise _syntax_error(error) from None
    builder = _Builder(loader)
    return (builder.build(node, ()) if node else None), builder.lines


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return YAML that `parse_yaml` reads back as the same mapping."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Builder:
    """Makes values of YAML nodes.

    Attributes:
      lines: the line of every value by its key.
    """

    def __init__(self, loader: _Loader):
        self._loader = loader
        self._values = 0
        self.lines: dict[Key, int] = {}

    def build(self, node: yaml.Node, key: Key) -> Any:
        """Return the value of a node, and record its line."""
        line = node.start_mark.line + 1
        self.lines[key] = line
        self._values += 1
        if self._values > _MAX_VALUES:
            raise _too_many(line)
        if len(key) >= MAX_DEPTH:
            raise InvalidYAML(line, "nested too deeply")
        if node.tag not in (_SCALARS if isinstance(node, yaml.ScalarNode) else _COLLECTIONS):
            tag = node.tag.replace(_PREFIX, "!!")
            raise InvalidYAML(line, f"the tag {shown(tag)} is not supported")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*key, str(i))) for i, item in enumerate(node.value)]
        if node.tag in _NUMBERS and len(node.value) > _MAX_DIGITS:
            raise InvalidYAML(line, f"a number of more than {_MAX_DIGITS:,} characters")
        try:
            value = self._loader.construct_object(node)
        except (ValueError, LookupError):  # of a tag such as !!int before a text
            kind = node.tag.removeprefix(_PREFIX)
            raise InvalidYAML(line, f"{shortened(node.value)} is not of type {kind}") from None
        return _whole_characters(value, line) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise InvalidYAML(line, "a key must be text, not a list or a mapping")
            name = _whole_characters(key_node.value, line)
            if name in mapping:
                raise InvalidYAML(line, f"{'.'.join((*key, shown(name)))}: given twice")
            mapping[name] = self.build(value_node, (*key, name))
            self.lines[*key, name] = line
        return mapping


def _too_many(line: int) -> InvalidYAML:
    return InvalidYAML(line, f"more than {_MAX_VALUES:,} values")


def _whole_characters(text: str, line: int) -> str:
    r"""Join escaped surrogate pairs such as `\ud83d\ude00`, which JSON has; reject half of one."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise InvalidYAML(line, "a text with half of a surrogate pair") from None


def _syntax_error(error: yaml.YAMLError) -> InvalidYAML:
    mark = getattr(error, "problem_mark", None)
    problem = (getattr(error, "problem", None) or str(error)).split("\n")[0]
    if problem == "but found another document":
        problem = "a second document begins; a file has one"
    return InvalidYAML(mark.line + 1 if mark else 1, shown(problem))
