"""Variance and degrees of freedom of crossed means, against the sums written out, and coverage in simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from toolkit.evals.study import comparing
from toolkit.evals.study.comparing import mixed_wins, win_shares, wins_along
from toolkit.evals.study.crossed import CrossedMean, crossed_means

pytestmark = pytest.mark.parity


def written_out(wins_KLN: np.ndarray) -> tuple[float, float, float]:
    """Mean, variance and degrees of freedom with loops, from the mean squares' definitions."""
    n_first, n_second, n = wins_KLN.shape
    mean = sum(wins_KLN[k, j, i] for k in range(n_first) for j in range(n_second) for i in range(n))
    mean /= n_first * n_second * n
    by_prompt = [float(np.mean([wins_KLN[k, j, i] for k in range(n_first) for j in range(n_second)])) for i in range(n)]
    of_prompts = sum((x - mean) ** 2 for x in by_prompt) / (n - 1) / n
    variance, squares = of_prompts, of_prompts**2 / (n - 1)
    for layout in (wins_KLN.mean(axis=1), wins_KLN.mean(axis=0)):
        seeds = len(layout)
        ms_seed = n * sum((row.mean() - mean) ** 2 for row in layout) / (seeds - 1)
        ms_error = sum(
            (layout[k, i] - layout[k].mean() - by_prompt[i] + mean) ** 2 for k in range(seeds) for i in range(n)
        ) / ((seeds - 1) * (n - 1))
        variance += (ms_seed - ms_error) / (seeds * n)
        squares += (ms_seed / (seeds * n)) ** 2 / (seeds - 1)
    variance = max(variance, 0.5 * of_prompts)
    return mean, variance, max(variance**2 / squares, min(n_first, n_second) - 1)


@pytest.mark.parametrize(("first", "second", "seed_sd"), [(3, 3, 0.3), (2, 5, 0.0), (4, 3, 1.0), (2, 2, 0.1)])
def test_the_variance_is_that_of_the_mean_squares(first: int, second: int, seed_sd: float) -> None:
    rng = np.random.default_rng(first)
    scores = [rng.normal(size=(k, 23)) + seed_sd * rng.normal(size=(k, 1)) for k in (first, second)]
    wins = win_shares(scores[0][None, None], scores[1][None, None])[0, 0]
    result = crossed_means(wins.mean(axis=1)[None], wins.mean(axis=0)[None])[0]
    assert (result.value, result.variance, result.df) == pytest.approx(written_out(wins), rel=1e-9)
    assert result.interval() == pytest.approx(stats.t.interval(0.95, result.df, result.value, result.variance**0.5))
    assert result.p_value(0.5) == pytest.approx(
        2 * stats.t.sf(abs(result.value - 0.5) / result.variance**0.5, result.df), rel=1e-6
    )


def test_wins_are_counted_over_judges_and_ties_are_half() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 3, size=(2, 3, k, 5)).astype(float) for k in (2, 4))
    wins = win_shares(first, second)
    for p, q, k, j, n in np.ndindex(wins.shape):
        pairs = [(first[judge, p, k, n], second[judge, q, j, n]) for judge in range(2)]
        assert wins[p, q, k, j, n] == np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])


@pytest.mark.parametrize("block", [1, 200, 1 << 20])
def test_mixtures_are_sums_over_their_policies(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_BLOCK", block)  # in blocks of prompts or all at once
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(1, 2, 2, 6)), rng.normal(size=(1, 3, 4, 6))
    wins = win_shares(*scores)
    first, second = rng.dirichlet(np.ones(2), size=(5, 2)), rng.dirichlet(np.ones(3), size=(5, 4))
    grid = rng.dirichlet(np.ones(5))
    at = np.zeros((5, 2, 4, 6))
    for g, k, j, n in np.ndindex(at.shape):
        at[g, k, j, n] = sum(first[g, k, p] * second[g, j, q] * wins[p, q, k, j, n] for p in range(2) for q in range(3))
    along = wins_along(*scores, first, second)
    for mean, written in zip(along, at, strict=True):
        assert (mean.value, mean.variance, mean.df) == pytest.approx(written_out(written))
    mean = mixed_wins(*scores, first, second, grid)
    assert (mean.value, mean.variance, mean.df) == pytest.approx(written_out(np.tensordot(grid, at, 1)))


def test_one_seed_has_no_interval() -> None:
    mean = crossed_means(np.zeros((1, 1, 9)), np.zeros((1, 3, 9)))[0]
    assert mean == CrossedMean(0.0, None, None, 9, None)
    assert mean.interval(bounds=(0.0, 1.0)) == (None, None)
    assert mean.probability_above(0.5) is None and mean.p_value(0.5) is None


def test_equal_values_have_the_exact_interval_over_prompts() -> None:
    mean = crossed_means(np.ones((1, 3, 40)), np.ones((1, 3, 40)))[0]
    low, high = mean.interval(bounds=(0.0, 1.0))
    assert high == 1.0 and low == pytest.approx(stats.binomtest(40, 40).proportion_ci().low)
    assert mean.probability_above(0.5) > 0.999
    assert mean.interval() == (None, None)


@pytest.mark.parametrize("seed_sd", [0.0, 0.1, 0.3])
@pytest.mark.parametrize(("first", "second"), [(3, 3), (5, 5), (3, 5)])
def test_intervals_cover_what_they_promise(first: int, second: int, seed_sd: float) -> None:
    """2,000 comparisons of two policies; the count has a standard deviation of 10."""
    rng = np.random.default_rng([first, second, int(10 * seed_sd)])
    shift, by_prompt, n, inside = 0.3, 0.5, 100, 0
    truth = stats.norm.cdf(shift / np.sqrt(2 * (1 + by_prompt**2 + seed_sd**2)))
    for _ in range(2000):
        scores = [
            seed_sd * rng.normal(size=(k, 1)) + by_prompt * rng.normal(size=n) + rng.normal(size=(k, n))
            for k in (first, second)
        ]
        wins = win_shares(scores[0][None, None] + shift, scores[1][None, None])[0, 0]
        low, high = crossed_means(wins.mean(axis=1)[None], wins.mean(axis=0)[None])[0].interval(bounds=(0.0, 1.0))
        inside += low <= truth <= high
    assert 0.93 <= inside / 2000 <= 0.97


@pytest.mark.parametrize("seed_sd", [0.0, 0.3])
def test_intervals_of_one_arms_score_cover(seed_sd: float) -> None:
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(2000):
        scores = seed_sd * rng.normal(size=(4, 1)) + 0.5 * rng.normal(size=60) + rng.normal(size=(4, 60))
        low, high = crossed_means(scores[None])[0].interval()
        inside += low <= 0.0 <= high
    assert 0.93 <= inside / 2000 <= 0.97
