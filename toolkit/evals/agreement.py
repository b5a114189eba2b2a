"""Agreement of rewards with preferences, of an implicit reward with an explicit one, and of annotators with each other.

A comparison is a tuple ``(prompt_index, i, j, p, weight)``: on that prompt, response i is preferred to response j with
probability p (1/2 is a tie). Rewards are one array (K,) per prompt, in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolkit.errors import DataError
from toolkit.evals.distinct import first_of_equals
from toolkit.evals.intervals import (
    NO_ESTIMATE,
    BootstrapOptions,
    Estimate,
    Floats,
    bootstrap_mean,
    bootstrap_statistic,
    ratio,
    sums_by_prompt,
)
from toolkit.evals.winrate import average_within_prompt

LOG_Z_WARNING = (
    "An implicit reward is known only up to a function of the prompt: beta*log(pi/pi_ref) equals the reward minus "
    "beta*log Z(prompt), and Z is not known. Only differences between responses to the same prompt (margins, ranks, "
    "pairwise agreement) can be compared with an explicit reward; a correlation across prompts mixes in the arbitrary "
    "offsets of the prompts."
)

Comparison = tuple[int, int, int, float, float]
EstimateDict = dict[str, float | int | None]


class _PromptOptions(BootstrapOptions):
    prompt_ids: Sequence[str]


def estimate_dict(estimate: Estimate) -> EstimateDict:
    return {"value": estimate.value, "ci_low": estimate.ci_low, "ci_high": estimate.ci_high, "n": estimate.n}


def comparison_columns(
    comparisons: Sequence[Comparison], rewards: Sequence[ArrayLike]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Floats, Floats]:
    """The comparisons as five arrays (m,): prompt, i, j, p and weight, checked against ``rewards``.

    Raises:
        DataError: an index outside the rewards, p outside [0, 1], a weight that is not positive, a response that is
            compared with itself, or a reward that is not finite.
    """
    sizes = np.array([len(np.asarray(r)) for r in rewards], dtype=np.int64)
    for index, reward in enumerate(rewards):
        if not np.all(np.isfinite(np.asarray(reward, dtype=np.float64))):
            raise DataError("a reward is not finite", where=f"prompt {index}")
    prompt = np.array([c[0] for c in comparisons], dtype=np.int64)
    i = np.array([c[1] for c in comparisons], dtype=np.int64)
    j = np.array([c[2] for c in comparisons], dtype=np.int64)
    p = np.array([c[3] for c in comparisons], dtype=np.float64)
    weight = np.array([c[4] for c in comparisons], dtype=np.float64)
    inside = (prompt >= 0) & (prompt < len(sizes))
    if inside.all():
        inside = (np.minimum(i, j) >= 0) & (np.maximum(i, j) < sizes[prompt]) & (i != j)
    bad = np.flatnonzero(~(inside & (p >= 0.0) & (p <= 1.0) & (weight > 0.0)))
    if len(bad):
        raise DataError(
            f"comparison {comparisons[bad[0]]} does not fit the rewards",
            where=f"comparison {int(bad[0])}",
            fix="(prompt, i, j, p, weight): i != j inside the prompt's responses, 0 <= p <= 1, weight > 0",
        )
    return prompt, i, j, p, weight


def prompt_clusters(prompt_ids: Sequence[str] | None, n: int) -> NDArray[np.int64]:
    """For each of n entries of the rewards, the number of its prompt among the distinct prompts, by first appearance.

    So an interval is the same whether prompts that are all distinct are named or not.
    """
    if prompt_ids is None:
        return np.arange(n, dtype=np.int64)
    if len(prompt_ids) != n:
        raise DataError(f"{len(prompt_ids)} prompt ids for rewards of {n} prompts", where="agreement")
    return first_of_equals(np.asarray(prompt_ids))[1]


def margins(
    rewards: Sequence[ArrayLike], prompt: NDArray[np.int64], i: NDArray[np.int64], j: NDArray[np.int64]
) -> Floats:
    """Reward of response i minus reward of response j, (m,)."""
    arrays = [np.asarray(r, dtype=np.float64) for r in rewards]
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    return np.asarray(flat[offsets[prompt] + i] - flat[offsets[prompt] + j], dtype=np.float64)


def agreement_with_preference(margin: Floats, p: Floats) -> Floats:
    """Probability (m,) that the sign of the margin agrees with the preference. A margin of 0 counts half."""
    return np.where(margin > 0.0, p, np.where(margin < 0.0, 1.0 - p, 0.5))


def pairwise_accuracy(
    comparisons: Sequence[Comparison],
    rewards: Sequence[ArrayLike],
    *,
    prompt_ids: Sequence[str] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Weighted share of comparisons whose preferred response has the higher reward. Equal rewards count half.

    A soft preference p credits p to one side and 1-p to the other, so a tied label (p = 1/2) adds 1/2 whatever the
    rewards say. The interval resamples prompts; entries of ``rewards`` with equal ``prompt_ids`` are one prompt.
    """
    prompt, i, j, p, weight = comparison_columns(comparisons, rewards)
    if len(prompt) == 0:
        return NO_ESTIMATE
    right = weight * agreement_with_preference(margins(rewards, prompt, i, j), p)
    return bootstrap_statistic(
        sums_by_prompt(prompt_clusters(prompt_ids, len(rewards))[prompt], right, weight),
        ratio,
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
    )


