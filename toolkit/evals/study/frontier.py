"""What an arm reaches at a KL, or at a cost: its frontier on dev prompts, and interpolation along it on test prompts.

The frontier is the upper concave hull of the arm's policies (all settings and checkpoints) over the square root of KL,
of training tokens or of seconds, by mean score on dev prompts. Test scores have no part in it. Between two neighbours,
the weight of the further one grows linearly in the square root. Gao et al. 2022 (2210.10760) found rewards to be
smooth functions of sqrt(KL), so that a line in sqrt(KL) is off by less than one in KL. A linear rule is monotone
between neighbours, keeps win rates within [0, 1], and leaves the variance of the mean exact; a spline would not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.evals.intervals import Floats

N_GRID = 25
SAME = 0.05
"""Ranges that miss each other by at most this share of the higher value count as one point: equal budgets."""


@dataclass(frozen=True)
class Grid:
    """Points of the range that two arms share, in natural units, with the weights of a mean over the range."""

    x_G: Floats
    weight_G: Floats


def upper_hull(x_P: Floats, score_P: Floats) -> NDArray[np.int64]:
    """Indices of the upper concave hull, from the lowest x to the highest. Of equal x, the highest score counts."""
    hull: list[int] = []
    for i in np.lexsort((-score_P, x_P)):
        if hull and x_P[i] == x_P[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            slope = (score_P[i] - score_P[a]) / (x_P[i] - x_P[a])
            if score_P[b] > score_P[a] + slope * (x_P[b] - x_P[a]):
                break
            hull.pop()
        hull.append(int(i))
    return np.array(hull, dtype=np.int64)


def frontier(x_P: Floats, score_P: Floats, *, until_peak: bool) -> NDArray[np.int64]:
    """Indices of the policies on the frontier. ``until_peak`` leaves out what follows the highest score.

    With a budget of cost nobody has to spend all of it: behind its peak the frontier stays level.
    """
    hull = upper_hull(np.sqrt(x_P), score_P)
    return hull[: int(np.argmax(score_P[hull])) + 1] if until_peak else hull


def shared_grid(first_KP: Floats, second_LQ: Floats) -> Grid | None:
    """The grid over the range that every seed of both arms covers. None where there is no such range."""
    x = (first_KP, second_LQ)
    low = max(float(x_KP.min(axis=1).max()) for x_KP in x)
    high = min(float(x_KP.max(axis=1).min()) for x_KP in x)
    if low > high + SAME * low:
        return None
    if low >= high:
        return Grid(np.array([low]), np.ones(1))
    weight_G = np.ones(N_GRID)
    weight_G[[0, -1]] = 0.5  # the trapezoid rule
    return Grid(np.linspace(low, high, N_GRID), weight_G / weight_G.sum())


def weights_along(x_KH: Floats, grid_G: Floats) -> Floats:
    """Weights (G, K, H) of each seed's H policies at each point: linear in sqrt(x), constant beyond both ends."""
    weights_GKH = np.zeros((len(grid_G), *x_KH.shape))
    at_G, unit = np.sqrt(grid_G), np.eye(x_KH.shape[1])
    for k, x_H in enumerate(np.sqrt(x_KH)):
        order = np.argsort(x_H, kind="stable")
        for h in range(len(x_H)):
            weights_GKH[:, k, h] = np.interp(at_G, x_H[order], unit[h][order])
    return weights_GKH
