"""How good a reward model is on comparisons: accuracy, calibration, margins, and how much of it is length.

A reward is read as Bradley-Terry: P(i preferred to j) = sigmoid(r_i - r_j).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit

from toolkit.errors import DataError
from toolkit.evals.agreement import (
    Comparison,
    EstimateDict,
    agreement_with_preference,
    comparison_columns,
    estimate_dict,
    margins,
    pairwise_accuracy,
    prompt_clusters,
    within_prompt_correlation,
)
from toolkit.evals.intervals import (
    NO_ESTIMATE,
    BootstrapOptions,
    Floats,
    bootstrap_statistic,
    ratio,
    sums_by_prompt,
)
from toolkit.evals.label_references import label_references

_BINS = 10
_ROUNDING = 1e-12  # of a sum's terms, relative: sums that should be 0 are nearer to it
_GRID_STEP, _GRID_REACH = 0.02, 250  # of the log of a resample's temperature: steps, and how many to either side
_GRID_START = 4  # steps that are tried first
_STEEPEST = 1e300  # the largest margin over the temperature, of those that are tried


def _log_loss(margin: Floats, p: Floats, weight: Floats) -> float:
    """Mean of -p*log q - (1-p)*log(1-q) in nats, where q = sigmoid(margin)."""
    return float(np.sum(weight * (np.logaddexp(0.0, margin) - p * margin)) / weight.sum())


def confidence_bins(margin: Floats, n_bins: int = _BINS) -> tuple[Floats, NDArray[np.int64], Floats]:
    """The confidence max(q, 1-q) of margins (m,), the number (m,) of the bin it is in, and the edges of the bins.

    The bins are equally wide over [0.5, 1], the range of a confidence.
    """
    confidence = expit(np.abs(margin))
    bins = np.clip(((confidence - 0.5) * 2.0 * n_bins).astype(np.int64), 0, n_bins - 1)
    return confidence, bins, np.linspace(0.5, 1.0, n_bins + 1)


def reliability_curve(
    margin: ArrayLike, p: ArrayLike, weight: ArrayLike, *, n_bins: int = _BINS
) -> list[dict[str, float | int | None]]:
    """The bins of :func:`confidence_bins`: weighted mean confidence, accuracy, share and count.

    An empty bin has None for its means.
    """
    margin_M, p_M, w_M = (np.asarray(a, dtype=np.float64) for a in (margin, p, weight))
    confidence, bins, edges = confidence_bins(margin_M, n_bins)
    right = agreement_with_preference(margin_M, p_M)
    rows: list[dict[str, float | int | None]] = []
    for k in range(n_bins):
        inside = bins == k
        mass = float(w_M[inside].sum())
        rows.append(
            {
                "low": float(edges[k]),
                "high": float(edges[k + 1]),
                "confidence": float(np.sum(w_M[inside] * confidence[inside]) / mass) if mass else None,
                "accuracy": float(np.sum(w_M[inside] * right[inside]) / mass) if mass else None,
                "share": mass / float(w_M.sum()),
                "n": int(inside.sum()),
            }
        )
    return rows


def expected_calibration_error(bins: Sequence[dict[str, float | int | None]]) -> float:
    """Mean |accuracy - confidence| over the bins of :func:`reliability_curve`, weighted by share (Guo et al. 2017)."""
    gaps = [(b["share"], b["accuracy"], b["confidence"]) for b in bins]
    return float(sum(s * abs(a - c) for s, a, c in gaps if s is not None and a is not None and c is not None))


def fit_temperature(margin: ArrayLike, p: ArrayLike, weight: ArrayLike) -> float | None:
    """The T > 0 that minimises the log loss of sigmoid(margin / T).

    None where no finite positive T does. Either every pair is ordered right (T -> 0), or the margins have no signal or
    a reversed one (T -> infinity).
    """
    margin_M, p_M, w_M = (np.asarray(a, dtype=np.float64) for a in (margin, p, weight))
    scale = float(np.abs(margin_M).max(initial=0.0))
    if scale == 0.0:
        return None
    unit_M = margin_M / scale
    # The slope of the loss at 1/T = 0 says whether a positive 1/T lowers it; rounding may move a slope of 0.
    gains_M = w_M * (p_M - 0.5) * unit_M
    if np.sum(gains_M) <= _ROUNDING * np.sum(np.abs(gains_M)):
        return None
    if np.all(w_M * np.where(unit_M > 0, 1.0 - p_M, np.where(unit_M < 0, p_M, 0.0)) == 0.0):
        return None

    def slope(x: float) -> float:  # of the loss, which is convex in x = scale / T; no term loses digits far from x = 0
        return float(np.sum(w_M * unit_M * ((1.0 - p_M) * expit(unit_M * x) - p_M * expit(-unit_M * x))))

    low = high = 1.0
    while slope(low) > 0.0:
        low /= 2.0
    while slope(high) < 0.0 and high < _STEEPEST:
        high *= 2.0
    if slope(high) < 0.0:
        return None
    return scale / (high if low == high else float(brentq(slope, low, high, xtol=1e-14 * low, rtol=1e-12)))


def _brier(margin: Floats, p: Floats) -> Floats:
    """Squared error (m,) of the probability q = sigmoid(margin), averaged over the labels: p(1-q)^2 + (1-p)q^2.

    Like the log loss it does not depend on whether the labels of a pair are counted one by one or as their share p.
    """
    q = expit(margin)
    return np.asarray(p * (1.0 - q) ** 2 + (1.0 - p) * q**2, dtype=np.float64)


def _calibration(margin: Floats, p: Floats, weight: Floats) -> dict[str, object]:
    bins = reliability_curve(margin, p, weight)
    return {
        "nll": _log_loss(margin, p, weight),
        "brier": float(np.sum(weight * _brier(margin, p)) / weight.sum()),
        "ece": expected_calibration_error(bins),
        "reliability": bins,
    }


def calibration(
    comparisons: Sequence[Comparison],
    rewards: Sequence[ArrayLike],
    *,
    prompt_ids: Sequence[str] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, EstimateDict]:
    """``nll`` (nats), ``brier``, ``ece`` and ``temperature`` as in :func:`rm_quality`, with intervals over prompts.

    An expected calibration error is biased upwards where bins hold few comparisons; resampling does not remove that.
    The temperature is that of :func:`fit_temperature`, None where none fits. Each resample's is the minimum of the log
    loss over a grid in steps of 2% about it, refined by a parabola; there is no interval where too many have none. Of
    the grid only as much is computed as the resamples need: all of it would be 501 values for each comparison.

    Raises:
        DataError: comparisons and rewards that do not fit each other, or no comparisons.
    """
    prompt, i, j, p, weight = comparison_columns(comparisons, rewards)
    if len(prompt) == 0:
        raise DataError("no comparisons to judge the reward model by", where="calibration")
    clusters = prompt_clusters(prompt_ids, len(rewards))[prompt]
    margin = margins(rewards, prompt, i, j)

    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}

    def over_prompts(fn: Callable[..., Floats], *columns: Floats) -> EstimateDict:
        return estimate_dict(bootstrap_statistic(sums_by_prompt(clusters, *columns), fn, **options))

    loss = np.logaddexp(0.0, margin) - p * margin
    probability, bins, _ = confidence_bins(margin)
    right = agreement_with_preference(margin, p)
    temperature = fit_temperature(margin, p, weight)
    gaps = [weight * (bins == k) * (right - probability) for k in range(_BINS)]
    return {
        "nll": over_prompts(ratio, weight * loss, weight),
        "brier": over_prompts(ratio, weight * _brier(margin, p), weight),
        "ece": over_prompts(_ece_of_sums, weight, *gaps),
        # not the grid's value, which lies some 1e-4 of it beside the one that `rm_quality` has
        "temperature": _temperature_interval(clusters, margin, p, weight, temperature, options)
        | {"value": temperature},
    }


def _ece_of_sums(weight: Floats, *gaps: Floats) -> Floats:
    return np.asarray(np.sum([np.abs(gap) for gap in gaps], axis=0) / weight, dtype=np.float64)


def _temperature_interval(
    clusters: NDArray[np.int64],
    margin: Floats,
    p: Floats,
    weight: Floats,
    centre: float | None,
    options: BootstrapOptions,
) -> EstimateDict:
    """The best temperature by the grid, NaN where its minimum is at an end of the grid.

    ``centre`` is the best temperature of all comparisons, None where none fits. The loss is convex in 1/T, so that a
    minimum inside a part of the grid is that of the whole: the part grows until every resample's lies inside.
    """
    if centre is None:
        estimate = bootstrap_statistic(
            sums_by_prompt(clusters, weight), lambda total: np.full_like(total, np.nan), **options
        )
        return estimate_dict(estimate)
    reach = _GRID_START
    while True:
        log_t = np.log(centre) + _GRID_STEP * np.arange(-reach, reach + 1)
        columns = (weight * (np.logaddexp(0.0, margin / t) - p * margin / t) for t in np.exp(log_t))
        sums = [sums_by_prompt(clusters, column)[0] for column in columns]
        grid = _Grid(log_t)
        estimate = bootstrap_statistic(sums, grid.best, **options)
        if reach == _GRID_REACH or not grid.left:
            return estimate_dict(estimate)
        reach = min(2 * reach, _GRID_REACH)


class _Grid:
    """Temperatures with the logs ``log_t`` (G,). ``left`` says whether some minimum was at an end of them."""

    def __init__(self, log_t: Floats) -> None:
        self.log_t, self.left = log_t, False

    def best(self, *losses: Floats) -> Floats:
        """The temperatures (B,) of the least losses, G times (B,)."""
        loss_BG = np.stack(losses, axis=-1)
        least = loss_BG.argmin(axis=-1)
        best = np.clip(least, 1, len(self.log_t) - 2)
        self.left |= bool(np.any(best != least))
        rows = np.arange(len(loss_BG))
        below, at, above = (loss_BG[rows, best + step] for step in (-1, 0, 1))
        bend = below - 2.0 * at + above
        inside = (at <= below) & (at <= above) & (bend > 0.0)
        shift = np.where(inside, 0.5 * (below - above) / np.where(inside, bend, 1.0), np.nan)
        return np.asarray(np.exp(self.log_t[best] + _GRID_STEP * shift), dtype=np.float64)


def rm_quality(
    comparisons: Sequence[Comparison],
    rewards: Sequence[ArrayLike],
    *,
    prompt_ids: Sequence[str] | None = None,
    lengths: Sequence[ArrayLike] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, object]:
    """Quality of ``rewards`` (one array (K,) per row) on ``comparisons``, tuples (row, i, j, p, weight).

    Rows with equal ``prompt_ids`` are one prompt, which intervals take whole; without them every row is a prompt.

    Returns ``accuracy`` with its interval over prompts (equal rewards count half), ``nll`` (nats), ``brier`` (squared
    error of the predicted probability against each label), ``ece`` with 10 bins and its ``reliability`` curve,
    ``margin_mean`` towards the preferred response, and ``accuracy_by_margin`` in fifths of the comparisons.
    ``references`` has what a coin and what the labels themselves get in each of these (:func:`label_references`).
    ``temperature`` is fitted on these same comparisons and null if none fits; ``after_temperature`` has the calibration
    that it gives, which is therefore optimistic. With ``lengths`` also ``accuracy_preferred_longer`` and
    ``accuracy_preferred_shorter``, ``longer_preferred_rate``, and ``length_spearman``, the within-prompt rank
    correlation of reward and length.

    Raises:
        DataError: comparisons, rewards and lengths that do not fit each other, or no comparisons.
    """
    row, i, j, p, weight = comparison_columns(comparisons, rewards)
    if len(row) == 0:
        raise DataError("no comparisons to judge the reward model by", where="rm_quality")
    prompt = prompt_clusters(prompt_ids, len(rewards))[row]
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    margin = margins(rewards, row, i, j)
    right = agreement_with_preference(margin, p)
    temperature = fit_temperature(margin, p, weight)
    # a tie prefers neither response: its expected margin is 0 by construction and says nothing
    decided, preference = p != 0.5, 2.0 * p - 1.0
    result: dict[str, object] = {
        "n_prompts": len(np.unique(prompt)),
        "n_pairs": len(prompt),
        "accuracy": estimate_dict(pairwise_accuracy(comparisons, rewards, prompt_ids=prompt_ids, **options)),
        **_calibration(margin, p, weight),
        "temperature": temperature,
        "after_temperature": None if temperature is None else _calibration(margin / temperature, p, weight),
        "margin_mean": _ratio_where(
            decided, prompt, weight * preference * margin, weight * np.abs(preference), options
        ),
        "references": label_references(comparisons, rewards, prompt_ids=prompt_ids, **options),
        "accuracy_by_margin": _accuracy_by_margin(prompt, np.abs(margin), right, weight, options),
    }
    if lengths is not None:
        if [len(np.asarray(a)) for a in lengths] != [len(np.asarray(r)) for r in rewards]:
            raise DataError("lengths and rewards differ in their numbers of responses", where="rm_quality")
        # towards the preferred response: positive where it is the longer one
        longer = np.sign(margins(lengths, row, i, j)) * np.sign(p - 0.5)
        result |= _length_bias(prompt, longer, right, weight, options)
        result["length_spearman"] = estimate_dict(
            within_prompt_correlation(rewards, lengths, prompt_ids=prompt_ids, **options)
        )
    return result


def _ratio_where(
    rows: NDArray[np.bool_],
    prompt: NDArray[np.int64],
    numerator: Floats,
    denominator: Floats,
    options: BootstrapOptions,
) -> EstimateDict:
    """Sum of the numerator / sum of the denominator over ``rows``, with an interval over prompts."""
    if not rows.any():
        return estimate_dict(NO_ESTIMATE)
    sums = sums_by_prompt(prompt[rows], numerator[rows], denominator[rows])
    return estimate_dict(bootstrap_statistic(sums, ratio, **options))


def _accuracy_by_margin(
    prompt: NDArray[np.int64], size: Floats, right: Floats, weight: Floats, options: BootstrapOptions
) -> list[EstimateDict]:
    """Accuracy in fifths of the comparisons by the size (m,) of their margin, each with its mean size."""
    cuts = np.quantile(size, [0.2, 0.4, 0.6, 0.8])
    fifth = np.searchsorted(cuts, size, side="right")
    return [
        {"margin": float(size[fifth == k].mean()), **_ratio_where(fifth == k, prompt, weight * right, weight, options)}
        for k in range(5)
        if np.any(fifth == k)
    ]


def _length_bias(
    prompt: NDArray[np.int64], longer: Floats, right: Floats, weight: Floats, options: BootstrapOptions
) -> dict[str, EstimateDict]:
    """Accuracy by length. ``longer`` (m,) is 1 where the preferred response is longer, -1 where the other one is."""
    right_weight = weight * right
    return {
        "accuracy_preferred_longer": _ratio_where(longer > 0.0, prompt, right_weight, weight, options),
        "accuracy_preferred_shorter": _ratio_where(longer < 0.0, prompt, right_weight, weight, options),
        "longer_preferred_rate": _ratio_where(longer != 0.0, prompt, weight * (longer > 0.0), weight, options),
    }
