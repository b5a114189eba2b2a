from __future__ import annotations

import math

import numpy as np
import pytest

from toolkit.errors import DataError
from toolkit.evals.overoptimization import best_of_n_kl, fit_overoptimization, overoptimization

KL = np.array([0.5, 1.0, 4.0, 9.0, 16.0])


def test_best_of_n_kl() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    with pytest.raises(DataError):
        best_of_n_kl(0)


def test_bon_curve_is_recovered_with_its_peak() -> None:
    d = np.sqrt(KL)
    fit = fit_overoptimization(KL, d * (1.2 - 0.2 * d), kind="bon")
    assert (fit["a"], fit["b"], fit["r2"]) == pytest.approx((1.2, 0.2, 1.0))
    assert (fit["peak_kl_nats"], fit["peak_reward"]) == pytest.approx((9.0, 1.8))  # d = 3


def test_rl_curve_is_recovered_with_its_peak() -> None:
    d = np.sqrt(KL)
    fit = fit_overoptimization(KL, d * (1.0 - 0.5 * np.log(d)), kind="rl")
    assert (fit["a"], fit["b"], fit["r2"]) == pytest.approx((1.0, 0.5, 1.0))
    assert fit["peak_kl_nats"] == pytest.approx(math.exp(2)) and fit["peak_reward"] == pytest.approx(0.5 * math.e)


def test_no_hump_no_peak() -> None:
    fit = fit_overoptimization(KL, np.sqrt(KL) * (0.3 + 0.1 * np.sqrt(KL)), kind="bon")
    assert fit["b"] == pytest.approx(-0.1) and fit["peak_kl_nats"] is None


@pytest.mark.parametrize("kl", [[1.0, 2.0], [0.0, 0.0, 1.0, 2.0], [3.0, 3.0, 3.0]])
def test_too_few_points_are_null(kl: list[float]) -> None:
    assert fit_overoptimization(kl, [1.0] * len(kl), kind="rl")["a"] is None


def test_rows_pass_through_and_kinds_are_fitted_apart() -> None:
    rows: list[dict[str, object]] = [
        {"kind": "bon", "kl_nats": k, "reward": math.sqrt(k), "policy": "x"} for k in (1.0, 2.0, 3.0)
    ]
    rows += [{"kind": "rl", "kl_nats": 1.0, "reward": None}]
    result = overoptimization(rows)
    assert result["rows"] == rows
    assert result["fits"]["bon"]["a"] == pytest.approx(1.0) and result["fits"]["rl"] is None  # type: ignore[index]


def test_bad_points_are_refused() -> None:
    with pytest.raises(DataError, match="negative"):
        fit_overoptimization([-1.0, 1.0, 2.0], [0, 0, 0], kind="rl")
    with pytest.raises(DataError, match="unknown kind"):
        fit_overoptimization(KL, KL, kind="dpo")
