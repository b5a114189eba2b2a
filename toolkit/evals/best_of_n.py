"""Best of n from one pool: the expected value of what a score picks among n, for every n up to the pool's size.

The pools are the responses to a prompt, picked by a reward and valued by another measure, or the trials of a study,
picked on dev prompts and valued on test prompts. The pick and the value come apart so that a lucky pick does not raise
the value. Dodge et al. 2019 ("Show Your Work", 1909.03004) estimate the expected maximum with replacement, which is
biased downwards. The estimator here is without replacement, which is unbiased (Tang et al. 2020, "Showing Your Work
Doesn't Always Work", 2004.13705; Nakano et al. 2021, "WebGPT", 2112.09332, appendix I).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import comb, xlogy

from toolkit.errors import DataError
from toolkit.evals.intervals import BootstrapOptions, Estimate, Floats, bootstrap_mean

MAX_N = 64


def best_of_n_weights(scores_T: Floats, n_max: int | None = None) -> Floats:
    """The probability (n, T) that each of T candidates is the best of n = 1..n_max drawn without replacement.

    The candidate of rank r (1 is the worst) is the best of n with probability C(r - 1, n - 1) / C(T, n). Candidates
    with equal scores have equal probabilities.

    >>> best_of_n_weights(np.array([0.3, 0.1, 0.2])).round(3).tolist()
    [[0.333, 0.333, 0.333], [0.667, 0.0, 0.333], [1.0, 0.0, 0.0]]
    """
    t = len(scores_T)
    n = np.arange(1, (n_max or t) + 1)[:, None]
    order = np.argsort(scores_T, kind="stable")
    weights_NT = np.empty((len(n), t))
    weights_NT[:, order] = comb(np.arange(t)[None], n - 1) / comb(t, n)
    for value in np.unique(scores_T):
        tied = scores_T == value
        weights_NT[:, tied] = weights_NT[:, tied].mean(axis=1, keepdims=True)
    return weights_NT


@dataclass(frozen=True)
class BestOfN:
    """The mean ``value`` over prompts of the response that is the best of n. KL in nats from the sampling policy.

    ``kl_nats`` is the upper bound ln n - (n-1)/n, or the exact KL where ``kl_exact`` says so.
    """

    n: int
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n_prompts: int
    kl_nats: float
    kl_exact: bool

    def as_dict(self) -> dict[str, float | int | bool | None]:
        return asdict(self)


def best_of_n_curve(
    rewards: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    n_max: int,
    *,
    exact_kl_nats: Sequence[float] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[BestOfN]:
    """The best of n = 1, 2, 4, ... and n_max by a reward, for one pool of samples (K,) a prompt.

    ``rewards`` picks and ``values`` measures: the same array gives the expected maximum. Each n is the mean over all
    subsets of n samples, so that one pool serves every n without bias; samples of equal reward are picked with equal
    probability. The interval is over prompts. ``exact_kl_nats[n - 1]`` replaces the bound where it is known
    (:func:`exact_best_of_n_kl`).

    Raises:
        DataError: no prompt, a pool of fewer than n_max samples, values that do not match or are not finite, an n_max
            outside 1..64.
    """
    if not 1 <= n_max <= MAX_N:
        raise DataError(f"best of {n_max}", where="best of n", fix=f"n is between 1 and {MAX_N}")
    if not len(rewards):
        raise DataError("there is no pool of samples", where="best of n")
    by_prompt = np.stack(
        [_of_pool(p, *pool, n_max) for p, pool in enumerate(zip(rewards, values, strict=True))], axis=1
    )
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    curve = []
    for n in sizes(n_max):
        mean: Estimate = bootstrap_mean(by_prompt[n - 1], **options)
        kl = best_of_n_kl(n) if exact_kl_nats is None else float(exact_kl_nats[n - 1])
        curve.append(BestOfN(n, mean.value, mean.ci_low, mean.ci_high, mean.n, kl, exact_kl_nats is not None))
    return curve


def sizes(n_max: int) -> list[int]:
    """The powers of two up to n_max, and n_max.

    >>> sizes(6)
    [1, 2, 4, 6]
    """
    return sorted({2**k for k in range(n_max.bit_length())} | {n_max})


def _of_pool(prompt: int, rewards: ArrayLike, values: ArrayLike, n_max: int) -> Floats:
    """(n_max,) the value of the best of n = 1..n_max of one pool."""
    rewards_K, values_K = np.asarray(rewards, dtype=np.float64), np.asarray(values, dtype=np.float64)
    where = f"prompt {prompt}"
    if rewards_K.ndim != 1 or rewards_K.shape != values_K.shape:
        raise DataError(f"{rewards_K.shape} rewards and {values_K.shape} values", where=where)
    if not (np.isfinite(rewards_K).all() and np.isfinite(values_K).all()):
        raise DataError("a reward or a value is not finite", where=where)
    if len(rewards_K) < n_max:
        raise DataError(
            f"best of {n_max} from a pool of {len(rewards_K)} samples",
            where=where,
            fix=f"sample at least {n_max} responses to each prompt, or ask for a smaller n",
        )
    return np.asarray(best_of_n_weights(rewards_K, n_max) @ values_K)


# ---------------------------------------------------------------- the distance


def best_of_n_kl(n: int) -> float:
    """Upper bound, in nats, of KL(best-of-n || reference): ln n - (n-1)/n (2210.10760; a bound: 2401.01879, theorem 1).

    Raises:
        DataError: n < 1.
    """
    if n < 1:
        raise DataError(f"best of {n}", where="best_of_n_kl", fix="n is at least 1")
    return float(np.log(n) - (n - 1) / n)


def exact_best_of_n_kl(probabilities_Y: ArrayLike, rewards_Y: ArrayLike, n: int) -> float:
    """KL(best-of-n || policy), in nats, of a policy whose responses and their probabilities are all known.

    n responses are drawn with replacement, and equally good ones are picked with equal probability. A response among
    those of one reward, which is exceeded by a share 1 - F and at least reached by a share 1 - F' of all, gains the
    factor (F^n - F'^n) / (F - F') over its own probability. The bound is approached where each response is rare.

    >>> round(exact_best_of_n_kl([0.5, 0.5], [0.0, 1.0], 2), 4)  # 1/4 ln 1/2 + 3/4 ln 3/2
    0.1308

    Raises:
        DataError: n < 1, or probabilities that are no distribution over the rewards.
    """
    p_Y, rewards_Y = np.asarray(probabilities_Y, dtype=np.float64), np.asarray(rewards_Y, dtype=np.float64)
    if n < 1:
        raise DataError(f"best of {n}", where="exact_best_of_n_kl", fix="n is at least 1")
    if p_Y.ndim != 1 or p_Y.shape != rewards_Y.shape or not np.isfinite(rewards_Y).all():
        raise DataError("every response needs a probability and a finite reward", where="exact_best_of_n_kl")
    if not ((p_Y >= 0.0).all() and abs(p_Y.sum() - 1.0) < 1e-6):
        raise DataError(f"the probabilities sum to {p_Y.sum():g}", where="exact_best_of_n_kl")
    _, tier = np.unique(rewards_Y, return_inverse=True)
    mass_T = np.bincount(tier, weights=p_Y) / p_Y.sum()
    cumulated_T = np.minimum(np.cumsum(mass_T), 1.0)
    cumulated_T[-1] = 1.0
    picked_T = np.diff(cumulated_T**n, prepend=0.0)
    mass_T = np.diff(cumulated_T, prepend=0.0)
    present = mass_T > 0.0
    return max(float(np.sum(xlogy(picked_T[present], picked_T[present] / mass_T[present]))), 0.0)
