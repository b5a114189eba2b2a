"""Recipe files and ``--set`` as plain trees that remember the line of every key.

The schema (:mod:`toolkit.recipe.schema`) comes in as an argument: what pydantic found wrong becomes a message that
names the key, its line and the likely fix.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from toolkit.errors import RecipeError, nearest

Keys = tuple[str, ...]

# A plain text for one of these sections is short for this key of it: `model: tiny` means `model: {name: tiny}`.
SHORTHAND = {"model": "name", "data": "source"}

_MAP, _SEQ, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "merge"))


@dataclass(frozen=True)
class Mark:
    """Where a value was typed: ``origin`` is what is recorded, ``where`` what an error message says."""

    origin: str
    where: str
    text: str


@dataclass
class Tree:
    """The values as typed, and the mark of every key path (list items too, by their index)."""

    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[Keys, Mark] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that ``1e-5`` is a number here and not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe: inside the installed package, else in the source tree."""
    package = Path(__file__).parents[1]
    folder = package / "_recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """An existing file, else the shipped recipe of that name.

    Raises RecipeError with the nearest name, or the nearest file of the folder that was named.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    if path.is_dir():
        inside = sorted(p.name for p in (*path.glob("*.yaml"), *path.glob("*.yml")))
        fix = f"name a file in it: {', '.join(inside[:5])}" if inside else "name a YAML file"
        raise RecipeError(f"{name_or_path} is a folder, not a recipe", where=str(path), fix=fix)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        fix = nearest(path.name, siblings)
        if path.stem in shipped:
            fix = f"the shipped recipe is named {path.stem!r}, without a folder or ending"
        raise RecipeError(f"there is no recipe file {name_or_path}", where=str(path.parent.absolute()), fix=fix)
    raise RecipeError(
        f"there is no recipe named {name_or_path!r}", where="shipped recipes", fix=nearest(path.name, shipped)
    )


