from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from toolkit.errors import DataError
from toolkit.evals.intervals import bootstrap_statistic
from toolkit.evals.rm_quality import (
    calibration,
    expected_calibration_error,
    fit_temperature,
    reliability_curve,
    rm_quality,
)


def calibrated(
    n: int, scale: float, seed: int = 0
) -> tuple[list[tuple[int, int, int, float, float]], list[list[float]]]:
    """Labels drawn with P = sigmoid(margin), rewards reported ``scale`` times as large."""
    rng = np.random.default_rng(seed)
    margin = rng.normal(scale=1.5, size=n)
    wins = rng.random(n) < 1 / (1 + np.exp(-margin))
    return [(k, 0, 1, float(w), 1.0) for k, w in enumerate(wins)], [[scale * m, 0.0] for m in margin]


def test_hand_worked() -> None:
    # margins ln 3 (q = 3/4) right, -ln 3 (q = 1/4) wrong
    comparisons = [(0, 0, 1, 1.0, 1.0), (1, 0, 1, 1.0, 1.0)]
    result = rm_quality(comparisons, [[math.log(3), 0.0], [0.0, math.log(3)]], n_resamples=50)
    assert result["accuracy"]["value"] == 0.5  # type: ignore[index]
    assert result["nll"] == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert result["brier"] == pytest.approx((1 / 16 + 9 / 16) / 2)
    assert result["ece"] == pytest.approx(0.25)  # both have confidence 3/4, accuracy 1/2
    assert result["margin_mean"]["value"] == pytest.approx(0.0)  # type: ignore[index]
    assert result["temperature"] is None and result["after_temperature"] is None


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_temperature_undoes_the_scale(scale: float) -> None:
    comparisons, rewards = calibrated(8000, scale)
    result = rm_quality(comparisons, rewards, n_resamples=50)
    assert result["temperature"] == pytest.approx(scale, rel=0.08)
    after = result["after_temperature"]
    assert after["nll"] <= result["nll"] + 1e-12 and after["ece"] < 0.02  # type: ignore[index,operator]
    if scale == 4.0:
        assert result["ece"] > 0.1  # type: ignore[operator]


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_one_huge_margin_does_not_move_the_temperature_to_a_bound(size: float) -> None:
    margin = np.array([2.0] * 30 + [-1.0] * 10 + [1e7]) * size
    one = np.ones(41)
    # the huge one is right at any temperature, and the others have the slope 60 q(-2/T) = 10 q(1/T), q = sigmoid
    without = fit_temperature(margin[:-1], one[:-1], one[:-1])
    assert without is not None
    assert fit_temperature(margin, one, one) == pytest.approx(without, rel=1e-9)
    assert 60 * expit(-2.0 * size / without) == pytest.approx(10 * expit(size / without))
    pairs = [(k, 0, 1, 1.0, 1.0) for k in range(41)]
    estimate = calibration(pairs, [[float(m), 0.0] for m in margin], n_resamples=100)["temperature"]
    assert estimate["value"] == pytest.approx(without, rel=1e-9)
    assert estimate["ci_low"] is not None and estimate["ci_low"] < without < estimate["ci_high"]


def test_temperature_exists_only_for_mixed_evidence() -> None:
    one = np.ones(3)
    assert fit_temperature([1.0, 2.0, 3.0], one, one) is None  # all right: T -> 0
    assert fit_temperature([-1.0, -2.0, 3.0], one, one) is None  # balanced: T -> infinity
    assert fit_temperature([0.0, 0.0, 0.0], one, one) is None
    assert fit_temperature([1.0, -1.0, 3.0], one, [1.0, 0.0, 1.0]) is None  # what is wrong has no weight


def test_margins_whose_sum_misses_zero_by_rounding_are_balanced() -> None:
    margin = [0.9, 0.7, -0.9, -0.7, 0.7, -0.8, 0.1]
    assert sum(margin) != 0.0  # 3e-17, whose sign depends on the order of adding
    assert fit_temperature(margin, np.ones(7), np.ones(7)) is None


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1.0, 1e300])
def test_the_temperature_scales_with_the_margins(scale: float) -> None:
    # two right and one wrong: q(1/T) = 2/3
    assert fit_temperature(np.array([1.0, -1.0, 1.0]) * scale, np.ones(3), np.ones(3)) == pytest.approx(
        scale / np.log(2.0), rel=1e-9
    )