def order_agreement(
    comparisons: Sequence[Comparison],
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    prompt_ids: Sequence[str] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Weighted share of compared pairs that both rewards order alike. A tie in one of them counts half."""
    prompt, i, j, _, weight = comparison_columns(comparisons, first)
    comparison_columns(comparisons, second)
    if len(prompt) == 0:
        return NO_ESTIMATE
    x, y = margins(first, prompt, i, j), margins(second, prompt, i, j)
    same = np.where((x == 0.0) | (y == 0.0), 0.5, (np.sign(x) == np.sign(y)).astype(np.float64))
    return bootstrap_statistic(
        sums_by_prompt(prompt_clusters(prompt_ids, len(first))[prompt], weight * same, weight),
        ratio,
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
    )


def within_prompt_correlation(
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    method: str = "spearman",
    prompt_ids: Sequence[str] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean over prompts of the rank correlation of two rewards of the same responses.

    ``method`` is "spearman" (rho) or "kendall" (tau-b). A prompt where either reward has fewer than two distinct values
    has no correlation and is left out; ``n`` counts the other prompts.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} prompts", where="within-prompt correlation")
    if method not in ("spearman", "kendall"):
        raise DataError(f"unknown method {method!r}", where="within-prompt correlation", fix="spearman or kendall")
    from scipy.stats import kendalltau, spearmanr  # take long to import

    clusters = prompt_clusters(prompt_ids, len(first))
    values, prompts = [], []
    for index, (a_raw, b_raw) in enumerate(zip(first, second, strict=True)):
        a, b = np.asarray(a_raw, dtype=np.float64), np.asarray(b_raw, dtype=np.float64)
        if a.shape != b.shape:
            raise DataError(f"{len(a)} and {len(b)} rewards", where=f"prompt {index}")
        if len(a) >= 2 and np.ptp(a) > 0.0 and np.ptp(b) > 0.0:
            result = spearmanr(a, b) if method == "spearman" else kendalltau(a, b)
            values.append(float(result.statistic))
            prompts.append(clusters[index])
    _, means = average_within_prompt(prompts, values)
    return bootstrap_mean(means, n_resamples=n_resamples, confidence=confidence, seed=seed)


def compare_rewards(
    prompt_ids: Sequence[str],
    comparisons: Sequence[Comparison],
    explicit: Sequence[ArrayLike],
    implicit: Sequence[ArrayLike],
    *,
    labelled: Sequence[Comparison] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, EstimateDict | str | int]:
    """How far an implicit reward agrees with an explicit one, within prompts.

    ``accuracy_explicit`` and ``accuracy_implicit`` are measured against the labels, of the comparisons in ``labelled``
    where not all have one. ``agreement`` is the share of compared pairs that both rewards order alike (a tie in one of
    them counts half), and ``cohen_kappa`` is that share corrected for chance. ``spearman`` and ``kendall`` are means of
    within-prompt rank correlations.
    ``margin_correlation`` is Pearson's correlation of the margins of compared pairs, and ``margin_slope`` the slope of
    implicit on explicit margins. Both are about zero.

    Each of these is ``{value, ci_low, ci_high, n}``, where n counts prompts. ``n_pairs`` counts comparisons.

    Raises:
        DataError: rewards and prompts that do not fit each other.
    """
    _check_same_responses(prompt_ids, explicit, implicit)
    prompt, i, j, _, weight = comparison_columns(comparisons, explicit)
    comparison_columns(comparisons, implicit)
    clusters = prompt_clusters(prompt_ids, len(explicit))[prompt]
    bootstrap: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    options: _PromptOptions = {"prompt_ids": prompt_ids, **bootstrap}
    x, y = margins(explicit, prompt, i, j), margins(implicit, prompt, i, j)
    labelled = comparisons if labelled is None else labelled
    return {
        "n_prompts": len(np.unique(clusters)),
        "n_pairs": len(prompt),
        "accuracy_explicit": estimate_dict(pairwise_accuracy(labelled, explicit, **options)),
        "accuracy_implicit": estimate_dict(pairwise_accuracy(labelled, implicit, **options)),
        "agreement": estimate_dict(order_agreement(comparisons, explicit, implicit, **options)),
        "cohen_kappa": estimate_dict(_order_kappa(x, y, weight, clusters, bootstrap)),
        "spearman": estimate_dict(within_prompt_correlation(explicit, implicit, method="spearman", **options)),
        "kendall": estimate_dict(within_prompt_correlation(explicit, implicit, method="kendall", **options)),
        **_margin_relation(x, y, weight, clusters, bootstrap),
        "warning": LOG_Z_WARNING,
    }


def _check_same_responses(
    prompt_ids: Sequence[str], explicit: Sequence[ArrayLike], implicit: Sequence[ArrayLike]
) -> None:
    if not len(prompt_ids) == len(explicit) == len(implicit):
        raise DataError(
            f"{len(prompt_ids)} prompts, {len(explicit)} explicit and {len(implicit)} implicit rewards",
            where="compare_rewards",
        )
    for index, (a, b) in enumerate(zip(explicit, implicit, strict=True)):
        if len(np.asarray(a)) != len(np.asarray(b)):
            raise DataError("the two rewards score different numbers of responses", where=f"prompt {prompt_ids[index]}")


def _order_kappa(
    x: Floats, y: Floats, weight: Floats, clusters: NDArray[np.int64], bootstrap: BootstrapOptions
) -> Estimate:
    """Cohen's kappa of the orders that two margins (m,) give to each pair.

    Each pair enters in both directions, so that the chance level does not depend on which response comes first.
    """
    if len(x) == 0:
        return NO_ESTIMATE
    both_x, both_y = np.concatenate([x, -x]), np.concatenate([y, -y])
    cells = verdict_cells(np.sign(both_x), np.sign(both_y), np.concatenate([weight, weight]))
    return bootstrap_statistic(sums_by_prompt(np.concatenate([clusters, clusters]), *cells), _kappa, **bootstrap)


def _margin_relation(
    x: Floats, y: Floats, weight: Floats, clusters: NDArray[np.int64], bootstrap: BootstrapOptions
) -> dict[str, EstimateDict]:
    """Correlation and slope of y on x, margins (m,).

    Both are about zero, not about the means: which response of a pair comes first is arbitrary, and the other choice
    turns the signs of both margins.
    """
    xx, yy, xy = weight * x * x, weight * y * y, weight * x * y
    correlation = bootstrap_statistic(sums_by_prompt(clusters, xx, yy, xy), _correlation_about_zero, **bootstrap)
    slope = bootstrap_statistic(sums_by_prompt(clusters, xx, xy), _slope_through_origin, **bootstrap)
    return {"margin_correlation": estimate_dict(correlation), "margin_slope": estimate_dict(slope)}


def _correlation_about_zero(xx: Floats, yy: Floats, xy: Floats) -> Floats:
    return np.where((xx > 0.0) & (yy > 0.0), xy / np.sqrt(xx * yy), np.nan)


def _slope_through_origin(xx: Floats, xy: Floats) -> Floats:
    return np.where(xx > 0.0, xy / xx, np.nan)


def verdict_cells(a: ArrayLike, b: ArrayLike, weight: ArrayLike | None = None) -> list[Floats]:
    """Indicators (m,) of the cells of the square table of two ratings (m,).

    The cells come row by row; the categories are those that either rating uses.
    """
    a_M, b_M = np.asarray(a), np.asarray(b)
    w_M = np.ones(len(a_M)) if weight is None else np.asarray(weight, dtype=np.float64)
    categories = np.unique(np.concatenate([a_M, b_M]))
    return [w_M * ((a_M == r) & (b_M == c)) for r in categories for c in categories]


def _kappa(*cells: Floats) -> Floats:
    size = round(len(cells) ** 0.5)
    table = np.stack(cells, axis=-1).reshape(-1, size, size)
    total = table.sum(axis=(1, 2))
    observed = np.trace(table, axis1=1, axis2=2) / total
    chance = (table.sum(axis=2) * table.sum(axis=1)).sum(axis=1) / total**2
    return np.where(chance < 1.0, (observed - chance) / np.where(chance < 1.0, 1.0 - chance, 1.0), np.nan)


def cohen_kappa(
    a: ArrayLike,
    b: ArrayLike,
    *,
    prompt_ids: Sequence[object] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Cohen's kappa (1960) of two raters over the same items (m,).

    With ``prompt_ids`` the interval resamples prompts with all their items. The value is None where both raters used
    the same single category: agreement by chance is 1 then.
    """
    a_M, b_M = np.asarray(a), np.asarray(b)
    if a_M.shape != b_M.shape or a_M.ndim != 1:
        raise DataError(f"two ratings of shapes {a_M.shape} and {b_M.shape}", where="cohen_kappa")
    if len(a_M) == 0:
        return NO_ESTIMATE
    cells = verdict_cells(a_M, b_M)
    if prompt_ids is not None:
        _, index = np.unique(np.asarray(prompt_ids), return_inverse=True)
        cells = sums_by_prompt(index, *cells)
    return bootstrap_statistic(cells, _kappa, n_resamples=n_resamples, confidence=confidence, seed=seed)


def krippendorff_alpha(
    ratings: ArrayLike,
    *,
    level: str = "nominal",
    unit_prompts: Sequence[object] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Krippendorff's alpha (2011) of ratings (raters, units), NaN where a rater did not rate the unit.

    ``level`` is "nominal", "ordinal" or "interval". Units with fewer than two ratings are left out, and ``n`` counts
    the others. The interval resamples units. With ``unit_prompts`` it resamples prompts with all their units, and ``n``
    counts prompts. The distances of an ordinal scale are computed anew in each resample.

    Raises:
        DataError: an unknown level, or ratings that are not a table.
    """
    values_RU = np.asarray(ratings, dtype=np.float64)
    if values_RU.ndim != 2:
        raise DataError("ratings must be a table (raters, units)", where=f"shape {values_RU.shape}")
    if level not in ("nominal", "ordinal", "interval"):
        raise DataError(f"unknown level {level!r}", where="krippendorff_alpha", fix="nominal, ordinal or interval")
    categories = np.unique(values_RU[~np.isnan(values_RU)])
    counts_UV = (values_RU[:, :, None] == categories).sum(axis=0).astype(np.float64)
    rated_twice = counts_UV.sum(axis=1) >= 2
    counts_UV = counts_UV[rated_twice]
    if len(counts_UV) == 0:
        return NO_ESTIMATE
    v = len(categories)
    rated = counts_UV.sum(axis=1)
    # coincidences of a unit: ordered pairs of its ratings, each weighted 1/(ratings - 1)
    pairs_UVV = counts_UV[:, :, None] * counts_UV[:, None, :]
    pairs_UVV[:, np.arange(v), np.arange(v)] -= counts_UV
    pairs_UVV /= (rated - 1.0)[:, None, None]

    def alpha(*cells: Floats) -> Floats:
        coincidences = np.stack(cells, axis=-1).reshape(-1, v, v)
        n_v = coincidences.sum(axis=2)
        n = n_v.sum(axis=1)
        if level == "nominal":
            distance = np.broadcast_to(1.0 - np.eye(v), coincidences.shape)
        elif level == "interval":
            distance = np.broadcast_to((categories[:, None] - categories[None, :]) ** 2, coincidences.shape)
        else:
            # midranks: the ratings between two categories, with those at either end counted half
            middle = np.cumsum(n_v, axis=1) - n_v / 2.0
            distance = (middle[:, :, None] - middle[:, None, :]) ** 2
        observed = (coincidences * distance).sum(axis=(1, 2))
        expected = (n_v[:, :, None] * n_v[:, None, :] * distance).sum(axis=(1, 2)) / (n - 1.0)
        return np.where(expected > 0.0, 1.0 - observed / np.where(expected > 0.0, expected, 1.0), np.nan)

    columns = list(pairs_UVV.reshape(len(pairs_UVV), -1).T)
    if unit_prompts is not None:
        columns = sums_by_prompt(np.asarray(unit_prompts)[rated_twice], *columns)
    return bootstrap_statistic(columns, alpha, n_resamples=n_resamples, confidence=confidence, seed=seed)


def comparisons_by_reward(comparisons: Sequence[Comparison], reward: Sequence[ArrayLike]) -> list[Comparison]:
    """The same pairs, labelled by a known reward instead."""
    values = [np.asarray(of_prompt, dtype=np.float64) for of_prompt in reward]
    return [(q, i, j, _preference(values[q][i], values[q][j]), weight) for q, i, j, _, weight in comparisons]


def decided(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons whose label is no tie."""
    return [comparison for comparison in comparisons if comparison[3] != 0.5]


def compare_on_samples(
    prompt_ids: Sequence[str],
    texts: Sequence[Sequence[str]],
    explicit: Sequence[ArrayLike],
    implicit: Sequence[ArrayLike],
    gold: Sequence[Sequence[float | None] | None],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, EstimateDict | str | int]:
    """:func:`compare_rewards` on all pairs of sampled responses, which nobody labelled.

    The labels come from the gold reward. Where it is not known there are no accuracies. The implicit reward generalises
    worse than an explicit one outside its training distribution (Lin et al. 2024, arXiv 2409.03650): samples show that.

    Pairs of equal ``texts`` [K] are left out, because no reward can order them: ``n_pairs_equal`` counts them. The
    accuracies also leave out pairs of equal gold rewards, ``n_pairs_gold_tied`` of the others.
    """
    pairs: list[Comparison] = []
    n_equal = n_tied = 0
    for p, of_prompt in enumerate(texts):
        known = gold[p] or [None] * len(of_prompt)
        for i, j in combinations(range(len(of_prompt)), 2):
            if of_prompt[i] == of_prompt[j]:
                n_equal += 1
                continue
            n_tied += known[i] is not None and known[i] == known[j]
            pairs.append((p, i, j, _preference(known[i], known[j]), 1.0))
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    result = compare_rewards(prompt_ids, pairs, explicit, implicit, labelled=decided(pairs), **options)
    result |= {"n_pairs_equal": n_equal, "n_pairs_gold_tied": n_tied}
    if not any(gold):
        return {name: value for name, value in result.items() if not name.startswith("accuracy")}
    return result


def _preference(a: float | None, b: float | None) -> float:
    if a is None or b is None or a == b:
        return 0.5
    return 1.0 if a > b else 0.0
