"""What is wrong with a recipe, in words: the key, its line, the value as typed, what is allowed, the likely fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from toolkit.errors import RecipeError, nearest
from toolkit.recipe.other_names import OTHER_NAMES
from toolkit.recipe.yaml_values import SHORTHAND, Keys, MarkedValues, one_line

LONGEST_SHOWN = 60
MOST_SHOWN = 20  # problems of one recipe
LARGEST_SEED = 2**32 - 1  # numpy takes no larger one
LARGEST_NUMBER = 10**15  # floats hold every whole number up to it
TOO_LARGE = "too_large"  # the kind of error of a larger one


@dataclass(frozen=True)
class Problem:
    what: str
    where: str
    fix: str


def combined(problems: Sequence[Problem], name: str, n: int | None = None) -> RecipeError:
    """The problems of the recipe ``name`` in one error. ``n`` counts those that are not shown, too."""
    n = len(problems) if n is None else n
    errors = [RecipeError(problem.what, where=problem.where, fix=problem.fix) for problem in problems]
    if len(errors) == 1:
        return errors[0]
    items = (error.render().replace("\n", "\n  ") for error in errors)
    more = f"\n- and {n - len(problems):,} more" if n > len(problems) else ""
    return RecipeError(f"{n:,} errors in {name}:\n" + "\n".join(f"- {item}" for item in items) + more)


# ---------------------------------------------------------------- what pydantic found


def schema_error(error: ValidationError, root: type[BaseModel], marked: MarkedValues, path: Path) -> RecipeError:
    """Everything that pydantic found wrong with the values of ``path``, in one error."""
    sections = dict(sections_of(root))
    wrong = list(_wrong_keys(error, root).items())
    problems = [_schema_problem(keys, kind, sections, marked, path) for keys, kind in wrong[:MOST_SHOWN]]
    return combined(problems, path.name, len(wrong))


def sections_of(model: type[BaseModel], above: Keys = ()) -> Iterator[tuple[Keys, type[BaseModel]]]:
    """Every section of a recipe with its key path, the recipe itself first."""
    yield above, model
    for name, info in model.model_fields.items():
        section = _section_of(info)
        if section is not None:
            yield from sections_of(section, (*above, name))


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _wrong_keys(error: ValidationError, root: type[BaseModel]) -> dict[Keys, str]:
    """Key path -> pydantic's kind of error. Branches of a union and items of a list count as their setting."""
    kinds: dict[Keys, str] = {}
    for item in error.errors(include_url=False, include_context=False):
        model: type[BaseModel] | None = root
        keys: Keys = ()
        for part in map(str, item["loc"]):
            if model is None:
                break
            keys = (*keys, part)
            field = model.model_fields.get(part)
            model = _section_of(field) if field is not None else None
        kinds.setdefault(keys, item["type"])
    return kinds


def _schema_problem(
    keys: Keys, kind: str, sections: dict[Keys, type[BaseModel]], marked: MarkedValues, path: Path
) -> Problem:
    dotted = ".".join(keys)
    mark = marked.marks.get(keys)
    if kind == "extra_forbidden":
        if len(dotted) > LONGEST_SHOWN:
            return Problem(f"unknown key {dotted[:LONGEST_SHOWN]}...", mark.where if mark else str(path), "remove it")
        return Problem(f"unknown key {dotted}", mark.where if mark else str(path), _nearest_keys(keys, sections))
    schema = sections[keys[:-1]].model_json_schema()["properties"][keys[-1]]
    expected = allowed(schema)
    if kind == "missing" or mark is None:
        return Problem(f"{dotted} is missing", str(path), f"add `{keys[-1]}: ...`, {expected}")
    text = mark.text
    if len(text) > LONGEST_SHOWN or "\n" in text:
        text = text.split("\n")[0][: LONGEST_SHOWN - 3] + "..."
    if kind == TOO_LARGE:
        return Problem(f"{dotted} is too large: {text}", mark.where, f"at most {LARGEST_NUMBER:,}")
    what = f"{dotted} must be {expected}, not {text or 'empty'}"
    return Problem(what, mark.where, _fix_of_value(keys, schema, text, sections))


def _fix_of_value(keys: Keys, schema: Mapping[str, Any], text: str, sections: dict[Keys, type[BaseModel]]) -> str:
    """What to write instead of ``text``."""
    key, field, expected = keys[-1], sections[keys[:-1]].model_fields[keys[-1]], allowed(schema)
    if _section_of(field) is not None:
        short = f"{key}: {SHORTHAND[key].upper()}, or " if len(keys) == 1 and key in SHORTHAND else ""
        return f"{short}the keys {', '.join(sections[keys].model_fields)}; without the line, the defaults hold"
    if "enum" in schema:
        return nearest(text.strip("'\""), schema["enum"])
    if "pattern" in schema:
        return f"for instance {key}: my-recipe"
    if "text" in expected and text.startswith(("[", "-")):
        return "quote its items"
    if not text.startswith("{"):
        if "a list" in expected:
            return f"{key}: [{text}]"
        if "text" in expected:
            return f'quote it: {key}: "{text}"'
    if field.is_required():
        return ""
    return f"the default is {one_line(field.get_default(call_default_factory=True, validated_data={}))}"


def _nearest_keys(keys: Keys, sections: dict[Keys, type[BaseModel]]) -> str:
    """The nearest key of the section, and the other sections that have the word, or nearly."""
    word, here = keys[-1], sections[keys[:-1]].model_fields
    if "." in word:
        return f"nest it: `{word.split('.')[0]}:`, and `{word.partition('.')[2]}: ...` indented below it"
    other_name = OTHER_NAMES.get(word)
    if other_name is not None and other_name.elsewhere and other_name.in_recipe():
        return other_name.in_recipe()
    names = {name: name for name in here} | {
        other: name.setting for other, name in OTHER_NAMES.items() if name.setting in here and other not in here
    }
    close = difflib.get_close_matches(word, names, n=1)
    hints = [f"did you mean {names[close[0]]!r}?"] if close else []
    elsewhere: dict[str, list[str]] = {}
    for path, model in sections.items():
        for name in difflib.get_close_matches(word, model.model_fields, n=1, cutoff=0.85) if path != keys[:-1] else []:
            elsewhere.setdefault(name, []).append(".".join(path) or "the top level")
    hints += [f"{name!r} is a key of {' and '.join(places)}" for name, places in elsewhere.items()]
    return "; ".join(hints) or f"{'.'.join(keys[:-1]) or 'a recipe'} has the keys {', '.join(here)}"


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def allowed(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words.

    >>> allowed({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]})
    'a number > 0 or null'
    """
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(allowed(branch) for branch in schema["anyOf"]))
    if "$ref" in schema:
        return "a section"
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kind = schema["type"]
    if kind == "array":
        return f"a list of {allowed(schema['items'])}"
    if kind == "object":
        keys = allowed({"type": "string", **schema.get("propertyNames", {})})
        return f"a mapping of {keys} to {allowed(schema['additionalProperties'])}"
    names = {
        "null": "null",
        "boolean": "true or false",
        "string": "text",
        "integer": "a whole number",
        "number": "a number",
    }
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_bound(schema[key])}" for key, sign in signs.items() if key in schema]
    pattern = " of letters, digits, '.', '_' and '-'" if "pattern" in schema else ""
    return names[kind] + pattern + (f" {' and '.join(bounds)}" if bounds else "")