def test_a_temperature_is_exact_beside_a_margin_that_is_almost_surely_right() -> None:
    # The slopes of both cancel where q(-z) 1e10 = q(0) 1e-10 with z = 1e10 / T: 1 - q(z) would be 0 in floats.
    assert fit_temperature([1e10, -1e-10], np.ones(2), np.ones(2)) == pytest.approx(1e10 / np.log(2e20), rel=1e-9)


def test_reliability_bins_are_a_partition() -> None:
    comparisons, rewards = calibrated(500, 2.0)
    margin = np.array([r[0] for r in rewards])
    p = np.array([c[3] for c in comparisons])
    bins = reliability_curve(margin, p, np.ones(500))
    assert len(bins) == 10 and bins[0]["low"] == 0.5 and bins[-1]["high"] == 1.0
    assert sum(b["n"] for b in bins) == 500 and sum(b["share"] for b in bins) == pytest.approx(1.0)  # type: ignore[misc]
    for b in bins:
        if b["confidence"] is not None:
            assert b["low"] <= b["confidence"] <= b["high"]  # type: ignore[operator]
    certain = reliability_curve([800.0], [1.0], [1.0])
    assert certain[-1]["n"] == 1 and expected_calibration_error(certain) == pytest.approx(0.0)


def test_a_model_that_measures_length_is_seen() -> None:
    rng = np.random.default_rng(1)
    lengths = [rng.permutation([10.0, 20.0, 30.0, 40.0]) for _ in range(80)]
    comparisons = [(k, 0, 1, float(rng.random() < 0.5), 1.0) for k in range(80)]
    result = rm_quality(comparisons, [0.1 * a for a in lengths], lengths=lengths, n_resamples=50)
    assert result["accuracy_preferred_longer"]["value"] == 1.0  # type: ignore[index]
    assert result["accuracy_preferred_shorter"]["value"] == 0.0  # type: ignore[index]
    assert result["length_spearman"]["value"] == pytest.approx(1.0)  # type: ignore[index]
    counts = [result[name]["n"] for name in ("accuracy_preferred_longer", "accuracy_preferred_shorter")]  # type: ignore[index]
    assert sum(counts) == 80
    assert result["longer_preferred_rate"]["value"] == pytest.approx(counts[0] / 80)  # type: ignore[index]


def test_tied_labels_prefer_neither() -> None:
    comparisons = [(0, 0, 1, 0.5, 1.0), (1, 0, 1, 1.0, 1.0), (2, 1, 0, 1.0, 1.0)]
    result = rm_quality(
        comparisons, [[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]], lengths=[[9, 1], [9, 1], [9, 1]], n_resamples=20
    )
    assert result["margin_mean"]["value"] == pytest.approx(0.0) and result["margin_mean"]["n"] == 2  # type: ignore[index]
    assert result["accuracy"]["value"] == 0.5  # type: ignore[index]


def test_accuracy_by_margin_rises_for_a_calibrated_model() -> None:
    fifths = rm_quality(*calibrated(4000, 1.0), n_resamples=50)["accuracy_by_margin"]
    assert len(fifths) == 5 and fifths[0]["value"] < 0.6 < 0.85 < fifths[-1]["value"]  # type: ignore[arg-type,index]


def test_no_comparisons_are_refused() -> None:
    with pytest.raises(DataError, match="no comparisons"):
        rm_quality([], [[0.0, 1.0]])


def test_calibration_is_that_of_the_quality_with_intervals_over_prompts() -> None:
    comparisons, rewards = calibrated(600, 2.0)
    result, whole = calibration(comparisons, rewards, n_resamples=200), rm_quality(comparisons, rewards, n_resamples=10)
    for name in ("nll", "brier", "ece"):
        assert result[name]["value"] == pytest.approx(whole[name], abs=1e-12)
    assert result["temperature"]["value"] == whole["temperature"]
    for entry in result.values():
        assert entry["n"] == 600 and entry["ci_low"] < entry["ci_high"]
    assert result["temperature"]["ci_low"] < 2.0 < result["temperature"]["ci_high"]


