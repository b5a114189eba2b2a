"""YAML as nested values that remember where each was typed: recipe files, and ``--set`` on top of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from toolkit.errors import RecipeError

Keys = tuple[str, ...]
LARGEST_FILE = 1_000_000  # bytes; no settings take as many
MOST_VALUES = 50_000  # of one file, where aliases are followed
# A plain value for one of these sections is short for this key of it: `model: tiny` means `model: {name: tiny}`.
SHORTHAND = {"model": "name", "data": "source", "rounds": "number"}
SHORT_TYPES: dict[str, type] = {"model": str, "data": str, "rounds": int}
_MAP, _SEQ, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "merge"))


@dataclass(frozen=True)
class Mark:
    """Where a value was typed: ``origin`` is what is recorded, ``where`` what an error message says."""

    origin: str
    where: str
    text: str


@dataclass
class MarkedValues:
    """Nested values as typed, and the mark of every key path, where an item of a list has its index as key."""

    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[Keys, Mark] = field(default_factory=dict)

    def forget(self, keys: Keys) -> None:
        """Remove the marks of a key path and of everything below it."""
        for path in [path for path in self.marks if path[: len(keys)] == keys]:
            del self.marks[path]

    def origin(self, keys: Keys) -> str:
        """``default`` where nobody typed it; ``--set`` also where a part of it alone (an item, a column) was set so."""
        if any(mark.origin == "--set" for path, mark in self.marks.items() if path[: len(keys)] == keys):
            return "--set"
        return self.marks[keys].origin if keys in self.marks else "default"


class YamlLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that ``1e-5`` is a number here and not a text."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_file(path: Path) -> MarkedValues:
    """Read one YAML file. Raises RecipeError with file:line where it is unreadable, empty or not a mapping."""
    marked = MarkedValues()
    values, line = _values_of(path, marked)
    if line is None:
        fix = "`duel recipes show smoke` prints a complete one"
        raise RecipeError("the recipe is empty", where=f"{path}:1", fix=fix)
    if not isinstance(values, dict):
        where = f"{path}:{line}"
        raise RecipeError("a recipe is a mapping of sections", where=where, fix="begin with `name: my-recipe`")
    marked.values = values
    for section in SHORTHAND:
        _expand_shorthand(marked, section)
    return marked


def read_yaml(path: Path) -> Any:
    """The value of a YAML file that is no recipe: mappings, lists, texts, numbers; None where it is empty.

    Raises RecipeError, with file:line, as for a recipe: for duplicate keys, tags, and aliases that multiply.
    """
    return _values_of(path, MarkedValues())[0]


def _values_of(path: Path, marked: MarkedValues) -> tuple[Any, int | None]:
    """The value of a YAML file and its line, None where there is none; the places of its keys go into ``marked``."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            what = f"the file has more than {LARGEST_FILE:,} bytes, and settings are short"
            raise RecipeError(what, where=str(path), fix="name a YAML file of settings")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fix = "it must be a UTF-8 text file"
        raise RecipeError(f"cannot read the file: {error}", where=str(path), fix=fix) from error
    try:
        loader = YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        return _Reader(path, text, loader, marked).value(node, (), frozenset()), node.start_mark.line + 1
    except yaml.MarkedYAMLError as error:
        raise _invalid_yaml(error, path) from error
    except ReaderError as error:
        where = f"{path}:{text.count(chr(10), 0, error.position) + 1}"
        what = f"YAML does not allow the character {chr(error.character)!r}"
        raise RecipeError(what, where=where, fix="delete it, or escape it inside double quotes") from error
    except RecursionError as error:
        raise _nested_too_deeply(str(path)) from error


def _nested_too_deeply(where: str) -> RecipeError:
    return RecipeError("this YAML is nested too deeply", where=where, fix="settings are a few levels deep")


