from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from toolkit.errors import DataError
from toolkit.evals import style
from toolkit.evals.intervals import resample_indices
from toolkit.evals.logistic import fit_l2_logistic
from toolkit.evals.style import FEATURES, Style, style_controlled_win_rate, style_of

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def simulated(n: int, seed: int, effects: tuple[float, ...] = (2.0, 1.5, 0.0, 0.5), policy: float = 0.0) -> Arrays:
    """Preferences of a judge who likes style, and the counts of both responses; the policy writes more."""
    rng = np.random.default_rng(seed)
    a = np.column_stack([rng.integers(200, 1500, n), rng.poisson(4, n), rng.poisson(0.5, n), rng.poisson(2, n)])
    b = np.column_stack([rng.integers(100, 900, n), rng.poisson(2, n), rng.poisson(0.5, n), rng.poisson(2, n)])
    x = differences(a, b)
    return (rng.random(n) < expit(x @ effects + policy)).astype(float), a.astype(float), b.astype(float)


def differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One at a time, as it is defined."""
    out = np.zeros(a.shape)
    for row in range(a.shape[0]):
        for k in range(a.shape[1]):
            p, q = float(a[row, k]), float(b[row, k])
            out[row, k] = (p - q) / (p + q) if p + q else 0.0
    return out


def ridge(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """sklearn's ridge, the constant times 10: its coefficient is a tenth then, and its penalty a hundredth."""
    scale = np.array([1.0] * (x.shape[1] - 1) + [10.0])
    oracle = LogisticRegression(C=10.0, fit_intercept=False, tol=1e-12, max_iter=10_000)
    twice, labels, weights = np.vstack([x, x]) * scale, np.repeat([1, 0], len(x)), np.concatenate([p, 1 - p])
    return oracle.fit(twice, labels, sample_weight=weights).coef_[0] * scale


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 0, 0)),
        ("plain * text - with # marks ** and a__b__c inside", (0, 0, 0)),
        ("- a\n* b\n+ c\n1. d\n  2) e", (5, 0, 0)),
        ("# A\n### B\n#hashtag\n####### seven", (0, 2, 0)),
        ("**a** and __b__, **c\nd**", (0, 0, 2)),
        ("```\n# no\n- no\n**no**\n```\n- yes", (1, 0, 0)),
        ("```\n- never closed", (0, 0, 0)),
    ],
)
def test_marks_are_counted(text: str, expected: tuple[int, ...]) -> None:
    result = style_of(text)
    assert (result.lists, result.headers, result.bold) == expected and result.length == len(text)


def test_fit_and_interval_equal_plain_refits() -> None:
    p, a, b = simulated(90, 3)
    p[::7] = 0.5
    x = np.column_stack([differences(a, b), np.ones(len(p))])
    result = style_controlled_win_rate(p, a, b, n_resamples=60, seed=5)
    expected = ridge(x, p)
    assert result.win_rate == pytest.approx(expit(expected[-1]), abs=1e-6)
    assert result.effects == pytest.approx(dict(zip(FEATURES, expected[:-1], strict=True)), abs=1e-5)
    draws = [expit(ridge(x[rows], p[rows])[-1]) for chunk in resample_indices(len(p), 60, 5) for rows in chunk]
    assert (result.ci_low, result.ci_high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=1e-6)


@pytest.mark.parametrize("kinds", [900, 60])  # rows that are all different, and rows that repeat others
def test_refits_of_many_prompts_equal_those_from_zero(monkeypatch: pytest.MonkeyPatch, kinds: int) -> None:
    p, a, b = (values[np.arange(900) % kinds] for values in simulated(900, 4))
    p[::7] = 0.5
    expected = style_controlled_win_rate(p, a, b, n_resamples=300, seed=2)
    monkeypatch.setattr(style, "MANY_ROWS", 900)
    result = style_controlled_win_rate(p, a, b, n_resamples=300, seed=2)
    assert (result.win_rate, result.effects) == (expected.win_rate, expected.effects)
    assert (result.ci_low, result.ci_high) == pytest.approx((expected.ci_low, expected.ci_high), abs=1e-7)
    assert result.ci_low != expected.ci_low  # it did take another way


def test_a_judge_who_likes_style_alone_is_seen_through() -> None:
    p, a, b = simulated(3000, 1)
    assert p.mean() > 0.65
    result = style_controlled_win_rate(p, a, b, n_resamples=200)
    assert result.ci_low < 0.5 < result.ci_high and result.ci_high - result.ci_low < 0.12  # type: ignore[operator]
    assert result.effects is not None and result.effects["length"] == pytest.approx(2.0, abs=0.5)
    assert result.effects["headers"] == pytest.approx(0.0, abs=0.2)


def test_the_interval_covers_the_truth() -> None:
    truth, inside = expit(0.6), 0
    for seed in range(100):
        result = style_controlled_win_rate(*simulated(200, seed, policy=0.6), n_resamples=200, seed=seed)
        inside += result.ci_low <= truth <= result.ci_high  # type: ignore[operator]
    assert 88 <= inside <= 99


def test_what_cannot_be_fitted() -> None:
    p, a, b = simulated(60, 2)
    few = style_controlled_win_rate(p[:24], a[:24], b[:24])
    assert (few.win_rate, few.effects, few.n) == (None, None, 24)
    p[:10], a[10:15] = np.nan, np.nan
    assert style_controlled_win_rate(p, a, b, n_resamples=20).n == 45
    alike = style_controlled_win_rate([1.0] * 30 + [0.0] * 20, np.ones((50, 4)), np.ones((50, 4)), n_resamples=20)
    assert alike.win_rate == pytest.approx(0.6, abs=0.01) and set((alike.effects or {}).values()) == {0.0}
    won = style_controlled_win_rate(np.ones(50), np.ones((50, 4)), np.zeros((50, 4)), n_resamples=50)
    assert won.win_rate is None and "cannot tell the effect of length" in (won.reason or "")
    same = style_controlled_win_rate(np.ones(50), np.ones((50, 4)), np.ones((50, 4)), n_resamples=50)
    assert same.win_rate == 1.0 and same.ci_low is not None and 0.9 < same.ci_low < 1.0
    with pytest.raises(DataError, match="four counts"):
        style_controlled_win_rate(p, a[:, :3], b)


def test_separable_data_converge() -> None:
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.choice([-1.0, 1.0], 40), np.ones(40)])
    target = (x[:, 0] > 0).astype(float)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=200).astype(float)
    result = fit_l2_logistic(x, target, weights, np.array([0.1, 1e-3]), 1e-9)
    p = expit(result @ x.T)
    gradient = (weights * (p - target)) @ x + result * [0.1, 1e-3]
    assert np.abs(gradient).max() < 1e-6


def test_style_names_its_features() -> None:
    assert tuple(Style.__dataclass_fields__) == FEATURES
