"""Recipes by name or file: finding, copying and loading them, and writing one out with the origin of every value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from pydantic import ValidationError

from toolkit.errors import RecipeError, nearest
from toolkit.files import copy_whole
from toolkit.recipe.checks import check, split_of_other_data
from toolkit.recipe.problems import schema_error
from toolkit.recipe.schema import Recipe, leaves
from toolkit.recipe.yaml_values import Keys, one_line, read_file, set_value


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe. ``origins``: dotted setting -> "default", "file:NAME.yaml:LINE" or "--set"."""

    recipe: Recipe
    origins: dict[str, str]
    path: Path


def load_recipe(name_or_path: str, sets: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file, or the shipped recipe of that name, apply ``sets`` ("a.b=value") in order, and check it.

    Raises RecipeError, with every wrong key and value in one message, each with its line.
    """
    path = find_recipe(name_or_path)
    marked = read_file(path)
    for assignment in sets:
        set_value(marked, assignment)
    try:
        recipe = Recipe.model_validate(marked.values)
    except ValidationError as error:
        raise schema_error(error, Recipe, marked, path) from None
    origins = {".".join(keys): marked.origin(keys) for keys, _ in leaves(recipe)}
    if split_of_other_data(recipe.data, origins):
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval_split": None})})
        origins["data.eval_split"] = "--set"  # with the data
    check(recipe, origins)
    return LoadedRecipe(recipe, origins, path)


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """The complete recipe as YAML, with the origin of each value as a comment. Loading it gives the same Recipe."""
    lines = ["# Every setting of this run, and where its value comes from."]
    opened: Keys = ()
    for keys, value in leaves(loaded.recipe):
        for depth in range(len(keys) - 1):
            if opened[: depth + 1] != keys[: depth + 1]:
                lines.append(f"{'  ' * depth}{keys[depth]}:")
        opened = keys[:-1]
        text = f"{'  ' * len(opened)}{keys[-1]}: {one_line(value)}"
        lines.append(f"{text:<48}  # {loaded.origins['.'.join(keys)]}")
    return "\n".join(lines) + "\n"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe: inside the installed package, else in the source tree."""
    package = Path(__file__).parents[1]
    folder = package / "_recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def summary_of(path: Path) -> str:
    """What a recipe is for: the first sentence of its comments."""
    comments = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ").strip() for line in comments)
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", text)[0]


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
    raise _no_shipped_recipe(name_or_path, path.name)


def copy_recipe(name: str, dest: Path, force: bool = False) -> Path:
    """Copy a shipped recipe to a file, or into a folder under its own name. Returns the file.

    A file that is the shipped recipe stays as it is. Raises RecipeError for an unknown name, another file that exists
    (unless ``force``), and a file that cannot be written.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise _no_shipped_recipe(name, name)
    target = dest / f"{name}.yaml" if dest.is_dir() else dest
    if target.is_file() and target.read_bytes() == shipped[name].read_bytes():
        return target
    if target.exists() and not force:
        raise RecipeError(f"{target} exists already", where=str(target), fix="name another file, or pass --force")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_whole(shipped[name], target)
    except OSError as error:
        fix = "name a file you may write"
        raise RecipeError(f"cannot write {target}: {error}", where=str(target), fix=fix) from error
    return target


def _no_shipped_recipe(name: str, word: str) -> RecipeError:
    fix = nearest(word, shipped_recipes())
    return RecipeError(f"there is no recipe named {name!r}", where="shipped recipes", fix=fix)
