"""The threshold of a filter for a target false-positive rate, and the rates that it will have on new data.

A filter keeps a response whose score is above a threshold. Its false-positive rate is the probability that it keeps a
bad one. The threshold is the k-th highest score of n bad responses. For scores without ties the rate that it will have
is then distributed as Beta(k, n + 1 - k), whatever the distribution of the scores (order statistics; Vovk 2012,
"Conditional validity of inductive conformal predictors", 1209.2673): its mean is k / (n + 1), and the interval here is
its central part, which covers exactly. With ties the whole group of the k-th score is dropped. The rate then lies
between those of the neighbouring order statistics, and the interval is that of Clopper and Pearson.

Responses to one prompt are not independent. Where some share a prompt, n is replaced by the effective number of
responses, as in Korn and Graubard 1998 ("Confidence intervals for proportions with small expected number of positive
counts estimated from survey data"): n over the design effect, which is at least 1, and fewer for few prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats

Groups = NDArray[np.int64]
CURVE_POINTS = 101


@dataclass(frozen=True)
class Rate:
    """A rate as a fraction of one. ``n`` responses in ``n_groups`` independent groups. None for no responses."""

    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    n_groups: int


@dataclass(frozen=True)
class CurvePoint:
    """What a threshold would keep of the calibration set. ``precision`` is None where it keeps nothing."""

    threshold: float
    precision: float | None
    recall: float
    fpr: float


@dataclass(frozen=True)
class FilterThreshold:
    """Keep what scores above ``threshold``. ``precision`` and ``curve`` are at the calibration set's share of good."""

    threshold: float
    target: float
    fpr: Rate
    recall: Rate
    precision: Rate
    average_precision: float
    curve: list[CurvePoint]

    def as_dict(self) -> dict[str, Any]:
        """The values of ``duel filter --json``."""
        return {
            "threshold": self.threshold,
            "rule": "score > threshold",
            "fpr": {"target": self.target, **asdict(self.fpr)},
            "recall": asdict(self.recall),
            "precision": asdict(self.precision),
            "average_precision": self.average_precision,
            "precision_recall": [asdict(point) for point in self.curve],
        }


def needed_negatives(fpr: float) -> int:
    """How many bad responses a target rate needs: with fewer, even the highest of their scores is too low.

    >>> needed_negatives(0.05), needed_negatives(0.01), needed_negatives(0.5)
    (19, 99, 1)
    """
    return math.ceil(1.0 / fpr - 1.0 - 1e-9)


def filter_threshold(
    scores: ArrayLike, good: ArrayLike, groups: Sequence[str], fpr: float, *, confidence: float = 0.95
) -> FilterThreshold:
    """The threshold for a false-positive rate ``fpr``, from scores (n,) of responses that are good or not (n,).

    ``groups`` (n,) tells responses that are not independent: their prompt, or a group of prompts that are alike.

    The expected rate over calibration sets of independent responses is at most ``fpr``.

    Raises:
        DataError: an ``fpr`` outside (0, 1), scores that are not finite, responses of one kind alone, too few bad ones
            for ``fpr``, or all of them to one prompt.
    """
    scores_N, good_N = np.asarray(scores, dtype=np.float64), np.asarray(good, dtype=bool)
    groups_N = np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)
    _check(scores_N, good_N, groups_N, fpr)
    bad_scores, bad_groups = scores_N[~good_N], groups_N[~good_N]
    n = len(bad_scores)
    k = math.floor(fpr * (n + 1) + 1e-9)
    threshold = float(np.sort(bad_scores)[n - k])
    kept_N = scores_N > threshold
    of_good = good_N.astype(np.float64)
    return FilterThreshold(
        threshold=threshold,
        target=fpr,
        fpr=_rate_of_order_statistic(bad_scores, bad_groups, threshold, k, confidence),
        recall=binomial_rate(kept_N[good_N], groups_N[good_N], confidence),
        precision=binomial_rate(good_N[kept_N], groups_N[kept_N], confidence),
        average_precision=_average_precision(scores_N, of_good),
        curve=_curve(scores_N, of_good, threshold),
    )


def _check(scores: Floats, good: NDArray[np.bool_], groups: Groups, fpr: float) -> None:
    if not 0.0 < fpr < 1.0:
        raise DataError(f"a false-positive rate of {fpr:g}", where="--fpr", fix="a fraction of one, such as 0.05")
    if not (scores.shape == good.shape == groups.shape) or scores.ndim != 1 or not np.isfinite(scores).all():
        raise DataError("every response needs one finite score, a label and a prompt", where="calibration")
    n_bad = int(np.count_nonzero(~good))
    for n, kind in ((n_bad, "bad"), (len(good) - n_bad, "good")):
        if n == 0:
            raise DataError(
                f"no response of the calibration set is {kind}",
                where="--calibrate",
                fix="name data with good and with bad responses",
            )
    needed = needed_negatives(fpr)
    if n_bad < needed:
        raise DataError(
            f"{n_bad} bad responses are too few for a false-positive rate of {fpr:g}: it takes at least {needed}",
            where="--calibrate",
            fix=f"label more responses, or give a higher --fpr (at least {1.0 / (n_bad + 1):.2g})",
        )
    if n_bad > 1 and len(np.unique(groups[~good])) == 1:
        raise DataError(
            "all bad responses answer one prompt: what other prompts do cannot be told from it",
            where="--calibrate",
            fix="name data with bad responses to several prompts",
        )


