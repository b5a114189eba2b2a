"""Agreement: of rewards with preferences, of an implicit reward with an explicit one, and between annotators.

Comparisons are tuples ``(prompt_index, i, j, p, weight)``: on that prompt, response i is preferred to response j with
probability p (1/2 is a tie). Rewards are one array (K,) per prompt, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, spearmanr

from toolkit.errors import DataError
from toolkit.evals.intervals import (
    NO_ESTIMATE,
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


class _Options(TypedDict):
    prompt_ids: Sequence[str]
    n_resamples: int
    confidence: float
    seed: int


def estimate_dict(estimate: Estimate) -> EstimateDict:
    return {"value": estimate.value, "ci_low": estimate.ci_low, "ci_high": estimate.ci_high, "n": estimate.n}


def comparison_columns(
    comparisons: Sequence[Comparison], rewards: Sequence[ArrayLike]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Floats, Floats]:
    """Prompt, i, j, p and weight as arrays (m,), checked against ``rewards``.

    Raises:
        DataError: an index outside the rewards, p outside [0, 1], a weight that is not positive, a response compared
            with itself, or a reward that is not finite.
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


def _clusters(prompt_ids: Sequence[str] | None, n: int) -> NDArray[np.int64]:
    """The number of its distinct prompt for each of n reward entries."""
    if prompt_ids is None:
        return np.arange(n, dtype=np.int64)
    if len(prompt_ids) != n:
        raise DataError(f"{len(prompt_ids)} prompt ids for rewards of {n} prompts", where="agreement")
    return np.unique(np.asarray(prompt_ids), return_inverse=True)[1].astype(np.int64)


def margins(
    rewards: Sequence[ArrayLike], prompt: NDArray[np.int64], i: NDArray[np.int64], j: NDArray[np.int64]
) -> Floats:
    """Reward of response i minus reward of response j, (m,)."""
    arrays = [np.asarray(r, dtype=np.float64) for r in rewards]
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    return np.asarray(flat[offsets[prompt] + i] - flat[offsets[prompt] + j], dtype=np.float64)


