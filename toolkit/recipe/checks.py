"""Loading a recipe, and checking its settings against each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import (
    ValidationError,
)

from toolkit.errors import nearest
from toolkit.files import is_hub_id
from toolkit.recipe.files import (
    Keys,
    Problem,
    Tree,
    apply_set,
    combined,
    find_recipe,
    one_line,
    read_tree,
    schema_error,
)
from toolkit.recipe.ppo_conflicts import ppo_conflicts
from toolkit.recipe.schema import Arm, Recipe, Training, flat, leaves

# Losses of a pair that the tree batch computes; the others are TRL's own.
ENGINE_LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust")


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe. ``origins``: dotted leaf -> "default", "file:NAME.yaml:LINE" or "--set"."""

    recipe: Recipe
    origins: dict[str, str]
    path: Path | None


def load_recipe(name_or_path: str, sets: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file, or the shipped recipe of that name, apply ``sets`` ("a.b=value") in order, and check it.

    Raises RecipeError, with every wrong key and value in one message, each with its line.
    """
    path = find_recipe(name_or_path)
    tree = read_tree(path)
    for setting in sets:
        apply_set(tree, setting)
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        raise schema_error(error, Recipe, tree, path) from None
    origins = {".".join(keys): _origin(keys, tree) for keys, _ in leaves(recipe)}
    check(recipe, origins)
    return LoadedRecipe(recipe, origins, path)


def resolved_yaml(loaded: LoadedRecipe) -> str:
    """The complete recipe as YAML, every value with its origin behind it. Loading it gives the same Recipe."""
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


# An arm counts these in its own unit (PPO: responses of a rollout, DPO: prompts of the data), or they only log or keep.
OWN_UNITS = {
    "kl_milestones",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
}


def arm_differences(recipe: Recipe) -> dict[str, tuple[object, object]]:
    """Setting -> (PPO's value, DPO's value) where the arms differ in what they share: worth a warning, no error."""
    pairs = {
        name: (getattr(recipe.ppo, name), getattr(recipe.dpo, name))
        for name in Arm.model_fields
        if name not in OWN_UNITS
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check(recipe: Recipe, origins: Mapping[str, str] | None = None) -> None:
    """Check the settings against each other. Raises one RecipeError that names every conflict and its lines."""
    problems: list[Problem] = []
    values = flat(recipe)

    def conflict(what: str, fix: str, *keys: str) -> None:
        where = (f"{key} = {one_line(values[key])}{_line((origins or {}).get(key, ''))}" for key in keys)
        problems.append(Problem(what, ", ".join(where), fix))

    data, ppo, dpo, evaluate = recipe.data, recipe.ppo, recipe.dpo, recipe.evaluate
    for item in ppo_conflicts(ppo):
        conflict(item.what, item.fix, *(f"ppo.{name}" for name in item.names))
    batch = ppo.per_device_train_batch_size
    if batch % ppo.num_mini_batches:
        what = f"a rollout of {batch} responses does not divide by num_mini_batches = {ppo.num_mini_batches}"
        fix = f"take a multiple of {ppo.num_mini_batches}"
        conflict(what, fix, "ppo.per_device_train_batch_size", "ppo.num_mini_batches")
    for name in ("max_steps", "num_train_epochs"):
        if getattr(ppo, name) != Training.model_fields[name].default:
            conflict("PPO is as long as ppo.total_episodes says", "leave it out", f"ppo.{name}")
    if ppo.total_episodes < batch:
        what = f"{ppo.total_episodes} episodes do not fill one rollout of {batch} responses"
        conflict(what, f"at least {batch} episodes", "ppo.total_episodes", "ppo.per_device_train_batch_size")
    if dpo.trainer == "trl" and dpo.kl_milestones:
        fix = "trainer: engine, or num_checkpoints alone"
        conflict("TRL's trainer does not measure the KL", fix, "dpo.trainer", "dpo.kl_milestones")
    if dpo.trainer == "engine" and dpo.loss_type not in ENGINE_LOSSES:
        what = f"the engine has no loss {dpo.loss_type}"
        conflict(what, f"trainer: trl, or one of {', '.join(ENGINE_LOSSES)}", "dpo.loss_type", "dpo.trainer")
    # TRL's sigmoid loss has no smoothing, and its exo_pair none of 0.
    smoothed = ("sigmoid", "robust") if dpo.trainer == "engine" else ("robust", "exo_pair")
    if dpo.label_smoothing and dpo.loss_type not in smoothed:
        what = f"dpo.label_smoothing belongs to the losses {' and '.join(smoothed)} of trainer: {dpo.trainer}"
        keys = ("dpo.label_smoothing", "dpo.loss_type", "dpo.trainer")
        conflict(what, f"0, or loss_type: {smoothed[0]}", *keys)
    if dpo.loss_type == "exo_pair" and not dpo.label_smoothing:
        conflict("exo_pair needs label smoothing", "1e-3 (arXiv 2402.00856)", "dpo.label_smoothing", "dpo.loss_type")
    splits_itself = data.eval_source is None and (data.eval_split is None or not on_the_hub(data.source))
    if splits_itself and not 0 < data.eval_fraction < 1:
        what = "data.eval_fraction must lie between 0 and 1 where the data has no held-out part of its own"
        conflict(what, "0.1, or name an eval_source or an eval_split", "data.eval_fraction")
    if data.eval_split == data.split and data.eval_source is None and on_the_hub(data.source):
        conflict("training and evaluation take the same split", "another split", "data.split", "data.eval_split")
    if data.eval_source == data.source and data.eval_split in (None, data.split):
        fix = "another file or split, or null to hold out a share"
        conflict("training and evaluation take the same data", fix, "data.source", "data.eval_source")
    if data.annotators == []:
        conflict("no annotator is left", "null takes all of them", "data.annotators")
    lora = recipe.model.lora
    if lora is not None and not lora.target_modules:
        conflict("no layer gets an adapter", "all-linear, or `lora: null`", "model.lora.target_modules")
    if evaluate.best_of_n == 1:
        conflict("best of 1 is the policy itself", "2 or more; 0 leaves it out", "evaluate.best_of_n")
    for index, spec in enumerate(evaluate.judges):
        wrong = _judge_problem(spec)
        if wrong:
            conflict(f"evaluate.judges: {spec!r} {wrong[0]}", wrong[1], "evaluate.judges")
        if spec in evaluate.judges[:index]:
            conflict(f"evaluate.judges: {spec!r} is there twice", "keep one of them", "evaluate.judges")
    if problems:
        raise combined(problems, recipe.name)


_JUDGES = {
    "gold": "",
    "rm": "[:MODEL]",
    "implicit": "[:POLICY,REFERENCE]",
    "file": ":PATH",
    "python": ":module:function",
    "llm": ":MODEL",
    "openai": ":MODEL@BASE_URL",
}
_JUDGE_PATTERN = re.compile(
    r"gold|rm(:.+)?|implicit(:[^,]+,[^,]+)?|file:.+|python:[\w.]+:\w+|llm:.+|openai:[^@]+@https?://.+"
)


def _judge_problem(spec: str) -> tuple[str, str] | None:
    """What is wrong with a judge, and the fix; None for a sound one. Whether its model exists shows later."""
    kind = spec.partition(":")[0]
    if kind not in _JUDGES:
        return "is no judge", nearest(kind, _JUDGES)
    if _JUDGE_PATTERN.fullmatch(spec):
        return None
    quote = "; inside [ ] quote it, or its comma ends the list item" if kind == "implicit" else ""
    return "is incomplete", f"{kind}{_JUDGES[kind]}{quote}"


def on_the_hub(source: str) -> bool:
    """Whether a data source is the id of a hub data set, and neither here nor a file by its ending."""
    is_file = re.search(r"\.(jsonl?|csv|parquet)(\.gz)?$", source) is not None
    return is_hub_id(source) and not is_file and not Path(source).exists()


def _line(origin: str) -> str:
    return f" ({origin.removeprefix('file:')})" if origin else ""


def _origin(keys: Keys, tree: Tree) -> str:
    """The leaf's own mark; ``--set`` too where only a part of it (a column, a list item) was set there."""
    origins = [mark.origin for path, mark in tree.marks.items() if path[: len(keys)] == keys]
    if "--set" in origins:
        return "--set"
    return tree.marks[keys].origin if keys in tree.marks else "default"
