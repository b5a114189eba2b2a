"""Settings that a process reward model needs, and those that it excludes."""

from __future__ import annotations

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe.files import load_recipe


@pytest.mark.fault
@pytest.mark.parametrize(
    "settings, says",
    [
        (["reward_model.steps=null"], "learns from labelled steps"),
        (["reward_model.kind=preference", "ppo.reward_shape=score"], "no labelled steps"),
        (["reward_model.kind=preference", "reward_model.steps=null"], "rewards of steps come from"),
        (["reward_model.trainer=trl"], "not from steps"),
        (["reward_model.center_rewards_coefficient=0.1"], "loss of comparisons"),
        (["reward_model.members=2"], "one model with one output"),
        (["reward_model.annotators=heads"], "one model with one output"),
        (["reward_model.step_separator='  '"], "single tokens"),
        (["reward_model.step_separator=ки"], "single tokens"),
        (["ppo.reward=length"], "rewards of steps come from"),
        (["ppo.value_head_init=reward_model"], "logits of steps"),
        (["reward_model.solution_score=mean"], "reward_model.solution_score"),
    ],
)
def test_conflicts(settings: list[str], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("process", settings)
    assert says in str(caught.value)


def test_the_shipped_recipe_is_valid() -> None:
    recipe = load_recipe("process", []).recipe
    assert recipe.reward_model.step_separator == "\n" and recipe.ppo.reward_shape == "steps"
