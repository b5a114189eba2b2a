"""Names of stages and policies in a run of several rounds, and what a recipe's ``rounds`` cannot ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from toolkit.recipe.judge_specs import judge_problem, shown_judge
from toolkit.recipe.ppo_conflicts import Conflict
from toolkit.recipe.problems import LARGEST_SEED
from toolkit.recipe.schema import Recipe, RoundsSection

LANGUAGE_MODELS = ("llm", "openai")


def stage_of(kind: str, round_: int) -> str:
    """The name of a stage in a round, which is also that of its folder.

    >>> stage_of("ppo", 1), stage_of("ppo", 2)
    ('ppo', 'ppo@2')
    """
    return kind if round_ == 1 else f"{kind}@{round_}"


def kind_of(stage: str) -> str:
    """What a stage does, whatever its round.

    >>> kind_of("ppo"), kind_of("reward_model@3")
    ('ppo', 'reward_model')
    """
    return stage.partition("@")[0]


def round_of(stage: str) -> int:
    """
    >>> round_of("ppo"), round_of("ppo@3")
    (1, 3)
    """
    return int(stage.partition("@")[2] or 1)


def stage_words(stage: str) -> str:
    """The name of a stage for readers.

    >>> stage_words("reward_model"), stage_words("reward_model@2")
    ('reward model', 'reward model (round 2)')
    """
    words = kind_of(stage).replace("_", " ")
    return words if round_of(stage) == 1 else f"{words} (round {round_of(stage)})"


def seed_of_round(seed: int, round_: int) -> int:
    """The seed of a round's stages: further rounds draw other prompts and samples than the first."""
    if round_ == 1:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/round {round_}".encode()).digest()[:8], "big") % (LARGEST_SEED + 1)


def n_rounds(recipe: Recipe) -> int:
    return recipe.rounds.number if recipe.rounds is not None else 1


def rounds_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Settings that further rounds cannot take. They are in any section, so that each conflict names its setting."""
    if recipe.rounds is None:
        return
    yield from _label_conflicts(recipe.rounds)
    if recipe.rounds.number > 1:
        yield from (Conflict(what, fix, ("number",)) for what, fix in _cannot_go_on(recipe))


def _cannot_go_on(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Why training cannot go on in a further round, each with the fix."""
    for name, trainer in (("reward_model", recipe.reward_model.trainer), ("dpo", recipe.dpo.trainer)):
        if trainer == "trl":
            yield f"TRL's trainer does not go on from an earlier round: {name}.trainer", f"{name}.trainer: engine"
    if recipe.reward_model.annotators == "heads":
        what = "new labels are none of the data's annotators', who have a head each: reward_model.annotators"
        yield what, "reward_model.annotators: pooled"
    if recipe.ppo.reward == "length":
        what = "PPO for length reads no reward model, which rounds train further: ppo.reward"
        yield what, "ppo.reward: reward_model, or leave out rounds"
    if recipe.reward_model.kind == "process":
        what = "new labels compare responses, and a process reward model learns from labelled steps: reward_model.kind"
        yield what, "reward_model.kind: preference, or leave out rounds"
    if recipe.dpo.online is not None:
        what = "with dpo.online DPO labels its samples in every step, and not once in a round"
        yield what, "leave out dpo.online, or rounds"
    for arm, section in (("ppo", recipe.ppo), ("dpo", recipe.dpo)):
        keys = [key for key in ("train_tokens", "train_seconds", "kl_milestones") if getattr(section, key) is not None]
        for key in keys:
            what = f"{arm}.{key} is for one training of the policy, and rounds go on with it"
            yield what, f"leave out {arm}.{key}, or rounds"
    if recipe.study is not None:
        yield "a study trains each trial once", "leave out study, or rounds"


def _label_conflicts(rounds: RoundsSection) -> Iterator[Conflict]:
    kind = rounds.labels.partition(":")[0]
    takes = "gold, rm:MODEL, python:module:function, llm:MODEL or openai:MODEL@BASE_URL"
    if rounds.labels == "rm":
        what = "the run's own reward model cannot label what it is trained on"
        yield Conflict(what, "rm:MODEL, another reward model", ("labels",))
    elif kind not in ("gold", "rm", "python", *LANGUAGE_MODELS):
        yield Conflict(f"{shown_judge(rounds.labels)!r} cannot label new samples", takes, ("labels",))
    elif (problem := judge_problem(rounds.labels)) is not None:
        yield Conflict(f"{shown_judge(rounds.labels)!r} {problem[0]}", problem[1], ("labels",))
    if rounds.principles is not None and kind not in LANGUAGE_MODELS:
        what = "only a language model reads principles"
        yield Conflict(what, "labels: llm:MODEL or openai:MODEL@BASE_URL", ("labels", "principles"))
    if kind not in LANGUAGE_MODELS and rounds.judge != type(rounds.judge)():
        what = "rounds.judge has options of language models, and none labels"
        yield Conflict(what, "leave it out", ("labels",))


def most_labels(rounds: RoundsSection, n_prompts: int) -> int:
    """The largest number of comparisons that are labelled for an arm in a round.

    >>> most_labels(RoundsSection(samples_per_prompt=3), 10), most_labels(RoundsSection(label_budget=8), 10)
    (30, 8)
    """
    k = rounds.samples_per_prompt
    pairs = min(n_prompts, rounds.prompts or n_prompts) * k * (k - 1) // 2
    return pairs if rounds.label_budget is None else min(pairs, rounds.label_budget)