def _rate_of_order_statistic(scores: Floats, groups: Groups, threshold: float, k: int, confidence: float) -> Rate:
    """The rate of passing the k-th highest of the scores (n,)."""
    n = len(scores)
    above = int(np.count_nonzero(scores > threshold))
    scale = (effective_size(scores >= threshold, groups, confidence) + 1.0) / (n + 1)
    has_ties = len(np.unique(scores)) < n
    lowest = above if has_ties else k
    value = above / n if has_ties else k / (n + 1)
    low, high = _beta_bounds(lowest, above + 1, n, scale, confidence)
    return Rate(value, low, high, n, len(np.unique(groups)))


def binomial_rate(passed: ArrayLike, groups: Groups, confidence: float = 0.95) -> Rate:
    """The share of responses (n,) that pass a fixed test, with the interval of Clopper and Pearson."""
    passed_N = np.asarray(passed, dtype=bool)
    n = len(passed_N)
    if n == 0:
        return Rate(None, None, None, 0, 0)
    n_passed = int(np.count_nonzero(passed_N))
    scale = (effective_size(passed_N, groups, confidence) + 1.0) / (n + 1)
    low, high = _beta_bounds(n_passed, n_passed + 1, n, scale, confidence)
    return Rate(n_passed / n, low, high, n, len(np.unique(groups)))


def _beta_bounds(lowest: int, highest: int, n: int, scale: float, confidence: float) -> tuple[float, float]:
    """Quantiles of the ``lowest`` and ``highest`` of n uniform order statistics, their parameters times ``scale``."""
    from scipy.stats import beta  # takes long to import

    tail = (1.0 - confidence) / 2.0
    low = float(beta.ppf(tail, lowest * scale, (n + 1 - lowest) * scale)) if lowest > 0 else 0.0
    high = float(beta.ppf(1.0 - tail, highest * scale, (n + 1 - highest) * scale)) if highest <= n else 1.0
    return low, high


def effective_size(passed: ArrayLike, groups: Groups, confidence: float = 0.95) -> float:
    """How many independent responses say as much about the rate as these (n,) in groups. n where none share a group.

    n over the design effect: the variance of the rate over groups, by that of independent responses, at least 1. Where
    all pass or none does, it is that of responses which are alike within a group. With G groups the estimate has G - 1
    degrees of freedom: (t(n - 1) / t(G - 1))^2 widens for that.
    """
    passed_N = np.asarray(passed, dtype=np.float64)
    n, rate = len(passed_N), float(passed_N.mean())
    sizes_G = np.bincount(groups)
    sizes_G = sizes_G[sizes_G > 0]
    n_groups = len(sizes_G)
    if n_groups == n or n_groups < 2:
        return float(n_groups)
    if 0.0 < rate < 1.0:
        residual_G = np.bincount(groups, weights=passed_N - rate)
        variance = n_groups / (n_groups - 1) * float(np.sum(residual_G**2)) / n**2
        effect = max(1.0, variance / (rate * (1.0 - rate) / n))
    else:
        effect = float(np.sum(sizes_G**2)) / n
    level = (1.0 + confidence) / 2.0
    return n / effect * float(stdtrit(n - 1, level) / stdtrit(n_groups - 1, level)) ** 2


# ---------------------------------------------------------------- precision and recall


def _average_precision(scores: Floats, good: Floats) -> float:
    """The mean precision over the recall that each distinct threshold adds (scikit-learn's definition)."""
    _, kept_T, good_T = _cumulated(scores, good)
    gained_T = np.diff(good_T, prepend=0.0)
    return float(np.sum(gained_T * good_T / kept_T) / good.sum())


def _curve(scores: Floats, good: Floats, threshold: float) -> list[CurvePoint]:
    """The curve at up to ``CURVE_POINTS`` of the scores as thresholds, from the strictest, and at ``threshold``."""
    distinct = np.unique(scores)
    at = np.unique(np.linspace(0, len(distinct) - 1, min(CURVE_POINTS, len(distinct))).round().astype(np.int64))
    points = []
    for value in np.union1d(distinct[at], threshold)[::-1]:
        kept = scores > value
        n_kept, n_good = float(np.count_nonzero(kept)), float(good[kept].sum())
        points.append(
            CurvePoint(
                threshold=float(value),
                precision=n_good / n_kept if n_kept else None,
                recall=n_good / float(good.sum()),
                fpr=(n_kept - n_good) / float(len(good) - good.sum()),
            )
        )
    return points


def _cumulated(scores: Floats, good: Floats) -> tuple[Floats, Floats, Floats]:
    """(T,) distinct scores from the highest, and how many responses, and good ones, score at least that."""
    values, position = np.unique(scores, return_inverse=True)
    n_T = np.bincount(position, minlength=len(values)).astype(np.float64)[::-1]
    good_T = np.bincount(position, weights=good, minlength=len(values))[::-1]
    return values[::-1], np.cumsum(n_T), np.cumsum(good_T)
