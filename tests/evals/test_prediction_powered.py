"""Prediction-powered win rates: against a plain reference, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from toolkit.errors import DataError
from toolkit.evals.prediction_powered import PredictionPowered, prediction_powered

NAN = float("nan")


def world(rng: np.random.Generator, n: int, total: int, skill: float, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """People's votes on n of ``total`` prompts, and a judge that agrees in a share ``skill`` and else likes the policy.

    Of the prompts the policy wins 60% with people, 10% are ties; where the judge does not agree it says "win" with a
    probability of ``bias``.
    """
    people = rng.choice([1.0, 0.5, 0.0], p=[0.55, 0.1, 0.35], size=total)
    agrees = rng.random(total) < skill
    judge = np.where(agrees, people, (rng.random(total) < bias).astype(float))
    human = people.copy()
    human[n:] = NAN
    return human, judge


TRUTH = 0.55 + 0.05


def test_the_estimate_equals_a_plain_reference() -> None:
    """Equations of PPI and of PPI++ (section 6), term by term in plain Python."""
    human, judge = world(np.random.default_rng(5), 40, 200, 0.7, 0.9)
    y, f, rest = human[:40].tolist(), judge[:40].tolist(), judge[40:].tolist()
    n, m = len(y), len(rest)
    # one prompt more, a quarter at each corner, in the spread of what people answered
    weights = [1.0] * n + [0.25] * 4
    all_y, all_f = [*y, 0.0, 0.0, 1.0, 1.0], [*f, 0.0, 1.0, 0.0, 1.0]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def covariance(a: list[float], b: list[float]) -> float:
        mean_a, mean_b = (sum(w * x for w, x in zip(weights, v, strict=True)) / (n + 1) for v in (a, b))
        return sum(w * (x - mean_a) * (z - mean_b) for w, x, z in zip(weights, a, b, strict=True)) / n

    weight = covariance(all_y, all_f) / covariance(all_f, all_f) / (1 + n / m)
    corrected = weight * mean(rest) + mean([a - weight * b for a, b in zip(y, f, strict=True)])
    residual = [a - weight * b for a, b in zip(all_y, all_f, strict=True)]
    spread_rest = sum((b - mean(rest)) ** 2 for b in rest) / (m - 1)
    error = (covariance(residual, residual) / (n - 1) + weight**2 * spread_rest / m) ** 0.5
    result = prediction_powered(human, judge)
    assert result.judge_weight == pytest.approx(weight) and result.win_rate == pytest.approx(corrected)
    assert result.standard_error == pytest.approx(error)
    half = error * student.ppf(0.975, n - 1)
    assert (result.ci_low, result.ci_high) == pytest.approx((corrected - half, corrected + half))
    assert result.human_win_rate == pytest.approx(mean(y)) and result.judge_win_rate == pytest.approx(mean(f + rest))
    assert result.bias == pytest.approx(mean(f) - mean(y))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_weight_makes_the_variance_smallest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    human, judge = world(rng, 60, 300, rng.uniform(0, 1), rng.uniform(0, 1))
    result = prediction_powered(human, judge)
    # the variance that lambda minimises takes var(f) from the answered prompts, as its solution does
    y, f = np.append(human[:60], [0, 0, 1, 1]), np.append(judge[:60], [0, 1, 0, 1])
    each = [1.0] * 60 + [0.25] * 4
    grid = np.linspace(0, 1, 2001)
    (residuals, of_judge) = (np.cov(values, aweights=each, ddof=0) for values in (y - grid[:, None] * f, f))
    variances = np.diag(residuals) / 60 + grid**2 * of_judge / 240
    assert result.judge_weight == pytest.approx(grid[int(np.argmin(variances))], abs=6e-4)


def test_a_perfect_judge_is_as_good_as_all_votes_and_a_useless_one_costs_nothing() -> None:
    rng = np.random.default_rng(0)
    human, judge = world(rng, 50, 5000, 1.0, 0.5)
    perfect = prediction_powered(human, judge)
    assert perfect.win_rate == pytest.approx(judge.mean(), abs=0.01) and perfect.width_ratio < 0.25
    human, _ = world(rng, 50, 5000, 1.0, 0.5)
    useless = prediction_powered(human, np.full(5000, 0.5))
    assert useless.judge_weight == 0 and useless.width_ratio == 1 and useless.correlation is None
    assert useless.win_rate == useless.human_win_rate == pytest.approx(np.nanmean(human))
    wrong = prediction_powered(human, np.where(np.isnan(human), 0.5, 1 - human))
    assert wrong.judge_weight == 0  # a judge that says the opposite is not used


def test_what_is_missing() -> None:
    human, judge = world(np.random.default_rng(1), 50, 50, 0.8, 0.8)
    everyone = prediction_powered(human, judge)  # nothing is left for the judge to say
    assert everyone.judge_weight == 0 and everyone.n_judge_only == 0
    same = prediction_powered([1.0] * 20 + [NAN] * 80, [1.0] * 100)
    assert same.ci_low == pytest.approx(0.025 ** (1 / 20)) and same.ci_high == 1.0
    with pytest.raises(DataError, match="it takes 10"):
        prediction_powered([1.0] * 9 + [NAN] * 20, [0.5] * 29)
    with pytest.raises(DataError, match="outside"):
        prediction_powered([1.5] * 20, [0.5] * 20)
    lost = [NAN if k % 3 == 0 else 1.0 for k in range(40)]
    assert prediction_powered([0.0, 1.0] * 20, lost).n_human == 26  # a failed judgement is no answer


def simulated(n: int, skill: float, bias: float, runs: int, seed: int, total: int = 800) -> list[PredictionPowered]:
    rng = np.random.default_rng(seed)
    return [prediction_powered(*world(rng, n, total, skill, bias)) for _ in range(runs)]


def check_coverage(n: int, skill: float, bias: float, runs: int, seed: int) -> None:
    results = simulated(n, skill, bias, runs, seed)
    coverage = np.mean([r.ci_low <= TRUTH <= r.ci_high for r in results])
    assert 0.93 <= coverage <= 0.97, coverage
    narrower = float(np.mean([r.width_ratio for r in results]))
    assert narrower < (0.9 if skill >= 0.6 else 1.02), narrower
    judge_alone = np.mean([r.judge_win_rate for r in results])
    assert abs(judge_alone - TRUTH) > 0.02 or skill == 1.0  # it is biased, or the simulation shows nothing


@pytest.mark.parametrize(("n", "skill"), [(50, 0.6), (100, 0.8), (200, 0.3)])
def test_intervals_cover_with_a_biased_judge(n: int, skill: float) -> None:
    check_coverage(n, skill, 0.9, 500, seed=n)


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 75, 100, 200])
@pytest.mark.parametrize("skill", [0.0, 0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("bias", [0.1, 0.9])
def test_intervals_cover_for_any_judge(n: int, skill: float, bias: float) -> None:
    check_coverage(n, skill, bias, 2000, seed=7 * n + round(100 * skill) + round(10 * bias))


def test_the_check_of_coverage_sees_a_wrong_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the judge's mean in place of the corrected one the simulation fails."""
    results = simulated(100, 0.6, 0.9, 200, 3)
    naive = np.mean([abs(r.judge_win_rate - TRUTH) < 1.96 * (0.24 / 800) ** 0.5 for r in results])
    assert naive < 0.5
