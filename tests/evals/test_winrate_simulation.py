"""What the intervals and tests promise, over simulated comparisons whose truth is known. Seeds are fixed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from toolkit.evals.winrate import permutation_test, power_prompts, sign_test, win_rate

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("n", [100, 300, 805])
def test_intervals_of_identical_policies_contain_one_half(n: int) -> None:
    rng = np.random.default_rng(n)
    inside = 0
    for k in range(1000):
        p = rng.choice([0.0, 0.5, 1.0], size=n, p=[0.4, 0.2, 0.4])
        row = win_rate(p, policy="a", baseline="b", judge="j", n_resamples=600, seed=k)
        inside += row.ci_low <= 0.5 <= row.ci_high  # type: ignore[operator]
    assert 930 <= inside <= 970


def p_values(n: int, win: float, tie: float, draws: int, test: object, seed: int) -> np.ndarray:
    """The test's p-value of ``draws`` simulated comparisons; it depends on the counts of wins and losses alone."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, [win, tie, 1 - win - tie], size=draws)
    distinct, index = np.unique(counts, axis=0, return_inverse=True)
    values = [test(np.repeat([1.0, 0.5, 0.0], row)) for row in distinct]  # type: ignore[operator]
    return np.array(values)[index.ravel()]


@pytest.mark.parametrize("tie", [0.0, 0.3])
@pytest.mark.parametrize("n", [100, 300, 805])
@pytest.mark.parametrize("test", [sign_test, permutation_test])
def test_false_positives_stay_below_five_per_cent(test: object, n: int, tie: float) -> None:
    rate = np.mean(p_values(n, (1 - tie) / 2, tie, 20_000, test, seed=n) <= 0.05)
    assert 0.02 < rate <= 0.05


def normal_approximation_test(p: np.ndarray) -> float:
    """The two-sided test whose power ``power_prompts`` states: the mean against 1/2 with the variance under 1/2."""
    return float(2 * stats.norm.sf(abs(p.mean() - 0.5) / np.sqrt(np.mean((p - 0.5) ** 2) / len(p))))


def test_194_prompts_have_80_per_cent_power_at_60_per_cent() -> None:
    n = power_prompts(0.60)
    assert n == 194
    power = np.mean(p_values(n, 0.60, 0.0, 50_000, normal_approximation_test, seed=1) <= 0.05)
    assert 0.77 <= power <= 0.83


def test_the_exact_test_keeps_its_level_and_pays_with_power() -> None:
    # wins are whole numbers: at 194 prompts the exact test rejects from 112 wins on, a true level of 3.7%, not 5%
    wins = np.arange(195)
    p = np.array([sign_test(np.repeat([1.0, 0.0], [k, 194 - k])) for k in wins])
    level, power = (stats.binom.pmf(wins, 194, q)[p <= 0.05].sum() for q in (0.5, 0.6))
    assert wins[(p <= 0.05) & (wins > 97)].min() == 112
    assert level == pytest.approx(0.037, abs=5e-4) and power == pytest.approx(0.764, abs=5e-4)
    assert np.mean(p_values(194, 0.60, 0.0, 50_000, sign_test, seed=1) <= 0.05) == pytest.approx(power, abs=0.006)


def test_the_power_formula_holds_with_ties() -> None:
    n = power_prompts(0.58, tie_share=0.3)
    assert n is not None
    power = np.mean(p_values(n, 0.58 - 0.15, 0.3, 20_000, sign_test, seed=2) <= 0.05)
    assert 0.76 <= power <= 0.84