def test_a_temperature_that_does_not_exist_has_no_value() -> None:
    always_right = [(k, 0, 1, 1.0, 1.0) for k in range(20)]
    result = calibration(always_right, [[1.0 + k, 0.0] for k in range(20)], n_resamples=50)
    assert result["temperature"]["value"] is None
    with pytest.raises(DataError):
        calibration([], [[0.0, 1.0]])


def test_prompts_that_are_the_same_are_resampled_together() -> None:
    comparisons, rewards = calibrated(300, 1.0)
    ids = [f"p{k // 3}" for k in range(300)]
    assert calibration(comparisons, rewards, prompt_ids=ids, n_resamples=50)["nll"]["n"] == 100


def test_rows_of_one_prompt_are_resampled_together() -> None:
    """Ten copies of every row say nothing new: with prompt ids the intervals stay as they were."""
    comparisons, rewards = calibrated(60, 1.0)
    once: dict[str, Any] = rm_quality(comparisons, rewards)
    n = len(rewards)
    copies = [(p + n * k, i, j, share, weight) for k in range(10) for p, i, j, share, weight in comparisons]
    prompt_ids = [str(p) for p in range(n)] * 10
    whole: dict[str, Any] = rm_quality(copies, [*rewards] * 10, prompt_ids=prompt_ids)
    apart: dict[str, Any] = rm_quality(copies, [*rewards] * 10)
    for name in ("accuracy", "margin_mean"):
        width, of_whole, of_apart = (r[name]["ci_high"] - r[name]["ci_low"] for r in (once, whole, apart))
        assert of_whole == pytest.approx(width, rel=0.1) and of_apart < width / 2
    assert whole["n_prompts"] == n


def whole_grid(margin: Any, p: Any, centre: float, n_resamples: int) -> Any:
    """The temperature's estimate by all 501 steps of the grid, as the docstring of ``calibration`` says."""
    log_t = np.log(centre) + 0.02 * np.arange(-250, 251)
    columns = [np.logaddexp(0.0, margin / t) - p * margin / t for t in np.exp(log_t)]

    def best(*losses: Any) -> Any:
        found = []
        for loss in np.stack(losses, axis=-1):
            k = int(loss.argmin())
            if not 0 < k < 500:
                found.append(np.nan)
                continue
            below, at, above = loss[k - 1 : k + 2]
            found.append(np.exp(log_t[k] + 0.02 * 0.5 * (below - above) / (below - 2.0 * at + above)))
        return np.array(found)

    return bootstrap_statistic(columns, best, n_resamples=n_resamples)


@pytest.mark.parametrize(("n", "scale"), [(12, 1.0), (40, 3.0), (400, 0.5), (3000, 1.0)])
def test_the_temperatures_interval_is_that_of_the_whole_grid(n: int, scale: float) -> None:
    comparisons, rewards = calibrated(n, scale, seed=1)
    margin, p = np.array([r[0] for r in rewards]), np.array([c[3] for c in comparisons])
    temperature = fit_temperature(margin, p, np.ones(n))
    assert temperature is not None
    found = calibration(comparisons, rewards, n_resamples=200)["temperature"]
    expected = whole_grid(margin, p, temperature, 200)
    assert (expected.ci_low is None) == (n == 12)  # too few: some resamples have no wrong pair
    for bound, of_all in ((found["ci_low"], expected.ci_low), (found["ci_high"], expected.ci_high)):
        assert bound == (None if of_all is None else pytest.approx(of_all, rel=1e-9))


def test_the_grid_takes_little_memory() -> None:
    """All of it would be 501 numbers for each of the 20,000 comparisons, 80 MB, several times."""
    comparisons, rewards = calibrated(20_000, 1.0)
    calibration(comparisons[:50], rewards[:50], n_resamples=2)  # what is imported and kept
    tracemalloc.start()
    calibration(comparisons, rewards, n_resamples=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
