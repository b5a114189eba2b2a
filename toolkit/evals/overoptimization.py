"""Reward against distance from the reference policy: the over-optimisation curves of Gao et al. 2022 (2210.10760)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import xlogy

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats, resample_counts

MIN_POINTS = 4
"""Two parameters go through any two points, and leave one degree of freedom at three."""
STILL_NATS = 0.05
"""A policy nearer to SFT than this, in nats per response, writes almost what SFT writes."""
Fit = dict[str, float | int | str | None]


def fit_overoptimization(kl_nats: ArrayLike, reward: ArrayLike, *, kind: str) -> Fit:
    """Fit the reward R above that of the reference policy to d = sqrt(KL) by least squares.

    With ``kind`` "bon" the curve is R = d(a - b d), which peaks at d = a/(2b). With "rl" it is R = d(a - b ln d), which
    peaks at d = exp(a/b - 1). Returns kind, a, b, r2 (about the mean; None where the reward does not vary),
    ``peak_kl_nats`` and ``peak_reward`` (None where b <= 0: the curve never turns down), and n. Where a <= 0
    and b > 0 the reward falls almost from the start: "bon" peaks at 0, "rl" at exp(-2) = 0.135 nats or nearer. All but
    kind and n are None for fewer than 4 points that are away from the reference, or where they all have the same KL.
    Points within ``STILL_NATS`` of the reference are left out.

    Raises:
        DataError: an unknown kind, arrays that do not match, a KL that is negative or not finite.
    """
    kl, r = np.asarray(kl_nats, dtype=np.float64), np.asarray(reward, dtype=np.float64)
    if kind not in ("bon", "rl"):
        raise DataError(f"unknown kind of curve {kind!r}", where="over-optimisation", fix="bon or rl")
    if kl.shape != r.shape or kl.ndim != 1 or not np.all(np.isfinite(kl)) or not np.all(np.isfinite(r)):
        raise DataError("every point needs a finite KL and a finite reward", where=f"{kl.shape} and {r.shape}")
    if np.any(kl < 0.0):
        raise DataError(
            f"KL {kl.min():g} is negative",
            where="over-optimisation",
            fix="use an estimate of the KL that is at least 0",
        )
    # near KL = 0 both curves are 0 whatever a and b are, so such a point says nothing about them
    away = kl > STILL_NATS
    kl, r = kl[away], r[away]
    empty: Fit = dict.fromkeys(("a", "b", "r2", "peak_kl_nats", "peak_reward"))
    if len(kl) < MIN_POINTS or np.ptp(kl) <= 1e-9 * kl.max():
        return {"kind": kind, **empty, "n": len(kl)}
    d = np.sqrt(kl)
    design = np.column_stack([d, -d * d if kind == "bon" else -d * np.log(d)])
    (a, b), *_ = np.linalg.lstsq(design, r, rcond=None)
    residual, spread = float(np.sum((r - design @ (a, b)) ** 2)), float(np.sum((r - r.mean()) ** 2))
    peak_kl = peak_reward = None
    if b > 0.0:
        peak_d = max(float(a / (2 * b)), 0.0) if kind == "bon" else float(np.exp(min(a / b - 1.0, 300.0)))
        peak_kl = peak_d**2
        peak_reward = float(a * peak_d - b * (peak_d**2 if kind == "bon" else xlogy(peak_d, peak_d)))
    return {
        "kind": kind,
        "a": float(a),
        "b": float(b),
        "r2": 1.0 - residual / spread if spread > 0.0 else None,
        "peak_kl_nats": peak_kl,
        "peak_reward": peak_reward,
        "n": len(kl),
    }


def fit_with_intervals(
    kl_PN: Floats,
    reward_PN: Floats,
    *,
    kind: str,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Fit | None, str | None]:
    """:func:`fit_overoptimization` of P policies on the same N prompts, with percentile intervals over prompts.

    ``kl_PN`` is each policy's KL on each prompt in nats, and ``reward_PN`` its reward above that of the reference. All
    policies are evaluated on the prompts that were drawn, so the interval is of the curve as a whole. The fit gets
    ``*_ci_low`` and ``*_ci_high`` for ``a``, ``b`` and ``peak_kl_nats``; None where the resamples do not bound it: a
    curve that still rises peaks nowhere. Without a fit the reason comes instead.
    """
    kl_P = np.maximum(kl_PN.mean(axis=1), 0.0)  # an estimate near 0 may fall below it
    fit = fit_overoptimization(kl_P, reward_PN.mean(axis=1), kind=kind)
    away_P = kl_P > STILL_NATS
    if fit["a"] is None:
        n = int(np.count_nonzero(away_P))
        if n < MIN_POINTS:
            needed = f"{MIN_POINTS} policies that are more than {STILL_NATS} nats from SFT"
            return None, f"a fit of two parameters takes at least {needed}, and here {n} {'is' if n == 1 else 'are'}"
        return None, "all policies are at the same KL"
    kl_PN, reward_PN = kl_PN[away_P], reward_PN[away_P]
    n_prompts = kl_PN.shape[1]
    draws = [
        _solve(counts @ kl_PN.T / n_prompts, counts @ reward_PN.T / n_prompts, kind)
        for counts in resample_counts(n_prompts, n_resamples, seed)
    ]
    a_B, b_B = (np.concatenate(part) for part in zip(*draws, strict=True))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        peak_d = np.maximum(a_B / (2.0 * b_B), 0.0) if kind == "bon" else np.exp(a_B / b_B - 1.0)
        peak_B = np.where(b_B <= 0.0, np.inf, peak_d**2)
    for name, values_B in (("a", a_B), ("b", b_B), ("peak_kl_nats", peak_B)):
        fit[f"{name}_ci_low"], fit[f"{name}_ci_high"] = _bounds(values_B, a_B, n_prompts, confidence)
    return fit, None


def _solve(kl_BP: Floats, reward_BP: Floats, kind: str) -> tuple[Floats, Floats]:
    """Least squares of each row by the normal equations: a (B,) and b (B,), NaN where a row does not determine them."""
    d = np.sqrt(np.maximum(kl_BP, 0.0))
    x, y = d, -d * d if kind == "bon" else -xlogy(d, d)
    xx, yy, xy = (np.sum(u * v, axis=1) for u, v in ((x, x), (y, y), (x, y)))
    xr, yr = np.sum(x * reward_BP, axis=1), np.sum(y * reward_BP, axis=1)
    determinant = xx * yy - xy * xy
    known = determinant > 1e-12 * xx * yy
    safe = np.where(known, determinant, 1.0)
    a, b = (xr * yy - yr * xy) / safe, (yr * xx - xr * xy) / safe
    return np.where(known, a, np.nan), np.where(known, b, np.nan)


def _bounds(
    values_B: Floats, defined_B: Floats, n_prompts: int, confidence: float
) -> tuple[float | None, float | None]:
    """The percentile interval; a bound that is infinite is None, and so are both where too many draws have no fit."""
    defined = ~np.isnan(defined_B)
    if n_prompts < 2 or np.count_nonzero(~defined) > 0.01 * len(values_B):
        return None, None
    alpha = (1.0 - confidence) / 2.0
    low, high = np.quantile(values_B[defined], [alpha, 1.0 - alpha], method="nearest")
    return (float(low) if np.isfinite(low) else None), (float(high) if np.isfinite(high) else None)
