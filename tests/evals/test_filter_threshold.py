"""A filter's threshold: hand-worked numbers, and simulated calibrations whose true rate is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, binomtest, norm
from sklearn.metrics import average_precision_score

from toolkit.errors import DataError
from toolkit.evals.filter_threshold import FilterThreshold, binomial_rate, effective_size, filter_threshold


def calibrated(bad: np.ndarray, fpr: float = 0.05, good: np.ndarray | None = None) -> FilterThreshold:
    """From scores of bad responses, (prompts,) or (prompts, responses to each)."""
    good = np.array([99.0]) if good is None else good
    bad = bad if bad.ndim == 2 else bad[:, None]
    prompts = [f"bad {p}" for p in range(len(bad)) for _ in range(bad.shape[1])] + [
        f"good {p}" for p in range(len(good))
    ]
    labels = np.r_[np.zeros(bad.size, bool), np.ones(len(good), bool)]
    return filter_threshold(np.r_[bad.ravel(), good], labels, prompts, fpr)


def test_the_hand_worked_threshold() -> None:
    """Of 39 bad scores 1..39, k = 0.05 * 40 = 2: the second highest, 38, is the threshold."""
    result = calibrated(np.arange(1.0, 40.0), good=np.array([10.0, 38.0, 38.5, 50.0]))
    assert result.threshold == 38.0
    assert (result.fpr.value, result.fpr.n) == (2 / 40, 39)
    expected = beta.ppf([0.025, 0.975], 2, 38)
    assert (result.fpr.ci_low, result.fpr.ci_high) == pytest.approx(tuple(expected))
    exact = binomtest(2, 4).proportion_ci(method="exact")
    assert result.recall.value == 0.5  # 38.5 and 50
    assert (result.recall.ci_low, result.recall.ci_high) == pytest.approx((exact.low, exact.high))
    assert result.precision.value == 2 / 3  # they, and the bad one with 39


def test_a_group_of_ties_does_not_pass_by_halves() -> None:
    """The second highest of 39 is in a group of ten: all ten are dropped, and one bad response passes."""
    result = calibrated(np.r_[np.arange(28.0), np.full(10, 40.0), 41.0])
    assert result.threshold == 40.0 and result.fpr.value == 1 / 39
    exact = binomtest(1, 39).proportion_ci(method="exact")
    assert (result.fpr.ci_low, result.fpr.ci_high) == pytest.approx((exact.low, exact.high))
    none_passes = calibrated(np.full(39, 1.0), good=np.array([1.0, 1.0]))
    assert (none_passes.fpr.value, none_passes.fpr.ci_low, none_passes.recall.value) == (0.0, 0.0, 0.0)
    assert none_passes.precision.value is None


def test_the_curve() -> None:
    rng = np.random.default_rng(0)
    good, scores = rng.random(500) < 0.4, rng.normal(size=500).round(1)
    scores += good
    result = filter_threshold(scores, good, [str(i) for i in range(500)], 0.1)
    assert result.average_precision == pytest.approx(average_precision_score(good, scores))
    [point] = [point for point in result.curve if point.threshold == result.threshold]
    assert (point.precision, point.recall, point.fpr) == (
        result.precision.value,
        result.recall.value,
        pytest.approx(result.fpr.value),
    )
    assert np.all(np.diff([point.recall for point in result.curve]) >= 0)


@pytest.mark.parametrize(
    ("bad", "good", "fpr", "message"),
    [
        (np.arange(18.0), np.ones(5), 0.05, "18 bad responses are too few .* at least 19"),
        (np.zeros(0), np.ones(5), 0.05, "no response .* is bad"),
        (np.arange(50.0), np.zeros(0), 0.05, "no response .* is good"),
        (np.r_[np.arange(50.0), np.nan], np.ones(2), 0.05, "finite"),
        (np.arange(50.0)[None], np.ones(2), 0.05, "one prompt"),
        (np.arange(50.0), np.ones(2), 0.0, "rate of 0"),
        (np.arange(50.0), np.ones(2), 5.0, "rate of 5"),
    ],
)
def test_what_gives_no_threshold_is_refused(bad: np.ndarray, good: np.ndarray, fpr: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibrated(bad, fpr, good)


def test_the_effective_size() -> None:
    each = np.arange(40)
    assert effective_size(each < 3, each) == 40.0
    alike = np.repeat(np.arange(50), 4)  # all responses of a prompt pass, or none: 50 that count
    assert 40 < effective_size(alike < 10, alike) <= 50
    assert 40 < effective_size(np.zeros(200), alike) <= 50
    assert binomial_rate(alike < 10, alike).ci_high > binomial_rate(alike < 10, np.arange(200)).ci_high


# ---------------------------------------------------------------- simulated calibrations

Simulation = tuple[int, int, float, float | None]  # prompts, responses to each, their correlation, levels per unit


def covered(design: Simulation, repeats: int, fpr: float = 0.05) -> tuple[float, float]:
    """(share of calibrations whose interval has the true rate, mean true rate)."""
    n_prompts, k, correlation, levels = design
    rng = np.random.default_rng(1)
    inside, rates = 0, []
    for _ in range(repeats):
        z = np.sqrt(correlation) * rng.normal(size=(n_prompts, 1))
        z = z + np.sqrt(1 - correlation) * rng.normal(size=(n_prompts, k))
        result = calibrated(z if levels is None else np.floor(z * levels), fpr)
        rate = norm.sf(result.threshold if levels is None else (result.threshold + 1) / levels)
        inside += result.fpr.ci_low <= rate <= result.fpr.ci_high
        rates.append(rate)
    return inside / repeats, float(np.mean(rates))


def test_the_true_rate_lies_in_the_interval_in_95_percent_of_200_calibrations() -> None:
    share, mean = covered((200, 1, 0.0, None), 200)
    assert 0.93 <= share <= 0.97 and mean == pytest.approx(0.05, abs=0.003)


@pytest.mark.slow
@pytest.mark.parametrize("n", [19, 60, 200, 1000])
def test_the_coverage_of_continuous_scores(n: int) -> None:
    share, mean = covered((n, 1, 0.0, None), 2000)
    assert 0.94 <= share <= 0.96 and mean <= 0.052


@pytest.mark.slow
@pytest.mark.parametrize("levels", [0.5, 1, 2, 3, 5, 10, 30])
@pytest.mark.parametrize("n", [60, 200])
def test_the_coverage_of_scores_with_ties(n: int, levels: float) -> None:
    """Of a discrete score an interval covers at least as often, and the rate stays below the target."""
    share, mean = covered((n, 1, 0.0, levels), 1000)
    assert share >= 0.935 and mean <= 0.051


@pytest.mark.slow
@pytest.mark.parametrize("design", [(200, 4, 0.5, None), (200, 4, 0.0, None), (60, 4, 0.5, None), (60, 8, 0.8, None)])
def test_the_coverage_of_several_responses_to_a_prompt(design: Simulation) -> None:
    """The threshold is somewhat too low, and the interval too narrow, where few prompts have much alike responses."""
    share, _ = covered(design, 1000)
    assert 0.915 <= share <= 0.975


@pytest.mark.slow
def test_without_the_design_effect_the_interval_would_be_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "toolkit.evals.filter_threshold.effective_size", lambda passed, groups, confidence: float(len(groups))
    )
    assert covered((60, 8, 0.8, None), 500)[0] < 0.75
