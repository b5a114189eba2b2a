"""Reward against distance from the reference policy: the over-optimisation curves of Gao et al. 2022 (2210.10760)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from toolkit.errors import DataError


def best_of_n_kl(n: int) -> float:
    """Upper bound, in nats, of KL(best-of-n || reference): ln n - (n-1)/n (2210.10760).

    Raises:
        DataError: n < 1.
    """
    if n < 1:
        raise DataError(f"best of {n}", where="best_of_n_kl", fix="n is at least 1")
    return float(np.log(n) - (n - 1) / n)


def fit_overoptimization(kl_nats: ArrayLike, reward: ArrayLike, *, kind: str) -> dict[str, float | int | str | None]:
    """Fit the reward R above that of the reference policy to d = sqrt(KL) by least squares.

    With ``kind`` "bon" the curve is R = d(a - b d), which peaks at d = a/(2b). With "rl" it is R = d(a - b ln d), which
    peaks at d = exp(a/b - 1). Returns kind, a, b, r2 (about the mean; None where the reward does not vary),
    ``peak_kl_nats`` and ``peak_reward`` (None where a <= 0 or b <= 0: the curve has no peak), and n. All but kind and n
    are None for fewer than 3 points with KL > 0, or where they all have the same KL.

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
    # at KL = 0 both curves are 0 whatever a and b are, so such a point carries no information
    kl, r = kl[kl > 0.0], r[kl > 0.0]
    empty: dict[str, float | int | str | None] = dict.fromkeys(("a", "b", "r2", "peak_kl_nats", "peak_reward"))
    if len(kl) < 3 or np.ptp(kl) <= 1e-9 * kl.max():
        return {"kind": kind, **empty, "n": len(kl)}
    d = np.sqrt(kl)
    design = np.column_stack([d, -d * d if kind == "bon" else -d * np.log(d)])
    (a, b), *_ = np.linalg.lstsq(design, r, rcond=None)
    residual, spread = float(np.sum((r - design @ (a, b)) ** 2)), float(np.sum((r - r.mean()) ** 2))
    peak_kl = peak_reward = None
    if b > 0.0 and a > 0.0:
        peak_d = float(a / (2 * b)) if kind == "bon" else float(np.exp(min(a / b - 1.0, 300.0)))
        peak_kl = peak_d**2
        peak_reward = float(peak_d * (a - b * (peak_d if kind == "bon" else np.log(peak_d))))
    return {
        "kind": kind,
        "a": float(a),
        "b": float(b),
        "r2": 1.0 - residual / spread if spread > 0.0 else None,
        "peak_kl_nats": peak_kl,
        "peak_reward": peak_reward,
        "n": len(kl),
    }


def overoptimization(
    rows: Sequence[Mapping[str, object]], *, kl: str = "kl_nats", reward: str = "reward", kind: str = "kind"
) -> dict[str, object]:
    """A fit for every kind of curve among ``rows``, and the rows unchanged.

    A row is one policy or checkpoint with its KL to the reference in nats, its reward above that of the reference, and
    its kind ("bon" or "rl"). ``kl``, ``reward`` and ``kind`` name these columns. Returns ``{"rows": [...], "fits":
    {kind: fit or None}}``; the fit is None for a kind with fewer than 3 usable points.
    """
    fits: dict[str, dict[str, float | int | str | None] | None] = {}
    for name in dict.fromkeys(str(row[kind]) for row in rows):
        points = [r for r in rows if str(r[kind]) == name and r[kl] is not None and r[reward] is not None]
        fit = fit_overoptimization(
            np.array([row[kl] for row in points], dtype=np.float64),
            np.array([row[reward] for row in points], dtype=np.float64),
            kind=name,
        )
        fits[name] = fit if fit["a"] is not None else None
    return {"rows": [dict(row) for row in rows], "fits": fits}
