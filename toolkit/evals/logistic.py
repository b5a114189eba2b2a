"""Weighted, penalised logistic regressions, many at once: the bootstrap of a fitted win rate refits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from toolkit.evals.intervals import Floats

# Rows from which the fits of resamples take equal rows as one and start at the fit of all rows. With fewer rows that
# spares no time that matters, and recorded results keep their last digits.
MANY_ROWS = 4096


@dataclass(frozen=True)
class Block:
    """Rows of a weighted logistic regression, for B regressions at once.

    ``first`` (N,) or (B, N) is feature 0, which may differ between the regressions. ``shared`` (K-1, N) holds the other
    features, which all of them have. ``weights`` are (N,) or (B, N). ``targets`` (N,) are probabilities.
    """

    first: Floats
    shared: Floats
    weights: Floats
    targets: Floats

    def of(self, regressions: NDArray[np.intp]) -> Block:
        """The same rows for some of the B regressions."""
        first = self.first if self.first.ndim == 1 else self.first[regressions]
        weights = self.weights if self.weights.ndim == 1 else self.weights[regressions]
        return Block(first, self.shared, weights, self.targets)


@dataclass(frozen=True)
class DistinctRows:
    """The distinct ones of n rows: the columns' values, (G,) each, and which of them each row is, (n,).

    ``kind_N`` is None where no more than half of the rows repeat others: the columns are those that were given.
    """

    columns: tuple[Floats, ...]
    kind_N: NDArray[np.integer[Any]] | None

    @classmethod
    def of(cls, *columns: Floats) -> DistinctRows:
        kind_N = np.zeros(len(columns[0]), dtype=np.int64)
        for column in columns:
            values, index_N = np.unique(column, return_inverse=True)
            kind_N = np.unique(kind_N * len(values) + index_N, return_inverse=True)[1]
        _, first = np.unique(kind_N, return_index=True)
        if 2 * len(first) > len(kind_N):
            return cls(columns, None)
        small = kind_N.astype(np.min_scalar_type(len(first)))  # of which more stay in the processor's cache
        return cls(tuple(column[first] for column in columns), small)


def fit_l1_logistic(blocks: Sequence[Block], start_BK: Floats, c_B: Floats, tolerance: float) -> Floats:
    """B logistic regressions without intercept: argmin |b|_1 + C * sum w * logloss (liblinear's objective).

    Proximal Newton: each step minimises the quadratic model plus the penalty. A fit ends after its first step that is
    shorter than ``tolerance``; the other fits go on without it.

    Raises:
        ArithmeticError: no convergence in 200 steps.
    """
    beta_BK = start_BK.copy()
    constant_BK = _linear_part(blocks, len(beta_BK))
    active = np.arange(len(beta_BK))
    for _ in range(200):
        everything = len(active) == len(beta_BK)
        current = blocks if everything else [block.of(active) for block in blocks]
        gradient, hessian = _derivatives(current, beta_BK[active])
        step = _proximal_step(beta_BK[active], gradient - constant_BK[active], hessian, 1.0 / c_B[active])
        beta_BK[active] += np.clip(step, -2.0, 2.0)
        active = active[np.abs(step).max(axis=1) >= tolerance]
        if len(active) == 0:
            return beta_BK
    raise ArithmeticError("the regression did not converge in 200 Newton steps")


def refit_l2_logistic(block: Block, start_K: Floats, ridge_K: Floats) -> Floats:
    """B logistic regressions on resamples of many rows, (B, K): :func:`fit_l2_logistic` from the fit of all rows.

    That fit, ``start_K``, is near those of the resamples, and Newton's method converges quadratically: after a step of
    1e-4 the coefficients are within about 1e-8.

    Raises:
        ArithmeticError: no convergence in 100 steps.
    """
    start_BK = np.tile(start_K, (len(block.weights), 1))
    constant_BK = _linear_part([block], len(start_BK))

    def derivatives(beta_BK: Floats) -> tuple[Floats, Floats]:
        gradient, hessian = _derivatives([block], beta_BK)
        return gradient - constant_BK, hessian

    return _ridge_newton(derivatives, start_BK, ridge_K, 1e-4)


def _ridge_newton(
    derivatives: Callable[[Floats], tuple[Floats, Floats]], start_BK: Floats, ridge_K: Floats, tolerance: float
) -> Floats:
    """argmin sum ridge * b^2 / 2 + the loss with these derivatives (B, K) and (B, K, K), from ``start_BK``, in place.

    Raises ArithmeticError where 100 steps do not converge.
    """
    beta_BK = start_BK
    for iteration in range(100):
        gradient, hessian = derivatives(beta_BK)
        slope_BK1 = (gradient + beta_BK * ridge_K)[:, :, None]
        step = -np.asarray(np.linalg.solve(hessian + np.diag(ridge_K), slope_BK1), dtype=np.float64)[:, :, 0]
        # far from the optimum of separable data a whole step may overshoot for ever; half a step does not
        beta_BK += np.clip(step, -2.0, 2.0) * (1.0 if iteration < 20 else 0.5)
        if np.abs(step).max() < tolerance:
            return beta_BK
    raise ArithmeticError("the regression did not converge in 100 Newton steps")


def _linear_part(blocks: Sequence[Block], b: int) -> Floats:
    """Sum of w*y*x (B, K): the part of the gradient that does not depend on the coefficients."""
    total: Floats = np.zeros((b, len(blocks[0].shared) + 1), dtype=np.float64)
    for block in blocks:
        weighted = block.weights * block.targets
        total[:, 0] += (weighted * block.first).sum(axis=-1)
        total[:, 1:] += weighted @ block.shared.T
    return total


def _derivatives(blocks: Sequence[Block], beta_BK: Floats) -> tuple[Floats, Floats]:
    """Sum of w*p*x (B, K), and the Hessian sum of w*p*(1-p)*x*x' (B, K, K)."""
    b, k = beta_BK.shape
    gradient, hessian = np.zeros((b, k)), np.zeros((b, k, k))
    for block in blocks:
        eta = beta_BK[:, 1:] @ block.shared
        eta += beta_BK[:, :1] * block.first
        np.negative(eta, out=eta)
        with np.errstate(over="ignore"):  # exp(-eta) = inf gives p = 0, which is right
            np.exp(eta, out=eta)
        eta += 1.0
        p = np.reciprocal(eta, out=eta)
        weighted = block.weights * p
        if block.first.ndim == 1:
            gradient[:, 0] += weighted @ block.first
        else:
            gradient[:, 0] += np.einsum("bn,bn->b", weighted, block.first)
        gradient[:, 1:] += weighted @ block.shared.T
        p *= weighted
        curvature = np.subtract(weighted, p, out=weighted)
        for i in range(1, k):
            for j in range(i, k):
                hessian[:, i, j] += curvature @ (block.shared[i - 1] * block.shared[j - 1])
        if block.first.ndim == 1:
            hessian[:, 0, 0] += curvature @ block.first**2
            hessian[:, 0, 1:] += curvature @ (block.first * block.shared).T
        else:
            curvature *= block.first
            hessian[:, 0, 0] += np.einsum("bn,bn->b", curvature, block.first)
            hessian[:, 0, 1:] += curvature @ block.shared.T
    upper = np.triu(np.ones((k, k)), 1).astype(bool)
    hessian.transpose(0, 2, 1)[:, upper] = hessian[:, upper]
    return gradient, hessian


def _proximal_step(beta_BK: Floats, gradient_BK: Floats, hessian_BKK: Floats, penalty_B: Floats) -> Floats:
    """argmin_d gradient.d + d.H.d/2 + penalty*|beta + d|_1 for each of the B problems.

    Where no coefficient changes its sign this is one linear solve. The other problems go through coordinate descent.
    """
    k = beta_BK.shape[1]
    hessian_BKK = hessian_BKK + 1e-10 * np.eye(k)  # keeps a feature that is 0 everywhere solvable
    sign = np.sign(beta_BK)
    slope_BK1 = (gradient_BK + penalty_B[:, None] * sign)[:, :, None]
    step = -np.asarray(np.linalg.solve(hessian_BKK, slope_BK1), dtype=np.float64)[:, :, 0]
    rest = np.flatnonzero(((sign == 0.0) | (np.sign(beta_BK + step) != sign)).any(axis=1))
    if len(rest) == 0:
        return step
    h, g, b, penalty = hessian_BKK[rest], gradient_BK[rest], beta_BK[rest], penalty_B[rest]
    d = np.zeros_like(b)
    for _ in range(500):
        moved = 0.0
        for i in range(k):
            slope = g[:, i] + np.einsum("bk,bk->b", h[:, i], d)
            target = b[:, i] + d[:, i] - slope / h[:, i, i]
            shrunk = np.sign(target) * np.maximum(np.abs(target) - penalty / h[:, i, i], 0.0)
            change = shrunk - b[:, i] - d[:, i]
            d[:, i] += change
            moved = max(moved, float(np.abs(change).max()))
        if moved < 1e-12:
            break
    step[rest] = d
    return step


def fit_l2_logistic(x: Floats, targets_N: Floats, weights_BN: Floats, ridge_K: Floats, tolerance: float) -> Floats:
    """B logistic regressions, (B, K): argmin sum ridge * b^2 / 2 + sum w * logloss, by Newton's method.

    ``x`` are the features, (N, K), or (B, N, K) where they differ between the regressions. ``ridge_K`` is each
    coefficient's own penalty.

    Raises:
        ArithmeticError: no convergence in 100 steps.
    """

    def derivatives(beta_BK: Floats) -> tuple[Floats, Floats]:
        eta_BN = beta_BK @ x.T if x.ndim == 2 else np.einsum("bnk,bk->bn", x, beta_BK)
        p_BN = expit(eta_BN)
        residual_BN, curvature_BN = weights_BN * (p_BN - targets_N), weights_BN * p_BN * (1.0 - p_BN)
        if x.ndim == 2:
            return residual_BN @ x, np.einsum("bn,nk,nl->bkl", curvature_BN, x, x, optimize=True)
        hessian = (curvature_BN[:, :, None] * x).transpose(0, 2, 1) @ x
        return np.einsum("bn,bnk->bk", residual_BN, x), hessian

    return _ridge_newton(derivatives, np.zeros((len(weights_BN), x.shape[-1])), ridge_K, tolerance)
