"""How many prompts or seeds a comparison lacks: against simulation, and what is said where no number would do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from toolkit.evals.study.comparing import win_shares
from toolkit.evals.study.crossed import CrossedMean, VarianceParts, crossed_means
from toolkit.evals.study.needed import CONTAINS_HALF, MOST_PROMPTS, MOST_SEEDS, POWER, needed
from toolkit.evals.verdict import Decision

pytestmark = pytest.mark.parity
UNDECIDED = Decision("undecided", CONTAINS_HALF)


def simulated(seeds: tuple[int, int], prompts: int, shift: float, seed_sd: float, rng: Any) -> CrossedMean:
    scores = [
        seed_sd * rng.normal(size=(k, 1)) + 0.5 * rng.normal(size=prompts) + rng.normal(size=(k, prompts))
        for k in seeds
    ]
    wins = win_shares(scores[0][None, None] + shift, scores[1][None, None])[0, 0]
    return crossed_means(wins.mean(axis=1)[None], wins.mean(axis=0)[None])[0]


def known(seeds: tuple[int, int], prompts: int, shift: float, seed_sd: float) -> CrossedMean:
    """A comparison of this size whose win rate is the true one, with variance parts from many and large studies."""
    rng = np.random.default_rng(5)
    large = simulated((150, 150), 1_000, shift, seed_sd, rng).parts
    small = [simulated(seeds, prompts, shift, seed_sd, rng).parts for _ in range(200)]
    interaction = np.mean([parts.interaction for parts in small], axis=0)
    parts = VarianceParts(large.seeds, tuple(interaction), float(np.mean([of.by_prompt for of in small])), seeds)
    value = float(norm.cdf(shift / np.sqrt(2 * (1 + 0.5**2 + seed_sd**2))))
    return CrossedMean(value, *parts.variance(seeds, prompts), prompts, parts)


@pytest.mark.parametrize(
    ("seeds", "prompts", "shift", "seed_sd"),
    [((3, 3), 60, 0.35, 0.05), ((5, 5), 150, 0.25, 0.1), ((3, 5), 200, 0.45, 0.2)],
)
def test_with_the_said_number_eighty_percent_of_studies_decide(
    seeds: tuple[int, int], prompts: int, shift: float, seed_sd: float
) -> None:
    """800 studies of each size: the share has a standard deviation of 1.4%.

    Seeds are whole numbers, so the power that is compared is that at the said number. With 3 seeds the interval's width
    differs much from study to study, and the plan is a little too hopeful.
    """
    mean = known(seeds, prompts, shift, seed_sd)
    row = needed(mean, UNDECIDED)
    rng = np.random.default_rng(1)
    sizes = [(tuple(max(k, row["n_seeds"]) for k in seeds), prompts)]
    if row["n_prompts"] is not None:
        sizes.append((seeds, row["n_prompts"]))
    for k, n in sizes:
        decided = 0
        for _ in range(800):
            low, _ = simulated(k, n, shift, seed_sd, rng).interval(bounds=(0.0, 1.0))
            decided += low > 0.5
        planned = mean.power(0.5, k, n)
        assert planned >= POWER and abs(decided / 800 - planned) < (0.1 if min(k) == 3 else 0.05), (k, n)


def test_the_parts_make_the_variance_at_the_present_size() -> None:
    mean = simulated((4, 3), 90, 0.2, 0.5, np.random.default_rng(3))
    assert mean.parts is not None and min(mean.parts.seeds) > 0.0
    variance, df = mean.parts.variance((4, 3), 90)
    assert (variance, df) == pytest.approx((mean.variance, mean.df))
    fewer = mean.parts.variance((4, 3), 10)[0]
    assert variance < fewer and mean.parts.variance((8, 8), 90)[0] < variance


def parts(seeds: float, prompts: float, k: int = 3) -> VarianceParts:
    return VarianceParts((seeds, seeds), (0.01, 0.01), prompts, (k, k))


def mean_of(value: float, of: VarianceParts, prompts: int = 300) -> CrossedMean:
    return CrossedMean(value, *of.variance(of.n_seeds, prompts), prompts, of)


def test_the_number_is_the_smallest_that_does() -> None:
    mean = mean_of(0.53, parts(1e-5, 0.2))
    row = needed(mean, UNDECIDED)
    assert mean.power(0.5, (3, 3), row["n_prompts"]) >= POWER > mean.power(0.5, (3, 3), row["n_prompts"] - 1)
    mean = mean_of(0.56, parts(0.01, 0.05))
    row = needed(mean, UNDECIDED)
    assert row["n_seeds"] > 3
    assert mean.power(0.5, [row["n_seeds"]] * 2, 300) >= POWER > mean.power(0.5, [row["n_seeds"] - 1] * 2, 300)
    mirrored = needed(mean_of(0.44, parts(0.01, 0.05)), UNDECIDED)
    assert (mirrored["n_seeds"], mirrored["n_prompts"]) == (row["n_seeds"], row["n_prompts"])


def test_where_seeds_dominate_no_number_of_prompts_would_do() -> None:
    row = needed(mean_of(0.56, parts(0.01, 0.05)), UNDECIDED)
    assert row["n_prompts"] is None
    assert row["n_prompts_reason"] == "no number of prompts would do with 3 seeds: the seeds differ too much"
    assert mean_of(0.56, parts(0.01, 0.05)).power(0.5, (3, 3), MOST_PROMPTS) < POWER


def test_where_prompts_dominate_no_number_of_seeds_would_do() -> None:
    row = needed(mean_of(0.53, parts(0.0, 0.24)), UNDECIDED)
    assert row["n_seeds"] is None and row["n_seeds_reason"].startswith(f"not even {MOST_SEEDS} seeds would do with 300")
    assert row["n_prompts"] > 300


def test_decided_comparisons_have_the_nearest_bound() -> None:
    ahead = mean_of(0.6, parts(1e-4, 0.2))
    row = needed(ahead, Decision("better", ""))
    assert row["nearest_bound"] == ahead.interval(bounds=(0.0, 1.0))[0] > 0.5
    assert row["n_prompts"] is None and row["n_seeds"] is None and row["n_prompts_reason"] is None
    behind = mean_of(0.4, parts(1e-4, 0.2))
    assert needed(behind, Decision("better", ""))["nearest_bound"] == pytest.approx(1 - row["nearest_bound"])
    equal = mean_of(0.502, parts(0.0, 0.01))
    assert needed(equal, Decision("no practical difference", ""))["nearest_bound"] == equal.interval()[1]


def test_what_has_no_number_has_a_reason() -> None:
    one_seed = crossed_means(np.full((1, 1, 30), 0.6), np.full((1, 3, 30), 0.6))[0]
    for mean, decision, reason in (
        (None, Decision("undecided", "the arms share no range"), "no range of KL"),
        (one_seed, Decision("undecided", "an arm has one seed"), "an arm has one seed"),
        (mean_of(0.508, parts(0.0, 0.2)), UNDECIDED, "a win rate of 50.8% is so near to one half"),
        (mean_of(0.6, parts(0.0, 0.2), 10), Decision("undecided", "10 judged prompts decide nothing"), "10 judged"),
    ):
        row = needed(mean, decision, "no range of KL")
        assert row["n_prompts"] is None and row["n_seeds"] is None and row["nearest_bound"] is None
        assert row["n_prompts_reason"].startswith(reason) and row["n_seeds_reason"].startswith(reason)
    with pytest.raises(ValueError, match="without variance parts"):
        one_seed.power(0.5, (1, 3), 30)


def test_equal_values_have_no_spread_to_plan_with() -> None:
    mean = crossed_means(np.full((1, 3, 30), 0.6), np.full((1, 3, 30), 0.6))[0]
    assert mean.variance == 0.0 and mean.parts is None
    assert needed(mean, UNDECIDED)["n_prompts_reason"].startswith("all prompts have the same win rate")
