from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from toolkit.errors import DataError
from toolkit.evals import winrate
from toolkit.evals.winrate import (
    average_within_prompt,
    bradley_terry,
    holm,
    permutation_test,
    power_prompts,
    sign_test,
    win_rate,
)

NAMES = {"policy": "a", "baseline": "b", "judge": "j"}
CONTRACT = [
    "policy",
    "baseline",
    "judge",
    "win",
    "tie",
    "loss",
    "win_rate",
    "standard_error",
    "ci_low",
    "ci_high",
    "p_value",
    "n_prompts",
    "n_judged",
    "n_failed",
    "lc_win_rate",
    "lc_ci_low",
    "lc_ci_high",
    "position_consistency",
]


@pytest.mark.parametrize("n", [1, 3, 1001])
def test_coins_are_those_that_numpy_draws(n: int) -> None:
    one, two = np.random.default_rng(5), np.random.default_rng(5)
    for rows in (1, 2, 5):
        assert np.array_equal(winrate._flips(one, rows, n), two.integers(0, 2, size=(rows, n), dtype=np.int8))
    assert one.integers(0, 1 << 40) == two.integers(0, 1 << 40)


def test_many_prompts_get_the_p_value_of_the_drawn_assignments() -> None:
    n, wins = 26_000, 13_080
    deviations = np.array([0.5] * wins + [-0.5] * (n - wins) + [0.25] * 3)
    coins = np.random.default_rng(3).integers(0, 2, size=(99, len(deviations)), dtype=np.int8)
    hits = np.abs((2.0 * coins - 1.0) @ np.abs(deviations)) >= abs(deviations.sum())
    assert 10 < hits.sum() < 90
    values = [*(deviations + 0.5), *([0.5] * 1000)]
    assert permutation_test(values, seed=3, n_flips=99) == (hits.sum() + 1) / 100


def test_hand_worked_row() -> None:
    # 5 wins, 2 ties, 1 loss, 1 not judged: mean 6/8, variance (5/16 + 2/16 + 9/16)/7 = 1/7
    row = win_rate([1, 1, 1, 1, 1, 0.5, 0.5, 0, math.nan], **NAMES)
    assert (row.win, row.tie, row.loss, row.win_rate) == (5 / 8, 2 / 8, 1 / 8, 6 / 8)
    assert row.standard_error == pytest.approx(math.sqrt(1 / 7 / 8))
    assert row.p_value == pytest.approx(14 / 64)  # 5 or more of 6 decided, on either side: 2*(6 + 1)/2^6
    assert row.sign_test_p == pytest.approx(14 / 64)
    assert (row.n_prompts, row.n_judged, row.n_failed) == (9, 8, 1)
    assert row.ci_low < row.win_rate < row.ci_high  # type: ignore[operator]
    assert list(row.as_dict())[: len(CONTRACT)] == CONTRACT
    assert row.position_consistency is None and row.lc_win_rate is None


def test_failures_are_never_ties() -> None:
    row = win_rate([1.0, math.nan, math.nan, 1.0], n_failed=3, **NAMES)
    assert (row.win_rate, row.tie, row.n_judged, row.n_failed) == (1.0, 0.0, 2, 3)


def test_nothing_judged() -> None:
    row = win_rate([math.nan, math.nan], **NAMES)
    assert row.win_rate is row.win is row.ci_low is row.p_value is row.detectable_effect is None
    assert (row.n_prompts, row.n_judged, row.n_failed) == (2, 0, 2)


def test_all_wins_have_an_interval_that_is_not_a_point() -> None:
    row = win_rate([1.0] * 10, **NAMES)
    assert row.ci_low == pytest.approx(0.025 ** (1 / 10)) and row.ci_high == 1.0
    assert row.p_value == pytest.approx(2 / 2**10)


def test_all_ties_are_undecidable() -> None:
    row = win_rate([0.5] * 30, **NAMES)
    assert (row.win_rate, row.p_value, row.sign_test_p, row.detectable_effect) == (0.5, 1.0, 1.0, None)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_preferences_outside_0_1_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        win_rate([0.5, value], **NAMES)


def test_swapping_the_policies_mirrors_the_row() -> None:
    p = np.random.default_rng(0).choice([0, 0.25, 0.5, 1.0], size=60)
    a, b = win_rate(p, **NAMES), win_rate(1 - p, **NAMES)
    assert a.win == b.loss and a.win_rate == pytest.approx(1 - b.win_rate) and a.p_value == pytest.approx(b.p_value)  # type: ignore[operator]
    assert a.ci_low == pytest.approx(1 - b.ci_high, abs=0.01)  # type: ignore[operator]