def copy_recipe(name: str, dest: Path, force: bool = False) -> Path:
    """Copy a shipped recipe to a file, or into a folder under its own name. Returns the file.

    Raises RecipeError for an unknown name, a file that exists (unless ``force``) or cannot be written.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(f"there is no recipe named {name!r}", where="shipped recipes", fix=nearest(name, shipped))
    target = dest / f"{name}.yaml" if dest.is_dir() else dest
    if target.exists() and not force:
        raise RecipeError(f"{target} exists already", where=str(target), fix="name another file, or pass --force")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shipped[name], target)
    except (OSError, shutil.SameFileError) as error:
        raise RecipeError(
            f"cannot write {target}: {error}", where=str(target), fix="name a file you may write"
        ) from error
    return target


def read_tree(path: Path) -> Tree:
    """Read one YAML file. Raises RecipeError with file:line where it is unreadable, empty or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe: {error}", where=str(path), fix="it must be a UTF-8 text file"
        ) from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(
                "the recipe is empty", where=f"{path}:1", fix="`duel recipes show smoke` prints a complete one"
            )
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(
                "a recipe is a mapping of sections", where=_where(path, node), fix="begin with `name: my-recipe`"
            )
        tree = Tree()
        tree.values = _build(node, (), _Source(path, text, loader, tree.marks), frozenset())
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        # A quote that is never closed is noticed at the end of the file; what helps is where it opens.
        marks = (error.context_mark, error.problem_mark)
        mark = next(filter(None, marks if "unexpected end" in problem else reversed(marks)), None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        fix = "check the indentation, the quotes and `key: value`"
        if "'\\t'" in problem:
            fix = "indent with spaces"
        elif isinstance(error, ConstructorError):
            fix = "remove the tag"
        raise RecipeError(f"this is not valid YAML: {problem}", where=where, fix=fix) from error
    except ReaderError as error:
        where = f"{path}:{text.count(chr(10), 0, error.position) + 1}"
        fix = "delete it, or escape it inside double quotes"
        raise RecipeError(
            f"YAML does not allow the character {chr(error.character)!r}", where=where, fix=fix
        ) from error
    for section in SHORTHAND:
        _expand_shorthand(tree, section)
    return tree


def apply_set(tree: Tree, setting: str) -> None:
    """Put one ``a.b=value`` into the tree; the value replaces what was there, and sections on the way are created.

    Raises RecipeError for a setting without "=", with an empty key, or with a value that is not YAML.
    """
    where = f"--set {setting}"
    name, equals, text = setting.partition("=")
    keys = tuple(part.strip() for part in name.split("."))
    if not equals or not all(keys):
        raise RecipeError(f"{setting!r} is not KEY=VALUE", where=where, fix="for instance --set ppo.kl_coef=0.1")
    marks: dict[Keys, Mark] = {}
    value = _parse_value(text.strip(), keys, where, marks)
    if len(keys) == 1 and keys[0] in SHORTHAND and isinstance(value, str):
        keys = (keys[0], SHORTHAND[keys[0]])
        marks = {}
    mark = Mark("--set", where, text.strip())
    parent = tree.values
    for depth, key in enumerate(keys[:-1], start=1):
        child = parent.get(key)
        if child is not None and not isinstance(child, dict):
            here, rest = ".".join(keys[:depth]), ".".join(keys[depth:])
            raise RecipeError(f"{here} is {child!r} and has no key {rest!r}", where=where, fix=f"--set {here}=VALUE")
        if child is None:
            parent[key] = child = {}
            tree.marks[keys[:depth]] = mark
        parent = child
    parent[keys[-1]] = value
    for old in [k for k in tree.marks if k[: len(keys)] == keys]:
        del tree.marks[old]
    tree.marks[keys] = mark
    tree.marks.update(marks)


@dataclass(frozen=True)
class _Source:
    path: Path | None
    text: str
    loader: _Loader
    marks: dict[Keys, Mark]
    where: str = ""

    def mark(self, node: yaml.Node) -> Mark:
        text = self.text[node.start_mark.index : node.end_mark.index].strip()
        if self.path is None:
            return Mark("--set", self.where, text)
        return Mark(f"file:{self.path.name}:{node.start_mark.line + 1}", _where(self.path, node), text)


def _where(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _build(node: yaml.Node, keys: Keys, source: _Source, above: frozenset[int]) -> Any:
    """The value of a node; on the way, the mark of every key below it."""
    if isinstance(node, yaml.ScalarNode):
        try:
            return source.loader.construct_object(node)
        except ValueError as error:  # an impossible date, for instance: YAML 1.1 has dates
            raise RecipeError(f"{'.'.join(keys)}: {error}", where=source.mark(node).where, fix="quote it") from error
    if id(node) in above:
        raise RecipeError(
            f"{'.'.join(keys)} refers to itself", where=source.mark(node).where, fix="write the value out"
        )
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
        return [_item(child, (*keys, str(index)), source, above) for index, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode) or node.tag != _MAP:
        raise RecipeError(
            f"a recipe has no {node.tag}", where=source.mark(node).where, fix="use text, numbers, lists, mappings"
        )
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:  # a merge key comes first: what the section itself says overrides it
        if key_node.tag == _MERGE:
            merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for section in reversed(merged):  # of several, the first one wins
                if not isinstance(section, yaml.MappingNode):
                    where = source.mark(key_node).where
                    raise RecipeError("<< takes a mapping", where=where, fix="<<: *name-of-a-section")
                values.update(_build(section, keys, source, above))
    own: dict[str, Mark] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            continue
        mark = source.mark(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError("a key must be a plain text", where=mark.where, fix="remove the brackets around it")
        key = str(key_node.value)
        if key in own:
            dotted = ".".join((*keys, key))
            raise RecipeError(
                f"{dotted} is there twice", where=f"{own[key].where} and {mark.where}", fix="keep one of them"
            )
        own[key] = mark
        below = (*keys, key)
        for old in [k for k in source.marks if k[: len(below)] == below]:
            del source.marks[old]
        # The key's line, not the value's: a block below it begins on the next line.
        source.marks[below] = Mark(mark.origin, mark.where, source.mark(value_node).text)
        values[key] = _build(value_node, below, source, above)
    return values


def _item(node: yaml.Node, keys: Keys, source: _Source, above: frozenset[int]) -> Any:
    source.marks[keys] = source.mark(node)
    return _build(node, keys, source, above)


def _parse_value(text: str, keys: Keys, where: str, marks: dict[Keys, Mark]) -> Any:
    """A YAML scalar or flow collection; block YAML (``a: b`` without braces) is taken as the text it was typed as."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if isinstance(node, yaml.CollectionNode) and not node.flow_style:
            return text
        return _build(node, keys, _Source(None, text, loader, marks, where), frozenset())
    except yaml.YAMLError as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        fix = "put the value in quotes, inside the quotes of the shell"
        raise RecipeError(f"{text!r} is not a YAML value: {problem}", where=where, fix=fix) from error


def _expand_shorthand(tree: Tree, section: str) -> None:
    value = tree.values.get(section)
    if isinstance(value, str):
        key = SHORTHAND[section]
        tree.values[section] = {key: value}
        tree.marks[(section, key)] = tree.marks[(section,)]


@dataclass(frozen=True)
class Problem:
    what: str
    where: str
    fix: str


def combined(problems: Sequence[Problem], name: str) -> RecipeError:
    if len(problems) == 1:
        return RecipeError(problems[0].what, where=problems[0].where, fix=problems[0].fix)
    items = (RecipeError(p.what, where=p.where, fix=p.fix).render().replace("\n", "\n  ") for p in problems)
    return RecipeError(f"{len(problems)} errors in {name}:\n" + "\n".join(f"- {item}" for item in items))


def one_line(value: object) -> str:
    """One line of YAML that reads back as the same value."""
    if isinstance(value, str):
        # Quoted unless it is plainly a word: YAML would read `on`, `1e5` or `12:30` as something else.
        if re.fullmatch(r"[A-Za-z_/](?:[\w./@+-]|:(?=\S))*", value, re.ASCII) and yaml.safe_load(value) == value:
            return value
        return yaml.safe_dump(value, default_style='"', width=10**9, allow_unicode=True).strip()
    if isinstance(value, list):
        return f"[{', '.join(one_line(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{one_line(key)}: {one_line(item)}' for key, item in value.items())}}}"
    return yaml.safe_dump(value).removesuffix("...\n").strip()


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def sections_of(model: type[BaseModel], above: Keys = ()) -> Iterator[tuple[Keys, type[BaseModel]]]:
    yield above, model
    for name, info in model.model_fields.items():
        section = _section_of(info)
        if section is not None:
            yield from sections_of(section, (*above, name))


def _wrong_keys(error: ValidationError, root: type[BaseModel]) -> dict[Keys, str]:
    """Key path -> pydantic's kind of error. Branches of a union and items of a list count as their setting."""
    found: dict[Keys, str] = {}
    for item in error.errors(include_url=False, include_context=False):
        model: type[BaseModel] | None = root
        keys: Keys = ()
        for part in map(str, item["loc"]):
            if model is None:
                break
            keys = (*keys, part)
            field = model.model_fields.get(part)
            model = _section_of(field) if field is not None else None
        found.setdefault(keys, item["type"])
    return found


def schema_error(error: ValidationError, root: type[BaseModel], tree: Tree, path: Path) -> RecipeError:
    """What pydantic found wrong, in one RecipeError: key, line, the value as typed, what is allowed, the likely fix."""
    sections = dict(sections_of(root))
    found = _wrong_keys(error, root).items()
    return combined([_schema_problem(keys, kind, sections, tree, path) for keys, kind in found], path.name)


def _schema_problem(keys: Keys, kind: str, sections: dict[Keys, type[BaseModel]], tree: Tree, path: Path) -> Problem:
    dotted = ".".join(keys)
    model = sections[keys[:-1]]
    mark = tree.marks.get(keys)
    if kind == "extra_forbidden":
        return Problem(f"unknown key {dotted}", mark.where if mark else str(path), _suggest(keys, sections))
    schema = model.model_json_schema()["properties"][keys[-1]]
    expected = allowed(schema)
    if kind == "missing" or mark is None:
        return Problem(f"{dotted} is missing", str(path), f"add `{keys[-1]}: ...`, {expected}")
    text = mark.text if len(mark.text) <= 60 and "\n" not in mark.text else mark.text.split("\n")[0][:57] + "..."
    what = f"{dotted} must be {expected}, not {text or 'empty'}"
    field = model.model_fields[keys[-1]]
    typed_list = text.startswith(("[", "-"))
    if _section_of(field) is not None:
        short = f"{keys[-1]}: {SHORTHAND[keys[-1]].upper()}, or " if len(keys) == 1 and keys[-1] in SHORTHAND else ""
        fix = f"{short}the keys {', '.join(sections[keys].model_fields)}; without the line, the defaults hold"
    elif "enum" in schema:
        fix = nearest(text.strip("'\""), schema["enum"])
    elif "pattern" in schema:
        fix = f"for instance {keys[-1]}: my-recipe"
    elif "text" in expected and typed_list:
        fix = "quote its items"
    elif "a list" in expected and not text.startswith("{"):
        fix = f"{keys[-1]}: [{text}]"
    elif "text" in expected and not text.startswith("{"):
        fix = f'quote it: {keys[-1]}: "{text}"'
    elif field.is_required():
        fix = ""
    else:
        fix = f"the default is {one_line(field.get_default(call_default_factory=True))}"
    return Problem(what, mark.where, fix)


# What other programs call these settings. Looked up only where the word is no key of the section.
_ALSO_CALLED = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "beta": "kl_coef",
    "init_kl_coef": "kl_coef",
    "ppo_epochs": "num_ppo_epochs",
    "max_new_tokens": "response_length",
    "max_completion_length": "max_response_tokens",
    "max_length": "max_response_tokens",
    "model_name_or_path": "name",
    "torch_dtype": "dtype",
    "peft": "lora",
    "dataset": "source",
    "loss": "loss_type",
    "rank": "r",
    "lora_alpha": "alpha",
}


def _suggest(keys: Keys, sections: dict[Keys, type[BaseModel]]) -> str:
    """The nearest key of the section, and the other sections that have the word, or nearly."""
    word, here = keys[-1], sections[keys[:-1]].model_fields
    if "." in word:
        return f"nest it: `{word.split('.')[0]}:`, and `{word.partition('.')[2]}: ...` indented below it"
    names = {name: name for name in here} | {
        other: name for other, name in _ALSO_CALLED.items() if name in here and other not in here
    }
    close = difflib.get_close_matches(word, names, n=1)
    hints = [f"did you mean {names[close[0]]!r}?"] if close else []
    elsewhere: dict[str, list[str]] = {}
    for path, model in sections.items():
        for name in difflib.get_close_matches(word, model.model_fields, n=1, cutoff=0.85) if path != keys[:-1] else []:
            elsewhere.setdefault(name, []).append(".".join(path) or "the top level")
    hints += [f"{name!r} is a key of {' and '.join(places)}" for name, places in elsewhere.items()]
    return "; ".join(hints) or f"{'.'.join(keys[:-1]) or 'a recipe'} has the keys {', '.join(here)}"


def allowed(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words: "a number > 0 or null"."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(allowed(branch) for branch in schema["anyOf"]))
    if "$ref" in schema:
        return "a section"
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kind = schema["type"]
    if kind == "array":
        return f"a list of {allowed(schema['items'])}"
    names = {
        "null": "null",
        "boolean": "true or false",
        "string": "text",
        "integer": "a whole number",
        "number": "a number",
        "object": "a mapping of text to text",
    }
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    pattern = " of letters, digits, '.', '_' and '-'" if "pattern" in schema else ""
    return names[kind] + pattern + (f" {' and '.join(bounds)}" if bounds else "")
