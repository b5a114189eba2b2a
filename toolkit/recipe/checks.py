"""Checks of a recipe's settings against each other."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice

from toolkit.errors import nearest
from toolkit.files import is_hub_id
from toolkit.recipe.judge_specs import judge_problem, shown_judge
from toolkit.recipe.ppo_conflicts import Conflict, ppo_conflicts
from toolkit.recipe.problems import MOST_SHOWN, Problem, combined
from toolkit.recipe.process_conflicts import process_conflicts, shape_conflicts
from toolkit.recipe.rounds import rounds_conflicts
from toolkit.recipe.schema import DataSection, EvaluateSection, Recipe, flat
from toolkit.recipe.study_conflicts import study_conflicts
from toolkit.recipe.training import Arm, DpoSection, ModelSection, PpoSection, RewardModelSection, Training
from toolkit.recipe.yaml_values import one_line

# Losses of a pair that the tree batch computes; the others are TRL's own.
ENGINE_LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust")


LONGEST_VALUE = 200  # characters of a setting in an error


def on_the_hub(source: str) -> bool:
    """Whether a data source is the id of a hub data set: neither a file by its ending, nor one that is here."""
    is_file = re.search(r"\.(jsonl?|csv|parquet)(\.gz)?$", source) is not None
    return is_hub_id(source) and not is_file and not os.path.exists(source)


def has_splits(source: str) -> bool:
    """Whether a data source has splits: a hub data set, or a folder other than a single table that was saved."""
    folder = os.path.expanduser(source)
    return on_the_hub(source) or (os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "state.json")))


def held_out_part(data: DataSection) -> tuple[str, str] | None:
    """The source and the split of held-out data of its own; None where a share of the prompts is held out.

    >>> held_out_part(DataSection(source="a/b", eval_split="test"))
    ('a/b', 'test')
    >>> held_out_part(DataSection(source="f.jsonl", eval_split="test"))  # a file has no splits
    """
    if data.eval_source is not None or (data.eval_split is not None and has_splits(data.source)):
        return data.eval_source or data.source, data.eval_split or data.split
    return None


def check(recipe: Recipe, origins: Mapping[str, str] | None = None) -> None:
    """Check the settings against each other. Raises one RecipeError that names every conflict and its lines."""
    conflicts = {
        "ppo": [
            *ppo_conflicts(recipe.ppo),
            *rollout_conflicts(recipe.ppo),
            *budget_conflicts(recipe.ppo),
            *ensemble_conflicts(recipe),
            *shape_conflicts(recipe.ppo, recipe.reward_model),
        ],
        "reward_model": [*reward_model_conflicts(recipe.reward_model), *process_conflicts(recipe.reward_model)],
        "dpo": [*dpo_conflicts(recipe.dpo), *budget_conflicts(recipe.dpo)],
        "data": [*data_conflicts(recipe.data), *split_conflicts(recipe.data, origins or {})],
        "model": model_conflicts(recipe.model),
        "evaluate": evaluate_conflicts(recipe.evaluate),
        "rounds": rounds_conflicts(recipe),
        "study": study_conflicts(recipe) if recipe.study is not None else (),
    }
    values = flat(recipe)
    problems = []
    for section, of_section in conflicts.items():
        for conflict in islice(of_section, MOST_SHOWN):
            keys = [f"{section}.{name}" for name in conflict.names]
            places = (f"{key} = {_excerpt(values[key])}{_line((origins or {}).get(key, ''))}" for key in keys)
            problems.append(Problem(conflict.what, ", ".join(places), conflict.fix))
    if problems:
        raise combined(problems, recipe.name)


def _excerpt(value: object) -> str:
    text = one_line(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _line(origin: str) -> str:
    return f" ({origin.removeprefix('file:')})" if origin else ""


def rollout_conflicts(ppo: PpoSection) -> Iterator[Conflict]:
    """What a recipe asks of PPO beside :func:`ppo_conflicts`: it is as long as its episodes say."""
    batch = ppo.per_device_train_batch_size
    if batch % ppo.num_mini_batches:
        yield Conflict(
            f"a rollout of {batch} responses does not divide by num_mini_batches = {ppo.num_mini_batches}",
            f"take a multiple of {ppo.num_mini_batches}",
            ("per_device_train_batch_size", "num_mini_batches"),
        )
    for name in ("max_steps", "num_train_epochs"):
        if getattr(ppo, name) != Training.model_fields[name].default:
            yield Conflict("PPO is as long as ppo.total_episodes says", "leave it out", (name,))
    if ppo.target_length is not None and ppo.reward != "length":
        what, fix = "the target length would not count: it belongs to reward: length", "reward: length, or leave it out"
        yield Conflict(what, fix, ("target_length", "reward"))
    if ppo.total_episodes < batch and not budget_keys(ppo):
        yield Conflict(
            f"{ppo.total_episodes} episodes do not fill one rollout of {batch} responses",
            f"at least {batch} episodes",
            ("total_episodes", "per_device_train_batch_size"),
        )


def budget_keys(arm: Arm) -> list[str]:
    """The settings that give the arm a budget."""
    return [name for name in ("train_tokens", "train_seconds") if getattr(arm, name) is not None]


def budget_conflicts(arm: Arm) -> Iterator[Conflict]:
    """A budget in two units."""
    if len(budget_keys(arm)) > 1:
        yield Conflict("an arm has one budget: tokens or seconds", "leave out one of them", tuple(budget_keys(arm)))


def reward_model_conflicts(section: RewardModelSection) -> Iterator[Conflict]:
    """Kinds of reward models that exclude each other."""
    several, heads = section.members > 1, section.annotators == "heads"
    if section.trainer == "trl" and (several or heads or section.base is not None):
        key = "members" if several else "annotators" if heads else "base"
        yield Conflict("TRL's trainer trains one score on the SFT policy", "trainer: engine", ("trainer", key))
    if several and heads:
        what = "annotators: heads has a member for each annotator already"
        yield Conflict(what, "members: 1, or annotators: pooled", ("members", "annotators"))
    if section.combine != "mean" and not several and not (heads and section.combine in ("wco", "uwo")):
        yield Conflict("one member leaves nothing to combine", "members: 4, for instance", ("members", "combine"))
    if section.combine == "average_weights" and section.differ_by == "head":
        what = "heads on one trunk have no weights to average but their own"
        yield Conflict(what, "differ_by: seed or data, or combine: mean", ("combine", "differ_by"))
    if section.annotator is not None and not heads:
        what = "a pooled reward model has no head of an annotator"
        yield Conflict(what, "annotators: heads, or leave it out", ("annotator", "annotators"))


def ensemble_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """PPO against an ensemble that no section makes."""
    section = recipe.reward_model
    averaged = section.combine == "average_weights"
    if recipe.ppo.reward == "ensemble" and (averaged or (section.members == 1 and section.annotators == "pooled")):
        what = "ppo.reward: ensemble, and the reward model has one output"
        yield Conflict(what, "reward_model.members: 4, for instance, or ppo.reward: reward_model", ("reward",))


def dpo_conflicts(dpo: DpoSection) -> Iterator[Conflict]:
    """What the loss and the trainer of DPO do not take."""
    yield from online_conflicts(dpo)
    if dpo.trainer == "trl" and dpo.kl_milestones:
        fix = "trainer: engine, or num_checkpoints alone"
        yield Conflict("TRL's trainer does not measure the KL", fix, ("trainer", "kl_milestones"))
    for key in budget_keys(dpo):
        if dpo.max_steps > 0:
            yield Conflict("both say how long DPO trains", "leave out one of them", (key, "max_steps"))
        if dpo.trainer == "trl":
            yield Conflict("TRL's trainer knows no budget", "trainer: engine, or num_train_epochs", (key, "trainer"))
    if dpo.trainer == "engine" and dpo.loss_type not in ENGINE_LOSSES:
        fix = f"trainer: trl, or one of {', '.join(ENGINE_LOSSES)}"
        yield Conflict(f"the engine has no loss {dpo.loss_type}", fix, ("loss_type", "trainer"))
    # TRL's sigmoid loss has no smoothing, and its exo_pair needs some.
    smoothed = ("sigmoid", "robust") if dpo.trainer == "engine" else ("robust", "exo_pair")
    if dpo.label_smoothing and dpo.loss_type not in smoothed:
        yield Conflict(
            f"dpo.label_smoothing belongs to the losses {' and '.join(smoothed)} of trainer: {dpo.trainer}",
            f"0, or loss_type: {smoothed[0]}",
            ("label_smoothing", "loss_type", "trainer"),
        )
    if dpo.loss_type == "exo_pair" and not dpo.label_smoothing:
        fix = "1e-3 (arXiv 2402.00856)"
        yield Conflict("exo_pair needs label smoothing", fix, ("label_smoothing", "loss_type"))


def online_conflicts(dpo: DpoSection) -> Iterator[Conflict]:
    """What DPO on the policy's samples does not take."""
    if dpo.online is None:
        return
    if dpo.trainer == "trl":
        what, fix = "TRL's trainer does not sample from the policy here", "trainer: engine"
        yield Conflict(what, fix, ("trainer", "online.labels"))
    labels = dpo.online.labels
    kind = labels.partition(":")[0]
    if kind in ("llm", "openai"):
        what = "a language model would be asked in every step"
        yield Conflict(f"dpo.online.labels: {what}", "rm, rm:MODEL, gold or python:M:F", ("online.labels",))
    elif kind not in ("rm", "gold", "python"):
        what = f"dpo.online.labels: {labels!r} gives no scores to samples"
        yield Conflict(what, "rm, rm:MODEL, gold or python:M:F", ("online.labels",))
    elif (problem := judge_problem(labels)) is not None:
        yield Conflict(f"dpo.online.labels: {labels!r} {problem[0]}", problem[1], ("online.labels",))


