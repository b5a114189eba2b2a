from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from toolkit.errors import DataError
from toolkit.evals.intervals import (
    bootstrap_mean,
    bootstrap_share,
    bootstrap_statistic,
    ratio,
    resample_counts,
    resample_indices,
    sums_by_prompt,
)


@pytest.mark.parametrize("n", [7, 60, 805])
def test_mean_equals_scipy_bca(n: int) -> None:
    values = np.random.default_rng(n).beta(0.4, 0.8, size=n)
    estimate = bootstrap_mean(values, n_resamples=999, seed=5)
    expected = stats.bootstrap((values,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(5))
    assert estimate.ci_low == pytest.approx(expected.confidence_interval.low, abs=1e-12)
    assert estimate.ci_high == pytest.approx(expected.confidence_interval.high, abs=1e-12)
    assert estimate.standard_error == pytest.approx(stats.sem(values), abs=1e-14)


def test_mean_with_ties_equals_scipy_bca() -> None:
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=90, p=[0.2, 0.3, 0.5])
    estimate = bootstrap_mean(values, confidence=0.9, n_resamples=500, seed=1)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=500, confidence_level=0.9, method="BCa", rng=np.random.default_rng(1)
    )
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)


def test_ratio_equals_scipy_bca() -> None:
    rng = np.random.default_rng(2)
    numerator, denominator = rng.random(40), rng.integers(1, 6, 40).astype(float)
    estimate = bootstrap_statistic([numerator, denominator], ratio, n_resamples=800, seed=3)
    expected = stats.bootstrap(
        (numerator, denominator),
        lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=800,
        rng=np.random.default_rng(3),
    )
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx(tuple(expected.confidence_interval), abs=1e-9)
    assert estimate.standard_error == pytest.approx(expected.standard_error, abs=1e-12)


def test_draws_of_kinds_are_the_sums_of_the_draws_of_their_prompts() -> None:
    kind = np.array([2, 0, 1, 0, 2, 2, 1])
    of_prompts, of_kinds = (np.concatenate(list(resample_counts(7, 30, 1, k))) for k in (None, kind))
    assert np.array_equal(of_kinds, np.stack([of_prompts[:, kind == k].sum(axis=1) for k in range(3)], axis=1))


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resample_indices(13, 50, 4)))
    monkeypatch.setattr("toolkit.evals.intervals._CHUNK_ELEMENTS", 40)
    pieces = list(resample_indices(13, 50, 4))
    assert len(pieces) > 10
    assert np.array_equal(np.concatenate(pieces), whole)


def test_no_prompts_and_one_prompt() -> None:
    nothing = bootstrap_mean([])
    assert (nothing.value, nothing.standard_error, nothing.ci_low, nothing.ci_high, nothing.n) == (*[None] * 4, 0)
    one = bootstrap_mean([0.3])
    assert (one.value, one.standard_error, one.ci_low, one.ci_high, one.n) == (0.3, None, None, None, 1)
    assert bootstrap_statistic([[], []], ratio).value is None
    single = bootstrap_statistic([[1.0], [2.0]], ratio)
    assert (single.value, single.ci_low) == (0.5, None)


def test_all_equal_values_have_no_bootstrap_interval_but_a_binomial_one_if_bounded() -> None:
    assert bootstrap_mean([0.7] * 9).ci_low is None
    bounded = bootstrap_mean([1.0] * 10, bounds=(0.0, 1.0))
    exact = stats.binomtest(10, 10).proportion_ci(0.95, method="exact")
    assert (bounded.ci_low, bounded.ci_high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    ties = bootstrap_mean([0.5] * 10, bounds=(0.0, 1.0))
    assert ties.ci_low is not None and ties.ci_high is not None
    assert ties.ci_low == pytest.approx(exact.low / 2) and ties.ci_low + ties.ci_high == pytest.approx(1.0)


def test_undefined_ratio_is_null_and_mostly_undefined_resamples_give_no_interval() -> None:
    assert bootstrap_statistic([[0.0, 0.0], [0.0, 0.0]], ratio).value is None
    rare = bootstrap_statistic([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]], ratio)
    assert rare.value == 0.5 and rare.ci_low is None and rare.n == 3


def test_clustering_by_prompt_widens_the_interval() -> None:
    rng = np.random.default_rng(6)
    prompt = np.repeat(np.arange(50), 10)
    hits = np.repeat(rng.integers(0, 2, 50), 10).astype(float)  # the ten pairs of a prompt say one and the same
    clustered = bootstrap_statistic(sums_by_prompt(prompt, hits, np.ones(500)), ratio)
    naive = bootstrap_mean(hits)
    assert clustered.value == pytest.approx(naive.value) and clustered.n == 50
    assert clustered.ci_high - clustered.ci_low > 2.5 * (naive.ci_high - naive.ci_low)  # type: ignore[operator]


def test_sums_by_prompt() -> None:
    a, b = sums_by_prompt(["y", "x", "y"], [1.0, 2.0, 3.0], [1, 1, 1])
    assert a.tolist() == [2.0, 4.0] and b.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("values", [[np.nan, 1.0], [[1.0, 2.0]], [np.inf]])
def test_values_that_are_no_means_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError):
        bootstrap_mean(values)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(DataError, match="n_resamples"):
        bootstrap_mean([1.0, 2.0], n_resamples=0)
    with pytest.raises(DataError, match="confidence"):
        bootstrap_mean([1.0, 2.0], confidence=95)
    with pytest.raises(DataError, match="finite"):
        bootstrap_statistic([[1.0, np.nan], [1.0, 1.0]], ratio)
    with pytest.raises(DataError, match="one number per prompt"):
        bootstrap_statistic([[1.0, 2.0], [1.0]], ratio)


def test_values_that_are_equal_but_for_rounding_are_equal() -> None:
    values = [0.4 - 0.3, 0.5 - 0.4, 0.6 - 0.5, 0.9 - 0.8]
    assert len(set(values)) > 1
    estimate = bootstrap_mean(values)
    assert (estimate.ci_low, estimate.ci_high) == (None, None)
    bounded = bootstrap_mean(values, bounds=(0.0, 1.0))
    assert bounded.ci_low is not None and bounded.ci_high is not None
    assert (bounded.ci_low, bounded.ci_high) == pytest.approx((0.1 * 0.025**0.25, 1.0 - 0.9 * 0.025**0.25))


def test_a_share_with_a_prompt_that_weighs_nothing_has_no_interval_of_equal_shares() -> None:
    estimate = bootstrap_share(["a", "b", "c"], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    assert (estimate.value, estimate.ci_low, estimate.ci_high) == (0.5, None, None)
