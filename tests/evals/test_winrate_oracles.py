"""Own statistics against the libraries that define them."""

from __future__ import annotations

import evalica
import krippendorff
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import cochrans_q, mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from toolkit.evals.agreement import cohen_kappa, krippendorff_alpha
from toolkit.evals.logistic import Block, fit_l1_logistic
from toolkit.evals.rm_quality import fit_temperature
from toolkit.evals.winrate import bradley_terry, holm, permutation_test, sign_test, win_rate

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(5))
def test_holm_equals_statsmodels(seed: int) -> None:
    p = np.random.default_rng(seed).beta(0.3, 2, size=9)
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_sign_test_equals_scipy_and_mcnemar(seed: int) -> None:
    p = np.random.default_rng(seed).choice([0, 0.5, 1], size=120, p=[0.25, 0.4, 0.35])
    wins, losses = int((p == 1).sum()), int((p == 0).sum())
    assert sign_test(p) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, abs=1e-12)
    assert sign_test(p) == pytest.approx(mcnemar([[0, wins], [losses, 0]], exact=True).pvalue, abs=1e-12)
    assert permutation_test(p) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, abs=1e-12)


def test_sign_test_has_the_limit_of_cochrans_q() -> None:
    p = np.random.default_rng(0).choice([0.0, 1.0], size=4000, p=[0.49, 0.51])
    large_sample = cochrans_q(np.column_stack([p, 1 - p])).pvalue
    assert sign_test(p) == pytest.approx(large_sample, abs=0.03)


def test_permutation_test_equals_scipy() -> None:
    p = np.random.default_rng(1).choice([0, 0.25, 0.5, 0.75, 1], size=12)
    oracle = stats.permutation_test(
        (p, 1 - p), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert permutation_test(p) == pytest.approx(oracle.pvalue, abs=1e-12)


def test_win_rate_interval_equals_scipy() -> None:
    p = np.random.default_rng(4).choice([0, 0.5, 1], size=194, p=[0.3, 0.2, 0.5])
    row = win_rate(p, policy="a", baseline="b", judge="j", n_resamples=2000, seed=11)

    def half_difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return (a.mean(axis) - b.mean(axis) + 1) / 2

    oracle = stats.bootstrap(
        (p, 1 - p),
        half_difference,
        paired=True,
        n_resamples=2000,
        vectorized=True,
        method="BCa",
        rng=np.random.default_rng(11),
    )
    assert (row.ci_low, row.ci_high) == pytest.approx(tuple(oracle.confidence_interval), abs=1e-6)
    assert row.standard_error == pytest.approx(stats.sem(p), abs=1e-12)


def test_all_wins_equal_clopper_pearson() -> None:
    row = win_rate([1.0] * 23, policy="a", baseline="b", judge="j")
    assert (row.ci_low, row.ci_high) == pytest.approx(proportion_confint(23, 23, method="beta"), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_bradley_terry_equals_evalica(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = np.array(list("abcde"))
    strength = rng.normal(size=5)
    a = rng.integers(0, 5, 800)
    b = (a + rng.integers(1, 5, 800)) % 5
    p = (rng.random(800) < expit(strength[a] - strength[b])).astype(float)
    p[rng.random(800) < 0.15] = 0.5
    fit = bradley_terry(np.arange(800), names[a].tolist(), names[b].tolist(), p, n_resamples=20)
    winner = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    oracle = evalica.bradley_terry(
        names[a].tolist(), names[b].tolist(), [winner[v] for v in p], tolerance=1e-13, limit=100_000
    )
    logs = np.log(oracle.scores.loc[list(fit.policies)].to_numpy())
    assert fit.log_strength == pytest.approx((logs - logs.mean()).tolist(), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_kappa_equals_sklearn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 3, 200)
    b = np.where(rng.random(200) < 0.7, a, rng.integers(0, 3, 200))
    assert cohen_kappa(a, b, n_resamples=10).value == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_equals_krippendorff(level: str) -> None:
    rng = np.random.default_rng(5)
    truth = rng.integers(1, 6, 60)
    ratings = np.clip(truth + rng.integers(-1, 2, (4, 60)), 1, 5).astype(float)
    ratings[rng.random(ratings.shape) < 0.25] = np.nan
    oracle = krippendorff.alpha(ratings, level_of_measurement=level)
    assert krippendorff_alpha(ratings, level=level, n_resamples=10).value == pytest.approx(oracle, abs=1e-9)


@pytest.mark.parametrize("c", [0.03, 0.3, 20.0])
def test_l1_regression_equals_liblinear(c: float) -> None:
    rng = np.random.default_rng(8)
    x = np.column_stack([rng.uniform(-1, 1, 300), rng.normal(size=300), np.ones(300)])
    p, weight = expit(x @ [-1.5, 0.3, -0.7] + rng.normal(size=300)), rng.uniform(0.1, 2, 300)
    # scikit-learn 1.8 says it with l1_ratio, and reads penalty still; before, l1_ratio was elasticnet's alone.
    oracle = LogisticRegression(
        penalty="l1", l1_ratio=1, C=c, solver="liblinear", fit_intercept=False, tol=1e-10, max_iter=10_000
    )
    soft = np.concatenate([p * weight, (1 - p) * weight])
    oracle.fit(np.vstack([x, x]), np.repeat([1, 0], 300), sample_weight=soft)
    block = Block(x[:, 0], np.ascontiguousarray(x[:, 1:].T), weight, p)
    fitted = fit_l1_logistic([block], np.zeros((1, 3)), np.array([c]), 1e-10)[0]
    assert fitted == pytest.approx(oracle.coef_[0], abs=1e-5)


def test_temperature_equals_an_unpenalised_logistic_regression() -> None:
    rng = np.random.default_rng(9)
    margin = rng.normal(size=500)
    wins = (rng.random(500) < expit(margin / 1.7)).astype(float)
    oracle = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(margin[:, None], wins)
    assert fit_temperature(margin, wins, np.ones(500)) == pytest.approx(1 / oracle.coef_[0, 0], abs=1e-6)
