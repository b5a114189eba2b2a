"""Whether the chosen and rejected responses of pairs differ in how often something is true, and in length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, ndtri

from toolkit.evals.distinct import first_of_equals
from toolkit.evals.intervals import sums_by_prompt

ALPHA = 0.05


@dataclass(frozen=True)
class Uneven:
    """How often something is true of the first and of the second of a pair: rates over pairs.

    ``n_first_more`` and ``n_second_more`` count prompts. ``p_value`` is that of the exact sign test between the two.
    """

    first_rate: float
    second_rate: float
    n_first_more: int
    n_second_more: int
    p_value: float

    @property
    def first_more(self) -> bool:
        return self.n_first_more > self.n_second_more


def uneven(prompts: ArrayLike, first: ArrayLike, second: ArrayLike, alpha: float = ALPHA) -> Uneven | None:
    """Whether something is true of the ``first`` of pairs more often than of the ``second``, each (n_pairs,).

    None where it may be chance. A sign test over ``prompts`` (n_pairs,), because pairs of one prompt are no independent
    trials. With one pair to a prompt it is McNemar's exact test (1947).

    >>> uneven(range(8), [True] * 7 + [False], [False] * 6 + [True, False]).p_value
    0.03125
    >>> uneven([1] * 6, [True] * 6, [False] * 6)
    """
    first_M, second_M = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    (balance_N,) = sums_by_prompt(np.asarray(prompts), first_M.astype(np.int64) - second_M.astype(np.int64))
    first_more, second_more = int((balance_N > 0.0).sum()), int((balance_N < 0.0).sum())
    if not first_more + second_more:
        return None
    p_value = sign_test(first_more, second_more)
    if p_value > alpha:
        return None
    return Uneven(float(first_M.mean()), float(second_M.mean()), first_more, second_more, p_value)


def sign_test(n_first: int, n_second: int) -> float:
    """Two-sided p-value of the exact sign test: either side is as likely.

    >>> sign_test(6, 0), sign_test(2, 3)
    (0.03125, 1.0)
    """
    return min(1.0, 2.0 * float(bdtr(min(n_first, n_second), n_first + n_second, 0.5)))


def wilson_interval(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of n independent trials. ``share`` * n need not be a whole number.

    >>> [round(bound, 4) for bound in wilson_interval(0.8, 10)]
    [0.4902, 0.9433]
    """
    z = float(ndtri((1.0 + confidence) / 2.0))
    centre = (share + z * z / (2.0 * n)) / (1.0 + z * z / n)
    half = z / (1.0 + z * z / n) * (share * (1.0 - share) / n + z * z / (4.0 * n * n)) ** 0.5
    return centre - half, centre + half


@dataclass(frozen=True)
class LengthBias:
    """What the length alone says about who wins.

    ``accuracy`` is that of the rule that the longer one wins, averaged within prompts. ``difference`` is the mean of
    the winner's length minus the loser's.
    """

    accuracy: float
    ci_low: float
    ci_high: float
    difference: float
    n_prompts: int


def length_bias(prompts: ArrayLike, differences: ArrayLike, confidence: float = 0.95) -> LengthBias | None:
    """From each pair's prompt (a number) and length difference (winner minus loser), each (n_pairs,). None where the
    interval includes 1/2.

    Equal lengths say nothing and are left out of the accuracy. Pairs of one prompt are no independent trials, so a
    prompt counts once.

    >>> length_bias(range(8), [3, 9, 1, 4, 2, 7, 1, 5]).accuracy
    1.0
    >>> length_bias(range(8), [3, -9, 1, -4, 2, -7, 1, 0])
    """
    differences_M = np.asarray(differences, dtype=np.float64)
    unequal = differences_M != 0.0
    if not unequal.any():
        return None
    ids = first_of_equals(np.asarray(prompts))[1][unequal]
    longer, n_pairs = sums_by_prompt(ids, differences_M[unequal] > 0.0, np.ones(len(ids)))
    accuracy, n_prompts = float(np.mean(longer / n_pairs)), len(n_pairs)
    low, high = wilson_interval(accuracy, n_prompts, confidence)
    if low <= 0.5 <= high:
        return None
    return LengthBias(accuracy, low, high, float(differences_M.mean()), n_prompts)
