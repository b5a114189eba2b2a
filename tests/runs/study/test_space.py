"""The settings that trials try."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import kstest

from toolkit.errors import RecipeError
from toolkit.recipe.schema import SearchSpace
from toolkit.runs.study.space import draw_settings

MIXED: SearchSpace = {
    "kl_coef": [0.02, 0.05, 0.2],
    "learning_rate": {"log_uniform": [1e-5, 1e-3]},
    "lam": {"uniform": [0.9, 1.0]},
}


def test_lists_are_a_grid_without_repeats() -> None:
    space: SearchSpace = {"beta": [0.1, 0.5], "loss_type": ["sigmoid", "ipo", "hinge"]}
    drawn = draw_settings(space, 6, 3, where="study.dpo")
    assert len({tuple(values.items()) for values in drawn}) == 6
    assert Counter(values["beta"] for values in drawn) == {0.1: 3, 0.5: 3}
    with pytest.raises(RecipeError, match=r"has 6 settings, and study\.trials asks for 7"):
        draw_settings(space, 7, 3, where="study.dpo")
    assert draw_settings({}, 1, 0, where="study.dpo") == [{}]
    with pytest.raises(RecipeError, match="has only the recipe's own setting"):
        draw_settings({}, 2, 0, where="study.dpo")


@pytest.mark.parametrize("space", [MIXED, {"beta": [0.1, 0.2, 0.5, 1.0]}])
def test_more_trials_extend_a_study_and_a_seed_fixes_it(space: SearchSpace) -> None:
    four = draw_settings(space, 4, 0, where="")
    assert draw_settings(space, 2, 0, where="") == four[:2]
    assert draw_settings(space, 4, 0, where="") == four != draw_settings(space, 4, 1, where="")


def test_a_range_that_rounding_makes_narrow_gives_no_setting_twice() -> None:
    space: SearchSpace = {"beta": {"uniform": [0.1, 0.104]}}
    assert sorted(values["beta"] for values in draw_settings(space, 5, 0, where="")) == [
        0.1,
        0.101,
        0.102,
        0.103,
        0.104,
    ]
    with pytest.raises(RecipeError, match="different settings, 9 are asked for"):
        draw_settings(space, 9, 0, where="study.dpo")


def test_ranges_are_covered_evenly_in_their_own_scale() -> None:
    drawn = draw_settings(MIXED, 300, 0, where="")
    rates = [math.log(values["learning_rate"]) for values in drawn]
    low, high = math.log(1e-5), math.log(1e-3)
    assert kstest(rates, "uniform", (low, high - low)).pvalue > 0.5
    assert kstest([values["lam"] for values in drawn], "uniform", (0.9, 0.1)).pvalue > 0.5
    assert min(Counter(values["kl_coef"] for values in drawn).values()) > 90
    assert abs(np.corrcoef(rates, [values["lam"] for values in drawn])[0, 1]) < 0.1
