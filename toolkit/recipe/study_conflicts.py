"""What a recipe's section ``study`` cannot ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from toolkit.errors import nearest
from toolkit.recipe.ppo_conflicts import Conflict
from toolkit.recipe.problems import allowed
from toolkit.recipe.schema import Recipe, SearchSpace, StudySection
from toolkit.recipe.section import Section
from toolkit.recipe.yaml_values import one_line

# Sections that the settings of an arm's search space may be in. The first one needs no prefix.
SPACES = {"ppo": ("ppo", "reward_model"), "dpo": ("dpo",)}
# A study compares the policies of equal checkpoints over its seeds, and says itself how long a trial is.
FIXED = ("num_checkpoints", "kl_milestones", "train_tokens", "train_seconds")
# What controls change.
CONTROLLED = ("advantage", "reward", "prompts", "target_length", "online")
LANGUAGE_MODELS = ("llm", "openai")


def full_name(arm: str, setting: str) -> str:
    """The dotted name of a setting of an arm's search space.

    >>> full_name("ppo", "kl_coef"), full_name("ppo", "reward_model.learning_rate")
    ('ppo.kl_coef', 'reward_model.learning_rate')
    """
    return setting if "." in setting else f"{arm}.{setting}"


def study_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Search spaces, judges, budget and controls that do not fit the recipe."""
    study = recipe.study
    assert study is not None
    for arm in SPACES:
        yield from _space_conflicts(recipe, arm, getattr(study, arm))
    if study.budget.tokens is not None and study.budget.seconds is not None:
        yield Conflict("a budget has one unit", "leave out one", ("budget.tokens", "budget.seconds"))
    yield from _judge_conflicts(recipe, study)
    if recipe.evaluate.confidence != 0.95:
        fix = "leave out evaluate.confidence"
        yield Conflict("a study's intervals and tests are at 95%", fix, ())
    if "more_prompts" in study.controls and study.more_prompts is None:
        fix = "name a file of prompts in study.more_prompts"
        yield Conflict("the control more_prompts needs a file", fix, ("controls", "more_prompts"))
    if recipe.rft is not None:
        yield Conflict("a study does not train the baseline rft", "leave out rft; its controls are further arms", ())
    if len(set(study.controls)) < len(study.controls):
        yield Conflict("a control is there twice", "keep one of them", ("controls",))
    for arm in SPACES:
        if getattr(recipe, arm).kl_milestones:
            fix = f"leave out {arm}.kl_milestones: a study interpolates between checkpoints (num_checkpoints)"
            yield Conflict(f"{arm}.kl_milestones are not reached by every trial of a study", fix, ())


def _space_conflicts(recipe: Recipe, arm: str, space: SearchSpace) -> Iterator[Conflict]:
    for setting, values in space.items():
        section, _, name = full_name(arm, setting).partition(".")
        where = (arm,)
        if section not in SPACES[arm]:
            fix = f"settings of {' and '.join(SPACES[arm])}"
            yield Conflict(f"the search space of {arm} cannot have {setting}", fix, where)
            continue
        known = type(getattr(recipe, section)).model_fields
        if name not in known:
            yield Conflict(f"{section} has no setting {name!r} to search over", nearest(name, known), where)
        elif name in FIXED:
            yield Conflict(f"a study does not search over {name}", "leave it out", where)
        elif name in CONTROLLED:
            yield Conflict(f"{name} makes another method of {arm}: it is for controls", "see study.controls", where)
        else:
            yield from _value_conflicts(getattr(recipe, section), section, name, values, where)


def _value_conflicts(
    section: Section, where: str, name: str, values: list[Any] | Mapping[Any, list[float]], names: tuple[str, ...]
) -> Iterator[Conflict]:
    setting = f"{where}.{name}"
    tried = values
    if isinstance(values, Mapping):
        if len(values) != 1:
            fix = "{uniform: [LOW, HIGH]} or {log_uniform: [LOW, HIGH]}"
            yield Conflict(f"the range of {setting} has {len(values)} kinds", fix, names)
            return
        [(kind, tried)] = values.items()
        if not tried[0] < tried[1]:
            yield Conflict(f"the range of {setting} is empty: {one_line(tried)}", "[LOW, HIGH] with LOW < HIGH", names)
        if kind == "log_uniform" and tried[0] <= 0:
            yield Conflict(f"the range of {setting} has no logarithm: {one_line(tried)}", "LOW > 0", names)
    if not tried:
        yield Conflict(f"the search space of {setting} is empty", "list its values", names)
    repeated = [value for i, value in enumerate(tried) if value in tried[:i]]
    if repeated and not isinstance(values, Mapping):
        yield Conflict(f"{setting} has the value {one_line(repeated[0])} twice", "keep one of them", names)
    for value in tried:
        try:
            type(section).model_validate({**section.model_dump(), name: value})
        except ValidationError as error:
            if any(problem["loc"][:1] == (name,) for problem in error.errors()):
                takes = allowed(type(section).model_json_schema()["properties"][name])
                yield Conflict(f"{setting} cannot be {one_line(value)}", f"it takes {takes}", names)


def _judge_conflicts(recipe: Recipe, study: StudySection) -> Iterator[Conflict]:
    judges = recipe.evaluate.judges
    for judge in judges:
        if judge.startswith("file:"):
            fix = "a judge that can be asked: gold, rm:MODEL, python:, llm:, openai:"
            yield Conflict(f"a study samples new responses, which {judge} has not seen", fix, ())
        if judge == "implicit":
            fix = "leave it out: each trial of DPO has another implicit reward"
            yield Conflict("a study has no single implicit reward", fix, ())
    if study.select_by is not None and judges and study.select_by not in judges:
        fix = nearest(study.select_by, judges)
        yield Conflict(f"select_by names {study.select_by!r}, which is not in evaluate.judges", fix, ("select_by",))
    if judges and all(judge == "rm" for judge in judges):
        fix = "add gold, rm:MODEL of other data, python:, llm: or openai:"
        yield Conflict("PPO was trained on every judge of evaluate.judges, so none can decide", fix, ())
    labeller = labels_of(recipe)
    if "online_dpo_gold" in study.controls and (labeller.startswith(LANGUAGE_MODELS) or labeller == "rm"):
        fix = "select by a judge that scores responses: gold, rm:MODEL, python:"
        what = f"online_dpo_gold needs labels by a judge that scores and that no arm was trained on, not {labeller}"
        yield Conflict(what, fix, ("controls", "select_by"))


def labels_of(recipe: Recipe) -> str:
    """The judge that labels for the control online_dpo_gold: the one that selects, or else the first one."""
    judges = recipe.evaluate.judges
    return (recipe.study.select_by if recipe.study is not None else None) or (judges[0] if judges else "gold")
