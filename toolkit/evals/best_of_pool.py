"""The best of n responses that a reward picks out of a larger pool: expected true reward, by all subsets at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from toolkit.errors import DataError
from toolkit.evals.agreement import estimate_dict
from toolkit.evals.best_of_n import MAX_N, best_of_n_kl, best_of_n_weights
from toolkit.evals.intervals import (
    NO_ESTIMATE,
    BootstrapOptions,
    Floats,
    bootstrap_mean,
    bootstrap_share,
    bootstrap_statistic,
    ratio,
    sums_by_prompt,
)


def expected_best(rewards: ArrayLike, gold: ArrayLike, n: int) -> float:
    """Mean gold reward, over all subsets of n, of the response with the highest reward; equal rewards share.

    >>> round(expected_best([3.0, 1.0, 2.0], [10.0, 0.0, 5.0], 2), 4)  # {3, 1} and {3, 2} give 10, {1, 2} gives 5
    8.3333
    """
    values, truth = np.asarray(rewards, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    return float(best_of_n_weights(values, n)[n - 1] @ truth)


def values_of_best_of_n(
    rewards: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    prompt_ids: Sequence[str],
    options: BootstrapOptions,
    *,
    measure: str = "gold",
    most: int | None = None,
) -> list[dict[str, Any]]:
    """Best-of-n for n = 1, 2, 4 ... 64 and the size of the smallest pool, as far as pools reach.

    Every prompt with at least n responses counts. The key ``measure`` has the mean value of the picked response,
    ``gain`` what it has over one drawn at random, and ``share_of_best_gain`` is that gain over the gain of picking by
    the values themselves. ``kl_bound_nats`` is log n - (n - 1) / n, which bounds best-of-n's KL divergence from the
    policy. With ``most`` it is the largest n.

    Raises DataError for a prompt with fewer responses than ``most``, and for one that is not in 1..64.
    """
    sizes = [len(np.asarray(of_prompt)) for of_prompt in rewards]
    if not sizes:
        return []
    if most is not None:
        check_pools(sizes, prompt_ids, most)
    largest = min(MAX_N, min(sizes) if most is None else most)
    wanted = sorted({*(2**k for k in range(7)), largest})
    rows = []
    for n in (n for n in wanted if n <= (max(sizes) if most is None else most)):
        at = [k for k, size in enumerate(sizes) if size >= n]
        picked, best, one = (
            np.array([expected_best(by[k], values[k], size) for k in at])
            for by, size in ((rewards, n), (values, n), (values, 1))
        )
        ids = [prompt_ids[k] for k in at]
        count = np.ones(len(at))
        sums = sums_by_prompt(ids, picked, picked - one, best - one, count)
        mean, gain = (bootstrap_statistic([sums[c], sums[3]], ratio, **options) for c in (0, 1))
        share = bootstrap_statistic([sums[1], sums[2]], _share, **options) if n > 1 else NO_ESTIMATE
        rows.append(
            {
                "n_responses": n,
                "kl_bound_nats": best_of_n_kl(n),
                measure: estimate_dict(mean),
                "gain": estimate_dict(gain),
                "share_of_best_gain": estimate_dict(share),
            }
        )
    return rows


def check_pools(sizes: Sequence[int], prompt_ids: Sequence[str], n: int) -> None:
    """Raises DataError where a prompt has fewer than n responses to pick from, or n is not in 1..64."""
    if not 1 <= n <= MAX_N:
        raise DataError(f"best of {n}", where="--best-of", fix=f"n is between 1 and {MAX_N}")
    few = [k for k, size in enumerate(sizes) if size < n]
    if few:
        raise DataError(
            f"{len(few)} of {len(sizes)} prompts have fewer than {n} responses to pick from; the first has "
            f"{sizes[few[0]]}",
            where=f"--best-of, prompt {prompt_ids[few[0]]}",
            fix=f"sample more (duel simulate --k {n}), or --best-of {min(sizes)}",
        )


def _share(gain: Floats, best: Floats) -> Floats:
    return np.where(best > 0.0, gain / np.where(best > 0.0, best, 1.0), np.nan)


def picks_best_of_four(rewards: ArrayLike, best: int) -> tuple[float, float]:
    """(credit for picking response ``best`` among four, share of ties for the first place with it), over all threes of
    the others. A tie of k responses for the first place gives 1/k, as in RewardBench 2 (arXiv 2506.01937).

    >>> picks_best_of_four([2.0, 1.0, 2.0, 0.0], 0)
    (0.5, 1.0)
    """
    values = np.asarray(rewards, dtype=np.float64)
    others = np.delete(values, best)
    lower, equal = int((others < values[best]).sum()), int((others == values[best]).sum())
    ways = [math.comb(equal, ties) * math.comb(lower, 3 - ties) for ties in range(4)]
    total = math.comb(len(others), 3)
    credit = sum(way / (1 + ties) for ties, way in enumerate(ways)) / total
    return credit, sum(ways[1:]) / total


def best_of_four(
    rewards: Sequence[ArrayLike], best: Sequence[int | None], prompt_ids: Sequence[str], options: BootstrapOptions
) -> dict[str, Any] | None:
    """``accuracy`` and ``ties`` of :func:`picks_best_of_four`, over prompts with four responses of which one is best.

    None where there is no such prompt. A coin gets an accuracy of 1/4.
    """
    scored = [
        (prompt_id, *picks_best_of_four(values, index))
        for values, index, prompt_id in zip(rewards, best, prompt_ids, strict=True)
        if index is not None and len(np.asarray(values)) >= 4
    ]
    if not scored:
        return None
    ids = [prompt_id for prompt_id, _, _ in scored]
    count = np.ones(len(scored))
    credit, ties = (np.array([row[c] for row in scored]) for c in (1, 2))
    return {
        "accuracy": estimate_dict(bootstrap_share(ids, credit, count, **options)),
        "ties": estimate_dict(bootstrap_share(ids, ties, count, **options)),
        "coin": 0.25,
    }


def score_variance(
    rewards: Sequence[ArrayLike], prompt_ids: Sequence[str], options: BootstrapOptions, *, between_known: bool
) -> dict[str, Any]:
    """Variance of the rewards inside prompts and between prompts, and the share that lies inside.

    A reward that varies little inside a prompt gives PPO little to learn from (Razin et al. 2025, arXiv 2503.15477).
    The variance between prompts is that of their means, less what the variance inside adds to these. It is None, and
    so is the share, where rewards of different prompts cannot be compared (``between_known``).
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in rewards]
    inside = np.array([values.var(ddof=1) for values in arrays])
    within = bootstrap_mean(inside, **options)
    result: dict[str, Any] = {"within_prompts": estimate_dict(within), "between_prompts": None, "share_within": None}
    if not between_known:
        return result
    mean = np.array([values.mean() for values in arrays])
    mean = mean - mean.mean()
    noise = inside / np.array([len(values) for values in arrays])
    sums = sums_by_prompt(prompt_ids, np.ones(len(arrays)), inside, mean, mean**2, noise)

    def between(n: Floats, _: Floats, m: Floats, mm: Floats, noise: Floats) -> Floats:
        return np.maximum((mm - m**2 / n) / (n - 1.0) - noise / n, 0.0)

    def share(n: Floats, w: Floats, m: Floats, mm: Floats, noise: Floats) -> Floats:
        total = w / n + between(n, w, m, mm, noise)
        return np.where(total > 0.0, w / n / np.where(total > 0.0, total, 1.0), np.nan)

    result["between_prompts"] = estimate_dict(bootstrap_statistic(sums, between, **options))
    result["share_within"] = estimate_dict(bootstrap_statistic(sums, share, **options))
    return result