def agreement_with_preference(margin: Floats, p: Floats) -> Floats:
    """Probability (m,) that the sign of the margin agrees with the preference; no margin counts half."""
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
    """Weighted share of comparisons whose preferred response has the higher reward; equal rewards count half.

    A soft preference p credits p to one side and 1-p to the other, so a tied label (p = 1/2) adds 1/2 whatever the
    rewards say. Prompts are resampled; entries of ``rewards`` with equal ``prompt_ids`` are one prompt.
    """
    prompt, i, j, p, weight = comparison_columns(comparisons, rewards)
    if len(prompt) == 0:
        return NO_ESTIMATE
    right = weight * agreement_with_preference(margins(rewards, prompt, i, j), p)
    return bootstrap_statistic(
        sums_by_prompt(_clusters(prompt_ids, len(rewards))[prompt], right, weight),
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
    """Weighted share of compared pairs that both rewards order alike; a tie in one of them counts half."""
    prompt, i, j, _, weight = comparison_columns(comparisons, first)
    comparison_columns(comparisons, second)
    if len(prompt) == 0:
        return NO_ESTIMATE
    x, y = margins(first, prompt, i, j), margins(second, prompt, i, j)
    same = np.where((x == 0.0) | (y == 0.0), 0.5, (np.sign(x) == np.sign(y)).astype(np.float64))
    return bootstrap_statistic(
        sums_by_prompt(_clusters(prompt_ids, len(first))[prompt], weight * same, weight),
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
    """Mean over prompts of Spearman's rho, or Kendall's tau-b ("kendall"), of two rewards of the same responses.

    Prompts where either reward has fewer than two distinct values have no correlation and are left out; ``n`` counts
    the prompts that are in.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} and {len(second)} prompts", where="within-prompt correlation")
    if method not in ("spearman", "kendall"):
        raise DataError(f"unknown method {method!r}", where="within-prompt correlation", fix="spearman or kendall")
    clusters = _clusters(prompt_ids, len(first))
    values, owners = [], []
    for index, (a_raw, b_raw) in enumerate(zip(first, second, strict=True)):
        a, b = np.asarray(a_raw, dtype=np.float64), np.asarray(b_raw, dtype=np.float64)
        if a.shape != b.shape:
            raise DataError(f"{len(a)} and {len(b)} rewards", where=f"prompt {index}")
        if len(a) >= 2 and np.ptp(a) > 0.0 and np.ptp(b) > 0.0:
            result = spearmanr(a, b) if method == "spearman" else kendalltau(a, b)
            values.append(float(result.statistic))
            owners.append(clusters[index])
    _, means = average_within_prompt(owners, values)
    return bootstrap_mean(means, n_resamples=n_resamples, confidence=confidence, seed=seed)


def _correlation_about_zero(xx: Floats, yy: Floats, xy: Floats) -> Floats:
    return np.where((xx > 0.0) & (yy > 0.0), xy / np.sqrt(xx * yy), np.nan)


def _slope_through_origin(xx: Floats, xy: Floats) -> Floats:
    return np.where(xx > 0.0, xy / xx, np.nan)


def compare_rewards(
    prompt_ids: Sequence[str],
    comparisons: Sequence[Comparison],
    explicit: Sequence[ArrayLike],
    implicit: Sequence[ArrayLike],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, EstimateDict | str | int]:
    """How far an implicit reward agrees with an explicit one, within prompts.

    ``accuracy_explicit`` and ``accuracy_implicit`` are against the labels; ``agreement`` is the share of compared pairs
    that both rewards order alike (a tie in one of them counts half) and ``cohen_kappa`` the same corrected for chance;
    ``spearman`` and ``kendall`` are means of within-prompt correlations; ``margin_correlation`` is Pearson's over
    the margins of compared pairs and ``margin_slope`` the slope through the origin of implicit on explicit margins,
    both about zero, since which response of a pair comes first is arbitrary: signs of both margins flip together.

    Entries are ``{value, ci_low, ci_high, n}`` with n the prompts behind them. ``n_pairs`` counts comparisons.

    Raises:
        DataError: rewards and prompts that do not fit each other.
    """
    if not len(prompt_ids) == len(explicit) == len(implicit):
        raise DataError(
            f"{len(prompt_ids)} prompts, {len(explicit)} explicit and {len(implicit)} implicit rewards",
            where="compare_rewards",
        )
    for index, (a, b) in enumerate(zip(explicit, implicit, strict=True)):
        if len(np.asarray(a)) != len(np.asarray(b)):
            raise DataError("the two rewards score different numbers of responses", where=f"prompt {prompt_ids[index]}")
    prompt, i, j, _, w = comparison_columns(comparisons, explicit)
    comparison_columns(comparisons, implicit)
    cluster = _clusters(prompt_ids, len(explicit))[prompt]
    bootstrap = partial(bootstrap_statistic, n_resamples=n_resamples, confidence=confidence, seed=seed)
    options: _Options = {
        "prompt_ids": prompt_ids,
        "n_resamples": n_resamples,
        "confidence": confidence,
        "seed": seed,
    }
    x, y = margins(explicit, prompt, i, j), margins(implicit, prompt, i, j)

    def over_prompts(columns: Sequence[Floats], fn: Callable[..., Floats]) -> EstimateDict:
        return estimate_dict(bootstrap(sums_by_prompt(cluster, *columns), fn))

    # kappa of the two verdicts: each unordered pair enters in both directions, so that the chance level does not depend
    # on which response is called first
    both = [np.concatenate([x, -x]), np.concatenate([y, -y])]
    table = verdict_cells(np.sign(both[0]), np.sign(both[1]), np.concatenate([w, w]))
    doubled = np.concatenate([cluster, cluster])
    kappa = bootstrap(sums_by_prompt(doubled, *table), _kappa) if len(prompt) else NO_ESTIMATE
    return {
        "n_prompts": len(np.unique(cluster)),
        "n_pairs": len(prompt),
        "accuracy_explicit": estimate_dict(pairwise_accuracy(comparisons, explicit, **options)),
        "accuracy_implicit": estimate_dict(pairwise_accuracy(comparisons, implicit, **options)),
        "agreement": estimate_dict(order_agreement(comparisons, explicit, implicit, **options)),
        "cohen_kappa": estimate_dict(kappa),
        "spearman": estimate_dict(within_prompt_correlation(explicit, implicit, method="spearman", **options)),
        "kendall": estimate_dict(within_prompt_correlation(explicit, implicit, method="kendall", **options)),
        "margin_correlation": over_prompts([w * x * x, w * y * y, w * x * y], _correlation_about_zero),
        "margin_slope": over_prompts([w * x * x, w * x * y], _slope_through_origin),
        "warning": LOG_Z_WARNING,
    }


def verdict_cells(a: ArrayLike, b: ArrayLike, weight: ArrayLike | None = None) -> list[Floats]:
    """Indicators (m,) of the cells of the square table of two ratings, row by row over the categories of both."""
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
    """Cohen's kappa (1960) of two raters over the same items (m,), items clustered by prompt where ids are given.

    None where both raters used one and the same category only: chance agreement is then 1.
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
    """Krippendorff's alpha (2011) of raters x units, (raters, units), NaN where a rater did not rate the unit.

    ``level`` is "nominal", "ordinal" or "interval". Units with fewer than two ratings are left out; ``n`` counts the
    units that are in. Units are resampled whole, or, with ``unit_prompts``, all those of a prompt
    together, and ``n`` counts prompts; an ordinal scale's distances are those of each resample.

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
            # ratings between two categories, each end counted half: midranks
            middle = np.cumsum(n_v, axis=1) - n_v / 2.0
            distance = (middle[:, :, None] - middle[:, None, :]) ** 2
        observed = (coincidences * distance).sum(axis=(1, 2))
        expected = (n_v[:, :, None] * n_v[:, None, :] * distance).sum(axis=(1, 2)) / (n - 1.0)
        return np.where(expected > 0.0, 1.0 - observed / np.where(expected > 0.0, expected, 1.0), np.nan)

    columns = list(pairs_UVV.reshape(len(pairs_UVV), -1).T)
    if unit_prompts is not None:
        columns = sums_by_prompt(np.asarray(unit_prompts)[rated_twice], *columns)
    return bootstrap_statistic(columns, alpha, n_resamples=n_resamples, confidence=confidence, seed=seed)


def compare_on_samples(
    prompt_ids: Sequence[str],
    explicit: Sequence[ArrayLike],
    implicit: Sequence[ArrayLike],
    gold: Sequence[Sequence[float | None] | None],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, EstimateDict | str | int]:
    """:func:`compare_rewards` on all pairs of responses that nobody labelled: against the gold reward where it is
    known, and without the accuracies where it is not.

    The implicit reward is known to generalise worse off its training distribution (Lin et al. 2024, arXiv 2409.03650).
    """
    pairs: list[Comparison] = []
    for p, values in enumerate(explicit):
        n = len(np.asarray(values))
        known = gold[p] or [None] * n
        pairs += [(p, i, j, _preference(known[i], known[j]), 1.0) for i in range(n) for j in range(i + 1, n)]
    found = compare_rewards(
        prompt_ids, pairs, explicit, implicit, n_resamples=n_resamples, confidence=confidence, seed=seed
    )
    if not any(gold):
        return {name: value for name, value in found.items() if not name.startswith("accuracy")}
    return found


def _preference(a: float | None, b: float | None) -> float:
    if a is None or b is None or a == b:
        return 0.5
    return 1.0 if a > b else 0.0