def _invalid_yaml(error: yaml.MarkedYAMLError, path: Path) -> RecipeError:
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    # A quote that is never closed is noticed at the end of the file; the line where it opens helps more.
    marks = (error.context_mark, error.problem_mark)
    mark = next(filter(None, marks if "unexpected end" in problem else reversed(marks)), None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    fix = "check the indentation, the quotes and `key: value`"
    if "'\\t'" in problem:
        fix = "indent with spaces"
    elif isinstance(error, ConstructorError):
        fix = "remove the tag"
    return RecipeError(f"this is not valid YAML: {problem}", where=where, fix=fix)


def _expand_shorthand(marked: MarkedValues, section: str) -> None:
    value = marked.values.get(section)
    if _is_short(section, value):
        key = SHORTHAND[section]
        marked.values[section] = {key: value}
        marked.marks[(section, key)] = marked.marks[(section,)]


def _is_short(section: str, value: object) -> bool:
    return section in SHORTHAND and type(value) is SHORT_TYPES[section]


def set_value(marked: MarkedValues, assignment: str) -> None:
    """Apply one ``a.b=value``. It replaces the value that is there, and makes the sections on the way.

    Raises RecipeError for an assignment without "=", with an empty key, or with a value that is not YAML.
    """
    where = f"--set {assignment}"
    name, equals, text = assignment.partition("=")
    keys = tuple(part.strip() for part in name.split("."))
    if not equals or not all(keys):
        raise RecipeError(f"{assignment!r} is not KEY=VALUE", where=where, fix="for instance --set ppo.kl_coef=0.1")
    typed = MarkedValues()
    value = _parse_value(text.strip(), keys, where, typed)
    if len(keys) == 1 and _is_short(keys[0], value):
        keys = (keys[0], SHORTHAND[keys[0]])
        typed = MarkedValues()
    mark = Mark("--set", where, text.strip())
    parent = marked.values
    for depth, key in enumerate(keys[:-1], start=1):
        child = parent.get(key)
        if child is not None and not isinstance(child, dict):
            here, rest = ".".join(keys[:depth]), ".".join(keys[depth:])
            raise RecipeError(f"{here} is {child!r} and has no key {rest!r}", where=where, fix=f"--set {here}=VALUE")
        if child is None:
            parent[key] = child = {}
            marked.marks[keys[:depth]] = mark
        parent = child
    parent[keys[-1]] = value
    marked.forget(keys)
    marked.marks[keys] = mark
    marked.marks.update(typed.marks)


def _parse_value(text: str, keys: Keys, where: str, typed: MarkedValues) -> Any:
    """A YAML scalar or flow collection. Block YAML (``a: b`` without braces) is taken as the text that it is."""
    try:
        loader = YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if isinstance(node, yaml.CollectionNode) and not node.flow_style:
            return text
        return _Reader(None, text, loader, typed, where).value(node, keys, frozenset())
    except RecursionError as error:
        raise _nested_too_deeply(where[:80]) from error
    except yaml.YAMLError as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        fix = "put the value in quotes, inside the quotes of the shell"
        raise RecipeError(f"{text!r} is not a YAML value: {problem}", where=where, fix=fix) from error


@dataclass(frozen=True)
class _Reader:
    """Makes values of YAML nodes, and puts the mark of every key into ``marked``. ``path`` is None for ``--set``.

    ``above`` are the nodes that a node lies in, by which a node that refers to itself is noticed.
    """

    path: Path | None
    text: str
    loader: YamlLoader
    marked: MarkedValues
    where: str = ""
    counter: Iterator[int] = field(default_factory=partial(count, 1))

    def mark(self, node: yaml.Node) -> Mark:
        text = self.text[node.start_mark.index : node.end_mark.index].strip()
        if self.path is None:
            return Mark("--set", self.where, text)
        line = node.start_mark.line + 1
        return Mark(f"file:{self.path.name}:{line}", f"{self.path}:{line}", text)

    def value(self, node: yaml.Node, keys: Keys, above: frozenset[int]) -> Any:
        if next(self.counter) > MOST_VALUES:
            what = f"more than {MOST_VALUES:,} values, where aliases are followed"
            raise RecipeError(what, where=self.mark(node).where[:80], fix="write the values out, without aliases")
        if isinstance(node, yaml.ScalarNode):
            try:
                value = self.loader.construct_object(node)
                if isinstance(value, bytes):
                    raise ValueError("a setting is no binary value")
                if isinstance(value, str):
                    value.encode()  # an escape can write half of a surrogate pair
                return value
            except ValueError as error:  # an impossible date, for instance: YAML 1.1 has dates
                where = self.mark(node).where
                raise RecipeError(f"{'.'.join(keys)}: {error}", where=where, fix="quote it") from error
        if id(node) in above:
            where = self.mark(node).where
            raise RecipeError(f"{'.'.join(keys)} refers to itself", where=where, fix="write the value out")
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
            return self.sequence(node, keys, above)
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self.mapping(node, keys, above)
        where = self.mark(node).where
        raise RecipeError(f"a recipe has no {node.tag}", where=where, fix="use text, numbers, lists, mappings")

    def sequence(self, node: yaml.SequenceNode, keys: Keys, above: frozenset[int]) -> list[Any]:
        values = []
        for index, child in enumerate(node.value):
            path = (*keys, str(index))
            self.marked.marks[path] = self.mark(child)
            values.append(self.value(child, path, above | {id(node)}))
        return values

    def mapping(self, node: yaml.MappingNode, keys: Keys, above: frozenset[int]) -> dict[str, Any]:
        above = above | {id(node)}
        values = self.merged(node, keys, above)  # comes first: what the section itself says overrides it
        seen: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            mark = self.mark(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("a key must be a plain text", where=mark.where, fix="remove the brackets around it")
            key = str(key_node.value)
            path = (*keys, key)
            if key in seen:
                where = f"{seen[key].where} and {mark.where}"
                raise RecipeError(f"{'.'.join(path)} is there twice", where=where, fix="keep one of them")
            seen[key] = mark
            if key in values:  # from a section that is merged into this one
                self.marked.forget(path)
            # The key's line, not the value's: a block below it begins on the next line.
            self.marked.marks[path] = Mark(mark.origin, mark.where, self.mark(value_node).text)
            values[key] = self.value(value_node, path, above)
        return values

    def merged(self, node: yaml.MappingNode, keys: Keys, above: frozenset[int]) -> dict[str, Any]:
        """The values that a mapping takes over with ``<<``. Of several mappings, the first one wins."""
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag != _MERGE:
                continue
            sections: Sequence[yaml.Node] = [value_node]
            if isinstance(value_node, yaml.SequenceNode):
                sections = value_node.value
            for section in reversed(sections):
                if not isinstance(section, yaml.MappingNode):
                    where = self.mark(key_node).where
                    raise RecipeError("<< takes a mapping", where=where, fix="<<: *name-of-a-section")
                values.update(self.value(section, keys, above))
        return values


def one_line(value: object) -> str:
    """One line of YAML that reads back as the same value; paths become texts, numpy's numbers and arrays Python's.

    >>> one_line({"beta": 0.1, "name": "on", "items": (1, None), "file": Path("a/b")})
    '{beta: 0.1, name: "on", items: [1, null], file: a/b}'
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        # Quoted unless it is certainly a word: YAML would read `on`, `1e5` or `12:30` as something else.
        if re.fullmatch(r"[A-Za-z_/](?:[\w./@+-]|:(?=\S))*", value, re.ASCII) and yaml.safe_load(value) == value:
            return value
        return yaml.safe_dump(value, default_style='"', width=10**9, allow_unicode=True).strip()
    if isinstance(value, list | tuple):
        return f"[{', '.join(one_line(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{one_line(key)}: {one_line(item)}' for key, item in value.items())}}}"
    return yaml.safe_dump(value).removesuffix("...\n").strip()