def signs_of(n: int) -> Iterator[tuple[int, ...]]:
    return itertools.product((-1, 1), repeat=n)


def brute_force(preferences: list[float]) -> float:
    d = np.array(preferences) - 0.5
    sums = [abs(float(np.dot(s, d))) for s in signs_of(len(d))]
    return float(np.mean([s >= abs(float(d.sum())) - 1e-12 for s in sums]))


@given(st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.75, 5 / 6, 1.0]), min_size=1, max_size=9))
def test_permutation_test_is_exact_on_a_lattice(preferences: list[float]) -> None:
    assert permutation_test(preferences) == pytest.approx(brute_force(preferences), abs=1e-12)


def test_permutation_test_on_continuous_preferences_is_monte_carlo_close() -> None:
    preferences = np.random.default_rng(3).beta(2, 1.4, size=14).tolist()
    exact = brute_force(preferences)
    assert permutation_test(preferences) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))
    assert permutation_test([0.9 + 0.001 * k for k in range(60)]) == 1e-4  # never 0


@pytest.mark.parametrize("steps", [[3, -3, 3, -3, 1], [7, -7] * 7, [11, 11, 11, 11, -11, -11, -11, -11], [1, 2, -3]])
@pytest.mark.parametrize("step", [0.0501, 0.0123])
def test_sums_that_equal_the_observed_one_count_however_they_are_rounded(steps: list[int], step: float) -> None:
    """Preferences on a grid that is not that of the exact test: sums are equal where their steps are."""
    step /= max(map(abs, steps))
    sums = [abs(sum(s * k for s, k in zip(signs, steps, strict=True))) for signs in signs_of(len(steps))]
    exact = float(np.mean([total >= abs(sum(steps)) for total in sums]))
    p = permutation_test([0.5 + step * k for k in steps])
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999) + 1e-12)


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "step"),
    [(150, 150, 0, 0.1), (30_005, 29_995, 7, 0.15), (30_500, 29_500, 0, 0.5), (40, 19, 3, 0.07)],
)
def test_prompts_that_deviate_alike_get_the_exact_p_value_in_any_number(
    wins: int, losses: int, ties: int, step: float
) -> None:
    preferences = [0.5 + step] * wins + [0.5 - step] * losses + [0.5] * ties
    exact = binomtest(wins, wins + losses, 0.5).pvalue
    assert permutation_test(preferences) == pytest.approx(exact, rel=1e-9)


def test_sign_test_drops_ties() -> None:
    assert sign_test([1, 1, 1, 1, 1, 1, 0.5, 0.5]) == pytest.approx(2 / 64)
    assert sign_test([0.5, 0.5]) == 1.0 and sign_test([]) is None


def test_average_within_prompt() -> None:
    ids, means = average_within_prompt(["q", "p", "q", "p", "r"], [1.0, 0.5, 0.0, math.nan, math.nan])
    assert ids.tolist() == ["q", "p", "r"]
    assert means[:2].tolist() == [0.5, 0.5] and math.isnan(means[2])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize(("rate", "prompts"), [(0.60, 194), (0.55, 783), (0.52, 4903), (0.40, 194)])
def test_power_prompts(rate: float, prompts: int) -> None:
    assert power_prompts(rate) == prompts


def test_ties_lower_the_prompts_needed() -> None:
    fewer = power_prompts(0.6, tie_share=0.3)
    assert fewer is not None and 120 < fewer < 150
    assert power_prompts(0.5) is None
    with pytest.raises(DataError, match="cannot occur"):
        power_prompts(0.9, tie_share=0.4)


def test_the_detectable_effect_is_that_of_the_prompts_and_not_of_what_was_observed() -> None:
    effects = [win_rate([1.0] * k + [0.0] * (200 - k), **NAMES).detectable_effect for k in (98, 130)]
    assert effects == [pytest.approx((1.959964 + 0.841621) * 0.5 / 200**0.5, abs=1e-6)] * 2
    assert win_rate([1.0] * 40 + [0.5] * 120 + [0.0] * 40, **NAMES).detectable_effect == pytest.approx(0.0626, abs=1e-4)


