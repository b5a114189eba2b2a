"""Means and ratios over prompts with bootstrap intervals.

The prompt is the unit everywhere. What is measured several times inside a prompt (orders, judges, samples, pairs) is
reduced to one value, or to sums, of that prompt before anything here resamples. Intervals are BCa (Efron 1987, "Better
Bootstrap Confidence Intervals"), as ``scipy.stats.bootstrap`` computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from toolkit.errors import DataError

Floats = NDArray[np.float64]
_CHUNK_ELEMENTS = 1 << 20  # resampled indices held at once: 8 MiB, so that memory does not grow with n_resamples
_DRAWS_AT_ONCE = 64  # 64 x 805 doubles stay in the second-level cache
_ROUNDING = 1e-12  # of the largest value, relative: means that should be equal differ by less


class BootstrapOptions(TypedDict):
    """The keyword arguments that every statistic with an interval takes."""

    n_resamples: int
    confidence: float
    seed: int


DEFAULT_INTERVALS: BootstrapOptions = {"n_resamples": 2000, "confidence": 0.95, "seed": 0}


@dataclass(frozen=True)
class Estimate:
    """A value over ``n`` prompts. A field is None where the data cannot say: no prompts, or no spread to resample."""

    value: float | None
    standard_error: float | None
    ci_low: float | None
    ci_high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


NO_ESTIMATE = Estimate(None, None, None, None, 0)


def check_settings(n_resamples: int, confidence: float) -> None:
    """Raise DataError for settings that give no interval."""
    if n_resamples < 1:
        raise DataError(f"n_resamples is {n_resamples}", where="bootstrap", fix="use at least 1, better 2000")
    if not 0.0 < confidence < 1.0:
        raise DataError(f"confidence is {confidence}", where="bootstrap", fix="use a fraction such as 0.95")


def resample_indices(n: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Draw index arrays (chunk, n) with replacement, ``n_resamples`` rows in all.

    ``scipy.stats.bootstrap(rng=np.random.default_rng(seed))`` draws the same numbers. They do not depend on the size of
    a chunk.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // max(n, 1))
    for start in range(0, n_resamples, rows):
        yield rng.integers(0, n, size=(min(rows, n_resamples - start), n))


def resample_counts(
    n: int, n_resamples: int, seed: int, kind_N: NDArray[np.integer[Any]] | None = None
) -> Iterator[Floats]:
    """Count how often each prompt was drawn, (chunk, n). The draws are those of :func:`resample_indices`.

    ``kind_N`` numbers the kinds of prompts from 0: counted is then how often each kind was drawn, (chunk, kinds).
    """
    for index_BN in resample_indices(n, n_resamples, seed):
        if kind_N is None:
            rows = len(index_BN)
            index_BN += np.arange(rows)[:, None] * n
            counts = np.bincount(index_BN.ravel(), minlength=rows * n).reshape(rows, n)
        else:
            n_kinds = int(kind_N.max()) + 1
            counts = np.stack([np.bincount(kind_N[index_N], minlength=n_kinds) for index_N in index_BN])
        yield counts.astype(np.float64)


def resamples(n: int, n_resamples: int, seed: int, kind_N: NDArray[np.integer[Any]] | None = None) -> Iterator[Floats]:
    """The counts of :func:`resample_counts`, a few draws at a time, for statistics that hold (draws, n) values."""
    for counts_CN in resample_counts(n, n_resamples, seed, kind_N):
        for at in range(0, len(counts_CN), _DRAWS_AT_ONCE):
            yield counts_CN[at : at + _DRAWS_AT_ONCE]


def rounded_alike(values: Floats) -> bool:
    """Whether values (n,) differ by rounding alone, as means that were added in different orders do."""
    return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


def with_ties(draws_B: Floats, value: float) -> Floats:
    """The draws (B,), with the value itself in place of those that differ from it by rounding alone."""
    return np.where(np.abs(draws_B - value) <= _ROUNDING * np.abs(draws_B).max(), value, draws_B)


def bca_interval(
    value: float, draws_B: Floats, jackknife_N: Floats, confidence: float
) -> tuple[float | None, float | None]:
    """BCa interval from bootstrap draws (B,) and leave-one-prompt-out values (n,).

    Draws that equal the value but for rounding count half as below it. Draws without any spread have no interval:
    (None, None). Where all draws lie on one side of the value, the bias is undefined, and the percentile interval is
    returned without a correction.
    """
    alpha = (1.0 - confidence) / 2.0
    if not np.isfinite(value) or not np.all(np.isfinite(draws_B)):
        return None, None
    draws_B = with_ties(draws_B, value)
    if np.ptp(draws_B) == 0.0:
        return None, None
    centred_N = jackknife_N.mean() - jackknife_N
    spread = float(np.sum(centred_N**2))
    below = (np.count_nonzero(draws_B < value) + np.count_nonzero(draws_B <= value)) / (2.0 * len(draws_B))
    levels = np.array([alpha, 1.0 - alpha])
    if spread > 0.0 and np.isfinite(spread) and 0.0 < below < 1.0:
        acceleration = float(np.sum(centred_N**3)) / (6.0 * spread**1.5)
        bias = float(ndtri(below))
        z = bias + ndtri(levels)
        corrected = ndtr(bias + z / (1.0 - acceleration * z))
        if np.all(np.isfinite(corrected)):
            levels = corrected
    low, high = np.quantile(draws_B, levels)
    return float(low), float(high)


def percentile_interval(draws_B: Floats, confidence: float) -> tuple[float, float]:
    """The percentile interval of bootstrap draws (B,)."""
    alpha = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws_B, [alpha, 1.0 - alpha])
    return float(low), float(high)


def interval_without_spread(
    value: float, n: int, bounds: tuple[float, float], confidence: float
) -> tuple[float, float]:
    """Interval of a bounded mean whose n observations are all equal.

    At most the share s = 1 - (alpha/2)^(1/n) of the population differs from the observed value (exact binomial). In the
    worst case that share lies on a bound. With 0/1 outcomes this is the Clopper-Pearson interval.
    """
    share = 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / n)
    return value - share * (value - bounds[0]), value + share * (bounds[1] - value)


def bootstrap_mean(
    values: ArrayLike,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Mean of one value per prompt (n,), its standard error sd(ddof 1)/sqrt n, and the BCa interval over prompts.

    Without prompts all fields are None. One prompt, or equal values, give resampling nothing to vary: there is no
    interval then, unless the values have known ``bounds``. An exact binomial argument then gives a wide one.

    Raises:
        DataError: values that are not one finite number per prompt. NaN is refused too: decide what a missing value
            means before averaging.
    """
    check_settings(n_resamples, confidence)
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or not np.all(np.isfinite(values_N)):
        raise DataError("a mean over prompts needs one finite number per prompt", where=f"shape {values_N.shape}")
    n = len(values_N)
    if n == 0:
        return NO_ESTIMATE
    mean = float(values_N.mean())
    standard_error = float(values_N.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    if rounded_alike(values_N):
        value = float(values_N[0])
        if bounds is None:
            return Estimate(value, 0.0 if n > 1 else None, None, None, n)
        return Estimate(value, 0.0 if n > 1 else None, *interval_without_spread(value, n, bounds, confidence), n)
    draws_B = np.concatenate([values_N[index].mean(axis=-1) for index in resample_indices(n, n_resamples, seed)])
    jackknife_N = (values_N.sum() - values_N) / (n - 1)
    return Estimate(mean, standard_error, *bca_interval(mean, draws_B, jackknife_N, confidence), n)


def bootstrap_statistic(
    arrays: Sequence[ArrayLike],
    fn: Callable[..., Floats],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """A statistic of per-prompt sums, with whole prompts resampled.

    Each of ``arrays`` holds one number per prompt (n,): numerators, denominators, cells of a table, moments. ``fn``
    takes their sums over prompts, one array (B,) per entry of ``arrays``, and returns the statistic (B,);
    :func:`ratio` is an example. The standard error is the standard deviation of the draws. Draws where the statistic is
    undefined (0/0) are left out. If they are more than 1%, there is no interval.

    Raises:
        DataError: arrays of different lengths or with values that are not finite.
    """
    check_settings(n_resamples, confidence)
    columns = [np.asarray(a, dtype=np.float64) for a in arrays]
    if len({c.shape for c in columns}) != 1 or columns[0].ndim != 1:
        raise DataError("every array needs one number per prompt", where=f"shapes {[c.shape for c in columns]}")
    sums_NK = np.stack(columns, axis=1)
    if not np.all(np.isfinite(sums_NK)):
        raise DataError("per-prompt sums must be finite", where="bootstrap_statistic")
    n = len(sums_NK)
    if n == 0:
        return NO_ESTIMATE

    def apply(sums_BK: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(fn(*sums_BK.T), dtype=np.float64)

    total_K = sums_NK.sum(axis=0)
    value = float(apply(total_K[None])[0])
    if not np.isfinite(value):
        return Estimate(None, None, None, None, n)
    if n == 1:
        return Estimate(value, None, None, None, n)
    draws_B = np.concatenate([apply(counts @ sums_NK) for counts in resample_counts(n, n_resamples, seed)])
    defined = np.isfinite(draws_B)
    if np.count_nonzero(~defined) > 0.01 * n_resamples:
        return Estimate(value, None, None, None, n)
    draws_B = with_ties(draws_B[defined], value)
    jackknife_N = apply(total_K - sums_NK)
    low, high = bca_interval(value, draws_B, jackknife_N[np.isfinite(jackknife_N)], confidence)
    return Estimate(value, float(draws_B.std(ddof=1)) if len(draws_B) > 1 else None, low, high, n)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """The ``fn`` of :func:`bootstrap_statistic` for a ratio of two sums."""
    return numerator / denominator


def sums_by_prompt(prompt_ids: Sequence[object] | NDArray[np.generic], *columns: ArrayLike) -> list[Floats]:
    """Sum each column (m,) inside its prompt. Returns arrays (n_prompts,), prompts in order of their sorted id."""
    _, index = np.unique(np.asarray(prompt_ids), return_inverse=True)
    n = int(index.max()) + 1 if len(index) else 0
    return [
        np.bincount(index, weights=np.asarray(c, dtype=np.float64), minlength=n).astype(np.float64) for c in columns
    ]


def bootstrap_share(
    prompt_ids: Sequence[object] | NDArray[np.generic],
    part: ArrayLike,
    whole: ArrayLike,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The sum of ``part`` (m,) over that of ``whole`` (m,), a share of one, with an interval over prompts.

    Where all prompts have the same share, resampling has nothing to vary; the exact binomial interval takes its place.

    >>> bootstrap_share(["a", "b", "c"], [1, 1, 1], [1, 1, 1]).ci_low
    0.2924...
    """
    part_N, whole_N = sums_by_prompt(prompt_ids, part, whole)
    if not len(part_N):
        return NO_ESTIMATE
    estimate = bootstrap_statistic([part_N, whole_N], ratio, n_resamples=n_resamples, confidence=confidence, seed=seed)
    if estimate.value is None or not np.all(whole_N > 0.0) or not rounded_alike(part_N / whole_N):
        return estimate
    value = min(max(estimate.value, 0.0), 1.0)
    low, high = interval_without_spread(value, len(part_N), (0.0, 1.0), confidence)
    return Estimate(value, estimate.standard_error, low, high, estimate.n)
