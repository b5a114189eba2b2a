"""The comparison of two arms' policies on the same prompts, every seed of one with every seed of the other.

A win is 1, a tie 1/2. All pairs of seeds are compared, and not equal seeds alone: the arms may have different seeds,
and the mean over all pairs wastes none of them. Where equal seeds share something (an SFT policy), their common part
would cancel in a comparison of equal seeds; the intervals here do not count on it, and are a little wide then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from toolkit.evals.intervals import Floats
from toolkit.evals.study.crossed import CONFIDENCE, CrossedMean, crossed_means

_BLOCK = 1 << 21  # comparisons held at once: 16 MiB


class Row(TypedDict):
    """The win rate of RM + PPO over DPO, its interval, and P(RM + PPO is better)."""

    win_rate: float | None
    ci_low: float | None
    ci_high: float | None
    probability: float | None


def win_shares(first_JPKN: Floats, second_JQLN: Floats) -> Floats:
    """Shares of judges that score the first policy above the second, ties half: (P, Q, K, L, N).

    K and L are the seeds of the two arms, P and Q their policies.
    """
    return np.asarray(
        sum(
            0.5 + 0.5 * np.sign(first[:, None, :, None] - second[None, :, None, :])
            for first, second in zip(first_JPKN, second_JQLN, strict=True)
        )
        / len(first_JPKN)
    )


def unseen_shares(first_JPKN: Floats, second_JQLN: Floats, indirect_J: NDArray[np.bool_]) -> Floats:
    """Shares of judges that are ``indirect_J`` and give both policies the same: (P, Q, K, L, N).

    An indirect judge compares each policy with a third one, and where both win, or both lose, it says nothing of the
    two. Such a tie is not one that a judge saw.
    """
    shape = np.broadcast_shapes(first_JPKN[0][:, None, :, None].shape, second_JQLN[0][None, :, None, :].shape)
    ties = np.zeros(shape)
    for j in np.flatnonzero(indirect_J):
        ties += first_JPKN[j][:, None, :, None] == second_JQLN[j][None, :, None, :]
    return ties / len(first_JPKN)


def mixed_wins(
    first_JPKN: Floats,
    second_JQLN: Floats,
    first_GKP: Floats,
    second_GLQ: Floats,
    grid_G: Floats,
    indirect_J: NDArray[np.bool_] | None = None,
) -> CrossedMean:
    """The mean over a grid of the win rate between mixtures of each arm's policies.

    ``first_GKP`` and ``second_GLQ`` are the policies' weights at each point of the grid, for each seed; ``grid_G`` are
    the weights of the points. A mixture draws a policy by its weight, so that its win rate is linear in the weights.
    """
    weights = np.einsum("g,gkp,glq->klpq", grid_G, first_GKP, second_GLQ, optimize=True)
    blocks = [
        np.einsum("klpq,pqkln->kln", weights, win_shares(first, second), optimize=True)
        for first, second in _blocks(first_JPKN, second_JQLN, 1)
    ]
    wins_KLN = np.concatenate(blocks, axis=-1)
    mean = crossed_means(wins_KLN.mean(axis=1)[None], wins_KLN.mean(axis=0)[None])[0]
    if indirect_J is None or not indirect_J.any():
        return mean
    ties = [
        np.einsum("klpq,pqkln->kln", weights, unseen_shares(first, second, indirect_J), optimize=True)
        for first, second in _blocks(first_JPKN, second_JQLN, 1)
    ]
    return replace(mean, unseen=float(np.concatenate(ties, axis=-1).mean()))


def wins_along(first_JPKN: Floats, second_JQLN: Floats, first_GKP: Floats, second_GLQ: Floats) -> list[CrossedMean]:
    """As :func:`mixed_wins`, for each point of the grid by itself."""
    by_first, by_second = [], []
    for first, second in _blocks(first_JPKN, second_JQLN, len(first_GKP)):
        against = np.einsum("glq,pqkln->gpkln", second_GLQ, win_shares(first, second), optimize=True)
        wins_GKLN = np.einsum("gkp,gpkln->gkln", first_GKP, against, optimize=True)
        by_first.append(wins_GKLN.mean(axis=2))
        by_second.append(wins_GKLN.mean(axis=1))
    return crossed_means(np.concatenate(by_first, axis=-1), np.concatenate(by_second, axis=-1))


def _blocks(first_JPKN: Floats, second_JQLN: Floats, n_grid: int) -> Iterator[tuple[Floats, Floats]]:
    """Both arms' scores on a few prompts at a time, so that all pairs of policies and seeds fit into memory."""
    _, p, k, n = first_JPKN.shape
    _, q, seeds, _ = second_JQLN.shape
    size = max(1, _BLOCK // (p * k * seeds * max(q, n_grid)))
    for start in range(0, n, size):
        yield first_JPKN[..., start : start + size], second_JQLN[..., start : start + size]


def win_row(mean: CrossedMean | None) -> Row:
    if mean is None:
        return {"win_rate": None, "ci_low": None, "ci_high": None, "probability": None}
    low, high = mean.interval(CONFIDENCE, (0.0, 1.0))
    return {"win_rate": mean.value, "ci_low": low, "ci_high": high, "probability": mean.probability_above(0.5)}


def score_row(mean: CrossedMean) -> dict[str, float | None]:
    """A mean score with its interval."""
    low, high = mean.interval()
    return {"score": mean.value, "ci_low": low, "ci_high": high}