def test_bradley_terry_two_policies_is_the_log_odds() -> None:
    # 30 wins of 40: log strength difference ln 3
    fit = bradley_terry(list(range(40)), ["a"] * 40, ["b"] * 40, [1.0] * 30 + [0.0] * 10)
    assert fit.policies == ("a", "b") and fit.n == 40
    assert fit.log_strength == pytest.approx((math.log(3) / 2, -math.log(3) / 2))
    assert fit.win_rate == pytest.approx((0.75, 0.25))
    assert fit.ci_low[0] is not None and 0 < fit.ci_low[0] < fit.log_strength[0] < fit.ci_high[0]  # type: ignore[operator]


def test_bradley_terry_without_a_maximum_is_null() -> None:
    fit = bradley_terry([0, 1, 2, 3], ["a", "a", "b", "c"], ["b", "c", "c", "b"], [1.0, 1.0, 1.0, 1.0])
    assert fit.log_strength == (None, None, None)  # a never lost


def test_bradley_terry_ignores_unjudged_rows_and_refuses_self_comparisons() -> None:
    fit = bradley_terry([0, 1, 2], ["a", "a", "a"], ["b", "b", "b"], [1.0, 0.0, math.nan])
    assert fit.n == 2 and fit.log_strength == pytest.approx((0.0, 0.0))
    with pytest.raises(DataError, match="itself"):
        bradley_terry([0], ["a"], ["a"], [1.0])


@pytest.mark.parametrize("value", [0.5, 0.7])
def test_bradley_terry_has_no_interval_where_resamples_do_not_differ(value: float) -> None:
    for prompts in ([0] * 4, [0, 1, 2, 3]):  # one prompt; four that are judged alike
        fit = bradley_terry(prompts, ["a"] * 4, ["b"] * 4, [value] * 4)
        assert fit.win_rate == pytest.approx((value, 1 - value))
        assert fit.ci_low == fit.ci_high == (None, None)
    fit = bradley_terry([0, 1, 2, 3], ["a"] * 4, ["b"] * 4, [value] * 3 + [0.4])
    assert None not in fit.ci_low and None not in fit.ci_high


def test_a_policy_without_a_judged_comparison_takes_no_strength_from_the_others() -> None:
    policy, baseline, values = ["a", "a", "b", "a"] * 10, ["b", "c", "c", "b"] * 10, [1.0, 0.5, 0.0, 0.0] * 10
    whole = bradley_terry(list(range(40)), policy, baseline, values)
    fit = bradley_terry(list(range(41)), [*policy, "x"], [*baseline, "c"], [*values, math.nan])
    assert fit.policies == ("a", "b", "c", "x") and fit.n == 40
    for field in ("log_strength", "win_rate", "ci_low", "ci_high"):
        assert getattr(fit, field) == (*getattr(whole, field), None) and None not in getattr(whole, field)


@pytest.mark.parametrize("half", [0.49999999999999994, 0.5000000000000001])
def test_a_tie_that_a_mean_misses_by_rounding_is_a_tie(half: float) -> None:
    row = win_rate([half] * 3 + [1.0] * 6 + [0.0], **NAMES)
    assert (row.win, row.tie, row.loss, row.n_tied) == (0.6, 0.3, 0.1, 3)
    assert row.p_value == pytest.approx(row.sign_test_p) == pytest.approx(0.125)
    all_ties = win_rate([half] * 3, **NAMES)
    assert (all_ties.win_rate, all_ties.tie, all_ties.p_value, all_ties.sign_test_p) == (0.5, 1.0, 1.0, 1.0)
    assert all_ties.detectable_effect is None
    # too far from one half for a mean's rounding, and too near for a step of the exact test
    assert permutation_test([0.5 + 5e-12, 1.0, 1.0]) == pytest.approx(0.5, abs=0.02)


def test_an_interval_does_not_depend_on_the_rounding_of_sums() -> None:
    """Sums of 0.55 and 0.45 miss 10 by rounding, most of them on one side; those of 1 and 0 are exact."""
    row = win_rate([0.55] * 10 + [0.45] * 10, **NAMES)
    exact = win_rate([1.0] * 10 + [0.0] * 10, **NAMES)
    assert exact.ci_low is not None and exact.ci_high is not None and row.win_rate == 0.5
    assert (row.ci_low, row.ci_high) == pytest.approx((0.45 + 0.1 * exact.ci_low, 0.45 + 0.1 * exact.ci_high))
