"""A mean over prompts from many answers of a judge and few of people: prediction-powered inference.

People's answers are unbiased and few, a judge's are many and biased. The judge's mean over the prompts without human
answers is corrected by how far it was off on the prompts with both (Angelopoulos et al. 2023, arXiv 2301.09633). The
weight of the judge is tuned so that the interval is shortest (PPI++, Angelopoulos et al. 2023, arXiv 2311.01453,
section 6): a useless judge gets the weight 0, and people's mean remains.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats, interval_without_spread, rounded_alike

_PSEUDO = 1.0  # prompts that are added, a quarter at each corner of judge and people
_FIRST, _SECOND = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
MIN_HUMAN = 10  # prompts: with fewer the spread of the correction is not known


@dataclass(frozen=True)
class PredictionPowered:
    """The corrected mean, people's mean alone and the judge's alone, each over prompts.

    ``judge_weight`` is lambda, from 0 (the judge says nothing about people) to 1. ``correlation`` is that of judge and
    people over the ``n_human`` prompts with both, None without spread. ``n_judge_only`` prompts have the judge's answer
    alone. ``bias`` is how much more the judge prefers the policy than people do. ``width_ratio`` is the width of the
    interval as a share of the width that people alone give.
    """

    win_rate: float
    standard_error: float
    ci_low: float
    ci_high: float
    human_win_rate: float
    human_ci_low: float
    human_ci_high: float
    judge_win_rate: float
    bias: float
    judge_weight: float
    correlation: float | None
    width_ratio: float
    n_human: int
    n_judge_only: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def prediction_powered(human: ArrayLike, judge: ArrayLike, *, confidence: float = 0.95) -> PredictionPowered:
    """The mean of ``human`` (n,) over prompts, where most are NaN, with the help of ``judge`` (n,) on the same prompts.

    With Y and f on the n prompts that people answered, and f' on the N that they did not, the estimate is
    ``lambda mean(f') + mean(Y - lambda f)``, with the variance ``lambda^2 var(f')/N + var(Y - lambda f)/n`` and the
    lambda that makes it smallest, ``cov(Y, f) / (var(f) (1 + n/N))``, kept within 0 and 1. Variances over the n prompts
    count one prompt more, a quarter of it at each corner of [0, 1] x [0, 1]. The prompts that people answered have to
    be drawn at random. The interval takes Student's t with n - 1 degrees of freedom, and lies within [0, 1]. Prompts
    without the judge's answer are left out.

    Raises:
        DataError: answers outside [0, 1], or fewer than ``MIN_HUMAN`` prompts with both.

    >>> result = prediction_powered([1, 0] * 10 + [np.nan] * 180, [1, 0] * 100)
    >>> round(result.win_rate, 3), result.judge_weight, round(result.width_ratio, 3)
    (0.5, 0.857..., 0.431)
    """
    human_N, judge_N = np.asarray(human, dtype=np.float64), np.asarray(judge, dtype=np.float64)
    if human_N.shape != judge_N.shape or human_N.ndim != 1:
        raise DataError("people and judge need one answer for each prompt", where=f"{human_N.shape}, {judge_N.shape}")
    for values in (human_N, judge_N):
        if np.any((values < 0.0) | (values > 1.0)):
            raise DataError("an answer is outside [0, 1]", where="prediction-powered inference")
    answered = ~np.isnan(judge_N)
    both = answered & ~np.isnan(human_N)
    y, f, rest = human_N[both], judge_N[both], judge_N[answered & ~both]
    n = len(y)
    if n < MIN_HUMAN:
        raise DataError(
            f"{n} prompts have an answer of people and of the judge: it takes {MIN_HUMAN}",
            where="human votes",
            fix="collect more votes, on prompts drawn at random from those that were judged",
        )
    weight = _judge_weight(y, f, len(rest))
    mean, error = _estimate(y, f, rest, weight)
    human_mean, human_error = _estimate(y, f, rest, 0.0)
    quantile = float(stdtrit(n - 1, 0.5 + confidence / 2.0))
    low, high = _bounds(mean, error * quantile)
    human_low, human_high = _bounds(human_mean, human_error * quantile)
    if rounded_alike(y):  # people agree on every prompt: the exact bound of a share, and no help by the judge
        mean, error = human_mean, 0.0
        low, high = human_low, human_high = interval_without_spread(human_mean, n, (0.0, 1.0), confidence)
    spread = not rounded_alike(y) and not rounded_alike(f)
    return PredictionPowered(
        win_rate=mean,
        standard_error=error,
        ci_low=low,
        ci_high=high,
        human_win_rate=human_mean,
        human_ci_low=human_low,
        human_ci_high=human_high,
        judge_win_rate=float(judge_N[answered].mean()),
        bias=float((f - y).mean()),
        judge_weight=weight,
        correlation=float(np.corrcoef(y, f)[0, 1]) if spread else None,
        width_ratio=(high - low) / (human_high - human_low),
        n_human=n,
        n_judge_only=len(rest),
    )


def _judge_weight(y: Floats, f: Floats, n_rest: int) -> float:
    """The lambda of the shortest interval; 0 where the judge has no answer of its own or none that varies."""
    if n_rest < 2 or rounded_alike(f):
        return 0.0
    variance, covariance = _spread(f, f, _FIRST, _FIRST), _spread(y, f, _SECOND, _FIRST)
    return float(np.clip(covariance / (variance * (1.0 + len(y) / n_rest)), 0.0, 1.0))


def _estimate(y: Floats, f: Floats, rest: Floats, weight: float) -> tuple[float, float]:
    """The estimate of this lambda, and its standard error. A lambda that was tuned costs a degree of freedom."""
    residual, corners = y - weight * f, _SECOND - weight * _FIRST
    n = len(y)
    variance = _spread(residual, residual, corners, corners) / n
    mean = float(residual.mean())
    if weight > 0.0:
        variance *= n / (n - 1)
        variance += weight**2 * float(rest.var(ddof=1)) / len(rest)
        mean += weight * float(rest.mean())
    return mean, variance**0.5


def _spread(a: Floats, b: Floats, corners_a: Floats, corners_b: Floats) -> float:
    """The covariance of a and b with one prompt more, of which a quarter lies at each corner.

    Where judge and people rarely differ, a few prompts hold all that is known of how far off the judge is, and the
    spread of n prompts alone is often too small. Agresti and Coull (1998) add prompts to a share for the same reason.
    """
    share = _PSEUDO / len(corners_a)
    weights = np.concatenate([np.ones(len(a)), np.full(len(corners_a), share)])
    all_a, all_b = np.concatenate([a, corners_a]), np.concatenate([b, corners_b])
    mean_a, mean_b = np.average(all_a, weights=weights), np.average(all_b, weights=weights)
    return float(np.sum(weights * (all_a - mean_a) * (all_b - mean_b)) / (weights.sum() - 1.0))


def _bounds(mean: float, half: float) -> tuple[float, float]:
    return max(0.0, mean - half), min(1.0, mean + half)