def data_conflicts(data: DataSection) -> Iterator[Conflict]:
    """Data without a held-out part, or with nobody's comparisons."""
    if held_out_part(data) is None and not 0 < data.eval_fraction < 1:
        yield Conflict(
            "data.eval_fraction must lie between 0 and 1 where the data has no held-out part of its own",
            "0.1, or name an eval_source or an eval_split",
            ("eval_fraction",),
        )
    if data.eval_split == data.split and data.eval_source is None and has_splits(data.source):
        what = "training and evaluation take the same split"
        yield Conflict(what, "another split", ("split", "eval_split"))
    if data.eval_source == data.source and data.eval_split in (None, data.split):
        fix = "another file or split, or null to hold out a share"
        yield Conflict("training and evaluation take the same data", fix, ("source", "eval_source"))
    if data.annotators == []:
        yield Conflict("no annotator is left", "null takes all of them", ("annotators",))


def split_of_other_data(data: DataSection, origins: Mapping[str, str]) -> bool:
    """Whether the held-out split is one that a recipe has for its own data, in whose place the user named a file or a
    folder."""
    name = _held_out_name(data)
    replaced = origins[f"data.{name}"] == "--set" and origins["data.eval_split"] != "--set"
    return data.eval_split is not None and replaced and not on_the_hub(getattr(data, name))


