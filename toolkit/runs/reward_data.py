"""What the reward model's stage would refuse of the data, or of its base, checked before SFT trains."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.preferences.annotators import annotators_of
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.solutions import Solution
from toolkit.recipe.schema import Recipe
from toolkit.recipe.training import RewardModelSection


def needs_check(section: RewardModelSection) -> bool:
    """Whether :func:`check_reward_data` can refuse anything: the data stage has looked at what others read."""
    return section.annotators == "heads" or section.base is not None or section.kind == "process"


def check_reward_data(recipe: Recipe, rows: Sequence[PreferenceRow], solutions: Sequence[Solution]) -> None:
    """Raises a DuelError where these training rows, or labelled solutions, cannot train the recipe's reward model."""
    section = recipe.reward_model
    if section.annotators == "heads":
        annotators_of(rows, section.annotator)
    if section.base is not None or section.kind == "process":
        from toolkit.training.reward_model import check_base  # torch, which other recipes do not need here

        check_base(recipe.model, section, rows, solutions, recipe.data.max_response_tokens)
