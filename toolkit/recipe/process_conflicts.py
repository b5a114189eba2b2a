"""What a process reward model needs, and what of a recipe it excludes."""

from __future__ import annotations

from collections.abc import Iterator

from toolkit.recipe.ppo_conflicts import Conflict
from toolkit.recipe.training import PpoSection, RewardModelSection


def process_conflicts(section: RewardModelSection) -> Iterator[Conflict]:
    """Conflicts inside the section ``reward_model``."""
    if section.kind == "preference":
        if section.steps is not None:
            fix = "kind: process, or leave it out"
            yield Conflict("comparisons train this reward model, and no labelled steps", fix, ("kind", "steps"))
        return
    if section.steps is None:
        fix = "steps: arithmetic, or a file with prompt, completions and labels"
        yield Conflict("a process reward model learns from labelled steps", fix, ("kind", "steps"))
    if section.trainer == "trl":
        fix = "trainer: engine"
        yield Conflict("TRL's RewardTrainer learns from comparisons, not from steps", fix, ("kind", "trainer"))
    if section.center_rewards_coefficient:
        what = "center_rewards_coefficient belongs to the loss of comparisons"
        yield Conflict(what, "0", ("kind", "center_rewards_coefficient"))
    if section.members > 1 or section.annotators == "heads":
        key = "members" if section.members > 1 else "annotators"
        yield Conflict("a process reward model is one model with one output", "leave it out", ("kind", key))
    if not section.step_separator.isascii() or not section.step_separator.strip(" "):
        what = "steps must be told apart by the text of single tokens"
        yield Conflict(what, "ASCII characters that are not all blanks, such as a line break", ("step_separator",))


def shape_conflicts(ppo: PpoSection, section: RewardModelSection) -> Iterator[Conflict]:
    """Conflicts between the section ``ppo`` and the kind of the reward model."""
    if ppo.reward_shape == "steps" and (section.kind != "process" or ppo.reward != "reward_model"):
        fix = "score, or reward_model.kind: process"
        yield Conflict("rewards of steps come from a process reward model", fix, ("reward_shape", "reward"))
    if section.kind == "process" and ppo.value_head_init == "reward_model":
        what = "the head of a process reward model gives logits of steps, which are no values of states"
        yield Conflict(what, "zero", ("value_head_init",))