def split_conflicts(data: DataSection, origins: Mapping[str, str]) -> Iterator[Conflict]:
    """A held-out split of data that has none."""
    name = _held_out_name(data)
    source = getattr(data, name)
    if data.eval_split is not None and origins.get("data.eval_split") and not has_splits(source):
        fix = "leave it out, or name a folder or a hub data set that has splits, or data.eval_source"
        yield Conflict(f"{source!r} is no data set with splits", fix, ("eval_split", name))


def _held_out_name(data: DataSection) -> str:
    """The setting that names where held-out data comes from."""
    return "source" if data.eval_source is None else "eval_source"


def model_conflicts(model: ModelSection) -> Iterator[Conflict]:
    if model.lora is not None and not model.lora.target_modules:
        yield Conflict("no layer gets an adapter", "all-linear, or `lora: null`", ("lora.target_modules",))


def evaluate_conflicts(evaluate: EvaluateSection) -> Iterator[Conflict]:
    """Judges that are not written as a judge is, or twice; temperatures that are there twice; one price of two; and a
    best of one."""
    if evaluate.best_of_n == 1:
        yield Conflict("best of 1 is the policy itself", "2 or more; 0 leaves it out", ("best_of_n",))
    if evaluate.temperature in evaluate.temperatures:
        what = f"the judged samples have the temperature {evaluate.temperature} already"
        yield Conflict(what, "leave it out of evaluate.temperatures", ("temperature", "temperatures"))
    primary, judges = evaluate.primary_judge, evaluate.judges
    recorded = any(judge.startswith("file:") for judge in judges)  # a file names its judges itself
    if primary is not None and judges and primary not in judges and not recorded:
        what = f"evaluate.primary_judge: {shown_judge(primary)!r} is not in evaluate.judges"
        yield Conflict(what, nearest(primary, judges), ("primary_judge", "judges"))
    repeated = [value for value, times in Counter(evaluate.temperatures).items() if times > 1]
    if repeated:
        what = f"evaluate.temperatures: {', '.join(map(str, repeated))} is there twice"
        yield Conflict(what, "keep one of them", ("temperatures",))
    if (evaluate.judge.prompt_price_usd is None) != (evaluate.judge.completion_price_usd is None):
        what = "a judge's money is counted with both prices, and one is missing"
        yield Conflict(
            what, "name both (0 is a price), or none", ("judge.prompt_price_usd", "judge.completion_price_usd")
        )
    for index, spec in enumerate(evaluate.judges):
        problem = judge_problem(spec)
        if problem:
            yield Conflict(f"evaluate.judges: {shown_judge(spec)!r} {problem[0]}", problem[1], ("judges",))
        if spec in evaluate.judges[:index]:
            yield Conflict(f"evaluate.judges: {shown_judge(spec)!r} is there twice", "keep one of them", ("judges",))
