"""Win rates between policies: the statistics of paired preferences, with the prompt as the unit.

A preference is a number in [0, 1] per prompt: 1 where the policy's response is preferred, 0 where the baseline's is,
0.5 for a tie, NaN where there is no judgement. A prompt that was judged several times (orders, judges, samples) counts
once, by its mean. Rates are fractions of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, ndtri

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats, bootstrap_mean, check_settings, resample_counts, rounded_alike

_MC_FLIPS = 9_999  # with the observed assignment 10,000: p-values are multiples of 1e-4
_ROUNDING = 1e-10  # of the sum of n numbers, relative: far below the step of any preferences that people have
_LATTICE = 24  # preferences that are multiples of 1/24 (0, 1/2, 1; means of 2, 3, 4, 6 judgements) get an exact test
_TIE = 1e-12  # a mean that is nearer to one half is one half, missed by rounding
_NEWTON = 1e-8  # log strengths that differ by less were fitted to the same wins
_EXACT_MAX_STEPS = 20_000  # beyond this the convolution is slower than random flips


@dataclass(frozen=True)
class WinRate:
    """One row of ``win_rates``. A field is None where it does not apply.

    - ``win + tie + loss = 1`` over the judged prompts; ``win_rate`` is the mean preference, so a tie counts half.
    - ``standard_error`` is sd(ddof 1)/sqrt n, and ``ci_*`` the BCa bootstrap interval over prompts.
    - ``p_value`` belongs to the paired permutation test of "no difference"; ``holm_p`` is corrected for the number of
      rows that are reported together.
    - ``lc_*`` is the length-controlled and ``sc_*`` the style-controlled win rate. ``lc_variant`` is ``alpaca_eval``
      (with AlpacaEval's table) or ``length_only``; ``*_reason`` says why there is no estimate.
    - ``slice`` names the prompts that the row is over; None means all of them.
    - ``position_consistency`` is the share of prompts, judged in both orders, with the same verdict (win, tie, loss) in
      both. ``first_slot_rate`` is the mean preference for the response shown first: 0.5 without position bias. Both are
      over pairs of different texts.
    - ``detectable_effect`` is the distance from one half that these prompts find in 80% of runs at the 0.05 level.
    """

    policy: str
    baseline: str
    judge: str
    win: float | None
    tie: float | None
    loss: float | None
    win_rate: float | None
    standard_error: float | None
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    n_prompts: int
    n_judged: int
    n_failed: int
    lc_win_rate: float | None = None
    lc_ci_low: float | None = None
    lc_ci_high: float | None = None
    position_consistency: float | None = None
    first_slot_rate: float | None = None
    sign_test_p: float | None = None
    holm_p: float | None = None
    detectable_effect: float | None = None
    n_tied: int = 0
    sc_win_rate: float | None = None
    sc_ci_low: float | None = None
    sc_ci_high: float | None = None
    style_effects: dict[str, float] | None = None
    slice: str | None = None
    lc_variant: str | None = None
    lc_reason: str | None = None
    sc_reason: str | None = None

    def as_dict(self) -> dict[str, str | float | int | dict[str, float] | None]:
        return asdict(self)


def exact_ties(preferences: ArrayLike) -> Floats:
    """Preferences of any shape, in which a mean that should be one half is one half.

    Three judges' means of three judgements, 1/2, 2/3 and 1/3, have the mean 0.49999999999999994 in floats.
    """
    values = np.asarray(preferences, dtype=np.float64)
    return np.where(np.abs(values - 0.5) <= _TIE, 0.5, values)


def checked_preferences(preferences: ArrayLike) -> Floats:
    """Preferences (n,) as fp64 with :func:`exact_ties`, NaN allowed. Raises DataError for one outside [0, 1]."""
    values = np.asarray(preferences, dtype=np.float64)
    if values.ndim != 1:
        raise DataError("preferences must be one number per prompt", where=f"shape {values.shape}")
    bad = np.flatnonzero((values < 0.0) | (values > 1.0))
    if len(bad):
        raise DataError(
            f"preference {values[bad[0]]:g} is outside [0, 1]",
            where=f"position {int(bad[0])}",
            fix="1 means the policy is preferred, 0 the baseline, 0.5 a tie; AlpacaEval's 1..2 minus 1",
        )
    return exact_ties(values)


def average_within_prompt(
    prompt_ids: Sequence[object] | NDArray[np.generic], values: ArrayLike
) -> tuple[NDArray[np.generic], Floats]:
    """Mean of the values (m,) of each prompt, NaN ignored.

    Returns the ids (n,) in order of first appearance and the means (n,). A prompt without any value has the mean NaN.
    """
    ids = np.asarray(prompt_ids)
    values_M = np.asarray(values, dtype=np.float64)
    if ids.shape != values_M.shape:
        raise DataError("every value needs a prompt id", where=f"shapes {ids.shape} and {values_M.shape}")
    unique, first, index = np.unique(ids, return_index=True, return_inverse=True)
    known = ~np.isnan(values_M)
    sums = np.bincount(index[known], weights=values_M[known], minlength=len(unique))
    counts = np.bincount(index[known], minlength=len(unique))
    means = np.full(len(unique), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    order = np.argsort(first)
    return unique[order], means[order]


def sign_test(preferences: ArrayLike) -> float | None:
    """p-value of the two-sided exact sign test: wins against losses, ties left out. None without a judged prompt."""
    values = checked_preferences(preferences)
    if not np.any(~np.isnan(values)):
        return None
    from scipy.stats import binomtest  # scipy.stats takes long to import, and most commands ask for no test

    wins, losses = int(np.sum(values > 0.5)), int(np.sum(values < 0.5))
    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def permutation_test(preferences: ArrayLike, *, seed: int = 0, n_flips: int = _MC_FLIPS) -> float | None:
    """p-value of the two-sided paired permutation test: under "no difference" each p - 1/2 may flip its sign.

    The test is exact (the whole distribution, by convolution) where the preferences are multiples of 1/24, as wins,
    ties, losses and their means over a few orders or judges are. It is the exact sign test where all prompts without a
    tie deviate alike, in any number. Otherwise it draws ``n_flips`` random assignments and counts the observed one too,
    so that it never claims p = 0. None without a judged prompt.
    """
    values = checked_preferences(preferences)
    deviations = values[~np.isnan(values)] - 0.5
    if len(deviations) == 0:
        return None
    observed = abs(float(deviations.sum()))
    deviations = np.abs(deviations[deviations != 0.0])
    if len(deviations) == 0:
        return 1.0
    steps = np.rint(deviations * 2 * _LATTICE).astype(np.int64)
    if steps.all() and np.allclose(steps, deviations * 2 * _LATTICE, rtol=0.0, atol=1e-9):
        unit = int(np.gcd.reduce(steps))
        if int(steps.sum()) // unit <= _EXACT_MAX_STEPS:
            return _exact_flip_p(steps // unit, round(observed * 2 * _LATTICE) // unit)
    if rounded_alike(deviations):
        return sign_test(values)
    rng = np.random.default_rng(seed)
    rows, total = max(1, (1 << 20) // len(deviations)), deviations.sum()
    # A sum that equals the observed one counts, and each is rounded by some billionths of a billionth of the total.
    hits, threshold = 0, observed - _ROUNDING * total
    for start in range(0, n_flips, rows):
        heads = _flips(rng, min(rows, n_flips - start), len(deviations))
        hits += int(np.count_nonzero(np.abs(2.0 * (heads @ deviations) - total) >= threshold))
    return (hits + 1) / (n_flips + 1)


def _flips(rng: np.random.Generator, rows: int, n: int) -> NDArray[np.bool_]:
    """Heads of fair coins (rows, n): what ``rng.integers(0, 2, (rows, n), dtype=np.int8)`` draws, in less time.

    NumPy takes the top bit of each byte there.
    """
    drawn = np.frombuffer(rng.bytes(rows * n), dtype=np.uint8) >> 7
    return drawn.view(np.bool_).reshape(rows, n)


def _exact_flip_p(steps: NDArray[np.int64], observed: int) -> float:
    """The exact P(|sum of +-steps| >= observed). With all steps equal this is the binomial sign test."""
    from scipy.stats import binom

    sizes, counts = np.unique(steps, return_counts=True)
    distribution = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        # the sum of `count` signs times `size` has binomial masses 2*size apart; zeros fill the steps between them
        spaced = np.zeros(2 * size * count + 1)
        spaced[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, spaced)
    total = (len(distribution) - 1) // 2
    at = np.arange(-total, total + 1)
    return float(min(1.0, distribution[np.abs(at) >= observed].sum()))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values after Holm's step-down correction (1979). None stays None and does not count as a comparison."""
    known = [i for i, p in enumerate(p_values) if p is not None]
    ordered = sorted(known, key=lambda i: p_values[i] or 0.0)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, i in enumerate(ordered):
        running = max(running, (len(ordered) - rank) * (p_values[i] or 0.0))
        adjusted[i] = min(1.0, running)
    return adjusted


def power_prompts(win_rate: float, *, tie_share: float = 0.0, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Prompts that a two-sided test of ``win_rate`` against 1/2 needs: 194 for .60, 783 for .55, 4,903 for .52.

    It is the normal approximation with the variance of each hypothesis, rounded to the nearest prompt. Without ties or
    graded preferences the exact tests reject on whole wins only, and have less power (76.4% at 194 prompts and .60).
    ``tie_share`` is the share of prompts that tie, which lowers the variance at the same win rate. None at exactly 1/2:
    no number of prompts can tell it apart.

    Raises:
        DataError: values outside their ranges.

    >>> power_prompts(0.6)
    194
    """
    if not 0.0 < power < 1.0 or not 0.0 < alpha < 1.0:
        raise DataError(f"power {power}, alpha {alpha}: both must lie inside (0, 1)", where="power_prompts")
    if not 0.0 <= tie_share < 1.0 or not tie_share / 2 <= win_rate <= 1.0 - tie_share / 2:
        raise DataError(
            f"a win rate of {win_rate} cannot occur with a tie share of {tie_share}",
            where="power_prompts",
            fix="ties count half: tie_share/2 <= win_rate <= 1 - tie_share/2",
        )
    # E[p^2] = wins + ties/4 with wins = win_rate - ties/2
    return _prompts(win_rate, (1.0 - tie_share) / 4.0, win_rate - tie_share / 4.0 - win_rate**2, power, alpha)


def _prompts(win_rate: float, null_variance: float, variance: float, power: float, alpha: float) -> int | None:
    effect = abs(win_rate - 0.5)
    if effect < 1e-12:
        return None
    needed = float(ndtri(1 - alpha / 2)) * np.sqrt(null_variance) + float(ndtri(power)) * np.sqrt(max(variance, 0.0))
    return max(2, round(float(needed / effect) ** 2))


def detectable_effect(preferences: ArrayLike, *, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The distance from one half that as many prompts, with such spread, would find with this power.

    It is the normal approximation ``(z(1 - alpha/2) + z(power)) * sd / sqrt(n)``, with the spread around one half. It
    does not depend on the effect that was observed. None for fewer than two prompts, or where all are ties.

    >>> round(detectable_effect([1.0] * 100 + [0.0] * 100), 3)
    0.099
    """
    values = checked_preferences(preferences)
    values = values[~np.isnan(values)]
    spread = float(np.sqrt(np.mean((values - 0.5) ** 2))) if len(values) > 1 else 0.0
    if spread == 0.0:
        return None
    return min(0.5, float(ndtri(1 - alpha / 2) + ndtri(power)) * spread / float(np.sqrt(len(values))))


def win_rate(
    preferences: ArrayLike,
    *,
    policy: str,
    baseline: str,
    judge: str,
    n_failed: int = 0,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate:
    """Win rate of ``policy`` over ``baseline`` from one preference per prompt (n,), NaN where it was not judged.

    ``n_failed`` counts judgements that failed; a prompt may have several. Each NaN counts as at least one. Where all
    preferences are equal, the interval is the exact binomial one for values in [0, 1].

    >>> row = win_rate([1.0, 1.0, 0.5, 0.0], policy="dpo", baseline="sft", judge="gold")
    >>> row.win_rate, row.tie, row.n_judged
    (0.625, 0.25, 4)

    Raises:
        DataError: a preference outside [0, 1].
    """
    values = checked_preferences(preferences)
    judged = values[~np.isnan(values)]
    n, n_prompts = len(judged), len(values)
    estimate = bootstrap_mean(judged, n_resamples=n_resamples, confidence=confidence, seed=seed, bounds=(0.0, 1.0))
    return WinRate(
        policy=policy,
        baseline=baseline,
        judge=judge,
        win=float(np.mean(judged > 0.5)) if n else None,
        tie=float(np.mean(judged == 0.5)) if n else None,
        loss=float(np.mean(judged < 0.5)) if n else None,
        win_rate=None if estimate.value is None else float(exact_ties(estimate.value)),
        standard_error=estimate.standard_error,
        ci_low=estimate.ci_low,
        ci_high=estimate.ci_high,
        p_value=permutation_test(judged, seed=seed),
        n_prompts=n_prompts,
        n_judged=n,
        n_failed=max(n_failed, n_prompts - n),
        sign_test_p=sign_test(judged),
        detectable_effect=detectable_effect(judged),
        n_tied=int(np.sum(judged == 0.5)),
    )


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths of K policies: P(i beats j) = sigmoid(log_strength[i] - log_strength[j]). Their mean is 0.

    A policy without a judged comparison has None. All are None where another policy, or a group of policies, never lost
    or never won against the others: the maximum likelihood is infinite then. The intervals are None where this holds in
    more than (1-confidence)/2 of the resamples, and where the resamples do not differ, as those of a single prompt.
    ``win_rate`` is the fitted mean probability of beating the other policies.
    """

    policies: tuple[str, ...]
    log_strength: tuple[float | None, ...]
    ci_low: tuple[float | None, ...]
    ci_high: tuple[float | None, ...]
    win_rate: tuple[float | None, ...]
    n: int


def bradley_terry(
    prompt_ids: Sequence[object] | NDArray[np.generic],
    policy: Sequence[str],
    baseline: Sequence[str],
    preferences: ArrayLike,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BradleyTerry:
    """Bradley-Terry maximum likelihood over any number of policies, with percentile intervals from resampled prompts.

    Row m says that on ``prompt_ids[m]`` ``policy[m]`` was preferred to ``baseline[m]`` with ``preferences[m]`` in
    [0, 1]. A tie is half a win for each. NaN rows are left out.

    Raises:
        DataError: rows of different lengths, no judged row, or a policy compared with itself.
    """
    check_settings(n_resamples, confidence)
    values = checked_preferences(preferences)
    if not len(values) == len(policy) == len(baseline) == len(prompt_ids):
        raise DataError("every comparison needs a prompt, a policy and a baseline", where="bradley_terry")
    judged = ~np.isnan(values)
    if not judged.any():
        raise DataError("no judged comparison", where="bradley_terry")
    names = sorted(set(policy) | set(baseline))
    if same := [name for name, other, known in zip(policy, baseline, judged, strict=True) if known and name == other]:
        raise DataError(f"{same[0]!r} is compared with itself", where="bradley_terry")
    fitted = sorted({name for pair in (policy, baseline) for name, known in zip(pair, judged, strict=True) if known})
    number = {name: k for k, name in enumerate(fitted)}
    i, j = (
        np.array([number[name] for name, known in zip(side, judged, strict=True) if known])
        for side in (policy, baseline)
    )
    _, prompt = np.unique(np.asarray(prompt_ids)[judged], return_inverse=True)
    n, k = int(prompt.max()) + 1, len(fitted)
    wins_NKK = np.zeros((n, k, k))
    np.add.at(wins_NKK, (prompt, i, j), values[judged])
    np.add.at(wins_NKK, (prompt, j, i), 1.0 - values[judged])

    point = _bradley_terry_mle(wins_NKK.sum(axis=0)[None])[0]
    none: tuple[float | None, ...] = (None,) * len(names)
    if np.isnan(point).any():
        return BradleyTerry(tuple(names), none, none, none, none, n)

    def of_names(values_K: Floats) -> tuple[float | None, ...]:
        values = {name: float(value) for name, value in zip(fitted, values_K, strict=True) if not np.isnan(value)}
        return tuple(values.get(name) for name in names)

    chunks = resample_counts(n, n_resamples, seed)
    draws_BK = np.concatenate([_bradley_terry_mle((c @ wins_NKK.reshape(n, -1)).reshape(-1, k, k)) for c in chunks])
    finite = ~np.isnan(draws_BK).any(axis=1)
    low = high = none
    alpha = (1.0 - confidence) / 2.0
    if np.mean(~finite) <= alpha:
        edges = np.quantile(draws_BK[finite], [alpha, 1.0 - alpha], axis=0)
        edges[:, np.ptp(draws_BK[finite], axis=0) < _NEWTON] = np.nan
        low, high = of_names(edges[0]), of_names(edges[1])
    beats = expit(point[:, None] - point[None, :])
    mean_win = (beats.sum(axis=1) - 0.5) / (k - 1)
    return BradleyTerry(tuple(names), of_names(point), low, high, of_names(mean_win), n)


def _bradley_terry_mle(wins_BKK: Floats) -> Floats:
    """Log strengths (B, K) with mean 0 by Newton's method. Rows without a finite maximum are NaN.

    The maximum is finite where every policy is reachable from every other along "won at least partly against" (Ford
    1957).
    """
    size = wins_BKK.shape[1]
    theta_BK = np.zeros(wins_BKK.shape[:2])
    regular = np.array([connected_components(w > 0, directed=True, connection="strong")[0] == 1 for w in wins_BKK])
    theta_BK[~regular] = np.nan
    wins_BKK = wins_BKK[regular]
    games_BKK = wins_BKK + wins_BKK.transpose(0, 2, 1)
    theta = np.zeros((len(wins_BKK), size))
    for _ in range(100):
        p_BKK = expit(theta[:, :, None] - theta[:, None, :])
        gradient = (wins_BKK - games_BKK * p_BKK).sum(axis=2)
        curvature = games_BKK * p_BKK * (1.0 - p_BKK)
        # the likelihood ignores a common shift: adding ones @ ones.T fixes the mean at 0 and changes nothing else
        hessian = -curvature + 1.0
        hessian[:, np.arange(size), np.arange(size)] += curvature.sum(axis=2)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        theta += np.clip(step, -1.0, 1.0)
        if len(step) == 0 or np.abs(step).max() < 1e-10:
            break
    else:
        raise ArithmeticError("Bradley-Terry did not converge in 100 Newton steps")
    theta_BK[regular] = theta - theta.mean(axis=1, keepdims=True)
    return theta_BK
