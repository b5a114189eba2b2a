"""The card of a reward model: a section a topic, from its rewards of labelled responses.

Every figure is ``{value, ci_low, ci_high, n}`` with an interval over prompts; n counts the prompts that it rests on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from toolkit.evals.agreement import (
    Comparison,
    EstimateDict,
    agreement_with_preference,
    comparison_columns,
    comparisons_by_reward,
    decided,
    estimate_dict,
    margins,
    order_agreement,
    pairwise_accuracy,
    prompt_clusters,
    within_prompt_correlation,
)
from toolkit.evals.best_of_pool import best_of_four, score_variance, values_of_best_of_n
from toolkit.evals.feature_bias import ComparedPairs, bias_flags, feature_bias
from toolkit.evals.intervals import (
    BootstrapOptions,
    Floats,
    bootstrap_statistic,
    ratio,
    sums_by_prompt,
)
from toolkit.evals.rm_quality import calibration, confidence_bins, rm_quality
from toolkit.evals.style_matrix import style_matrix

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# What a reward likes that follows the feature, and what one likes that runs against it.
LIKED = {
    "length": ("long responses", "short responses"),
    "format": ("formatted responses", "unformatted responses"),
    "sycophancy": ("responses that share the prompt's opinion", "responses that contradict the prompt's opinion"),
}


@dataclass(frozen=True)
class StyledResponses:
    """RM-Bench's responses to prompt number ``prompt``: which are chosen and which rejected, by style."""

    prompt: int
    chosen: Sequence[int]
    rejected: Sequence[int]


@dataclass(frozen=True)
class CardData:
    """Labelled responses, by prompt.

    ``comparisons`` are (prompt, i, j, p, weight). ``features`` has for each of ``LIKED`` a value for each response.
    ``gold`` are the true rewards, None for a prompt where they are not known. ``sources`` names where a prompt is from,
    None where that is not known.
    ``styled`` are RM-Bench's rows. ``judged`` are a judge's scores, which measure the best of n beside gold, and
    ``best_of`` is its largest n; None goes as far as the pools reach.
    """

    prompt_ids: Sequence[str]
    comparisons: Sequence[Comparison]
    features: Mapping[str, Sequence[ArrayLike]]
    gold: Sequence[ArrayLike | None]
    sources: Sequence[str | None] | None = None
    styled: Sequence[StyledResponses] = ()
    judged: Sequence[ArrayLike] | None = None
    best_of: int | None = None

    @property
    def with_gold(self) -> list[int]:
        """The prompts whose gold rewards are known."""
        return [k for k, values in enumerate(self.gold) if values is not None]

    @property
    def gold_of_compared(self) -> bool:
        """Whether gold rewards are known for every prompt with a comparison."""
        return all(self.gold[k] is not None for k in {comparison[0] for comparison in self.comparisons})


def reward_card(
    data: CardData,
    rewards: Sequence[ArrayLike],
    *,
    comparable_across_prompts: bool = True,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The sections of the card, ``accuracy`` first. A section is None where the data does not have what it needs.

    ``comparable_across_prompts`` is False for implicit rewards, which are known up to a function of the prompt.

    Raises:
        DataError: comparisons and rewards that do not fit each other, or no comparisons.
    """
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    ids = list(data.prompt_ids)
    quality: dict[str, Any] = rm_quality(data.comparisons, rewards, prompt_ids=ids, **options)
    pairs = compared_pairs(data, rewards)
    biases: dict[str, dict[str, Any]] = {name: feature_bias(pairs, name, options) for name in data.features}
    for name, section in biases.items():
        values = data.features[name]
        section["spearman"] = estimate_dict(within_prompt_correlation(rewards, values, prompt_ids=ids, **options))
        section["gold_spearman"] = _gold_spearman(data, values, options)
    return {
        "accuracy": {**quality["accuracy"], "references": quality["references"]},
        "calibration": {
            **calibration(data.comparisons, rewards, prompt_ids=ids, **options),
            "reliability": _reliability(pairs, options),
            "after_temperature": quality["after_temperature"],
        },
        "margins": {
            "mean": quality["margin_mean"],
            "quantiles": margin_quantiles(pairs, confidence),
            "accuracy_by_margin": quality["accuracy_by_margin"],
        },
        **biases,
        "gold": _gold_section(data, rewards, options),
        "best_of_n": _best_of_n_section(data, rewards, options),
        "best_of_n_judged": _judged_section(data, rewards, options),
        "by_source": _source_section(data, rewards, options),
        "variance": score_variance(rewards, ids, options, between_known=comparable_across_prompts),
        "best_of_4": best_of_four(rewards, best_responses(data), ids, options),
        "styles": _style_section(data, rewards, options),
    }


def card_flags(sections: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The biases that a card shows (:func:`toolkit.evals.feature_bias.bias_flags`)."""
    return bias_flags({name: sections[name] for name in LIKED if name in sections}, LIKED)


def compared_pairs(data: CardData, rewards: Sequence[ArrayLike]) -> ComparedPairs:
    """The compared pairs with their margins, labels, gold and features."""
    prompt, i, j, p, weight = comparison_columns(data.comparisons, rewards)
    gold = None
    if data.gold_of_compared:
        known = [np.zeros(len(np.asarray(r))) if g is None else g for g, r in zip(data.gold, rewards, strict=True)]
        gold = margins(known, prompt, i, j)
    return ComparedPairs(
        prompt_clusters(data.prompt_ids, len(rewards))[prompt],
        margins(rewards, prompt, i, j),
        p,
        weight,
        gold,
        {name: margins(values, prompt, i, j) for name, values in data.features.items()},
    )


def _style_section(data: CardData, rewards: Sequence[ArrayLike], options: BootstrapOptions) -> dict[str, Any] | None:
    chosen, rejected = (
        [np.asarray(rewards[row.prompt])[list(side)] for row, side in sides]
        for sides in ([(row, row.chosen) for row in data.styled], [(row, row.rejected) for row in data.styled])
    )
    return style_matrix(chosen, rejected, [data.prompt_ids[row.prompt] for row in data.styled], options)


def margin_scale(data: CardData, rewards: Sequence[ArrayLike]) -> float:
    """The root mean square of the compared pairs' margins, by the weights of the comparisons."""
    prompt, i, j, _, weight = comparison_columns(data.comparisons, rewards)
    return float(np.sqrt(np.average(margins(rewards, prompt, i, j) ** 2, weights=weight)))


def best_responses(data: CardData) -> list[int | None]:
    """For each prompt the single best response: by gold, else the one that beats all others in the labels."""
    beaten: dict[int, dict[int, set[int]]] = {}
    for prompt, i, j, p, _ in data.comparisons:
        if p != 0.5:
            winner, loser = (i, j) if p > 0.5 else (j, i)
            beaten.setdefault(prompt, {}).setdefault(winner, set()).add(loser)
    best: list[int | None] = []
    for k, gold in enumerate(data.gold):
        n = len(np.asarray(next(iter(data.features.values()))[k]))
        if gold is not None:
            values = np.asarray(gold, dtype=np.float64)
            top = np.flatnonzero(values == values.max())
            best.append(int(top[0]) if len(top) == 1 else None)
        else:
            best.append(next((r for r, losers in beaten.get(k, {}).items() if len(losers) == n - 1), None))
    return best


def _reliability(pairs: ComparedPairs, options: BootstrapOptions) -> list[dict[str, Any]]:
    """The bins of :func:`confidence_bins` that are not empty, each with its mean confidence and its accuracy."""
    confidence, bins, edges = confidence_bins(pairs.margin)
    right = agreement_with_preference(pairs.margin, pairs.p)
    rows = []
    for k in range(len(edges) - 1):
        inside = bins == k
        if inside.any():
            w, cluster = pairs.weight[inside], pairs.clusters[inside]
            means = [
                estimate_dict(bootstrap_statistic(sums_by_prompt(cluster, w * column[inside], w), ratio, **options))
                for column in (confidence, right)
            ]
            edge = {"low": float(edges[k]), "high": float(edges[k + 1])}
            rows.append({**edge, "confidence": means[0], "accuracy": means[1]})
    return rows


def margin_quantiles(pairs: ComparedPairs, confidence: float) -> dict[str, EstimateDict]:
    """Quantiles of the margin towards the preferred response, over the comparisons that are no ties.

    The interval is Woodruff's (1952): the share of margins below the quantile has a standard error over prompts, and
    the quantiles at the ends of that share's interval are the bounds.
    """
    decided = pairs.p != 0.5
    if not decided.any():
        return {}
    margin = pairs.margin[decided] * np.sign(pairs.p[decided] - 0.5)
    weight = pairs.weight[decided] * np.abs(2.0 * pairs.p[decided] - 1.0)
    order = np.argsort(margin, kind="stable")
    values, share = margin[order], np.cumsum(weight[order]) / weight.sum()
    reach = float(-ndtri((1.0 - confidence) / 2.0))
    clusters = pairs.clusters[decided]
    n = len(np.unique(clusters))
    quantiles: dict[str, EstimateDict] = {}
    for q in QUANTILES:
        value = float(_quantile(values, share, q))
        [residual] = sums_by_prompt(clusters, weight * ((margin <= value) - q))
        error = reach * float(np.sqrt(np.sum((residual - residual.mean()) ** 2) * n / max(n - 1, 1))) / weight.sum()
        bounds = [float(_quantile(values, share, q + sign * error)) for sign in (-1.0, 1.0)]
        low, high = bounds if n > 1 else (None, None)
        quantiles[f"{q:g}"] = {"value": value, "ci_low": low, "ci_high": high, "n": n}
    return quantiles


def _quantile(values: Floats, share: Floats, q: float) -> float:
    """The least value at which the cumulative share reaches q, but for the rounding of a sum of weights."""
    return float(values[min(int(np.searchsorted(share, q - 1e-12)), len(values) - 1)])


def _gold_spearman(data: CardData, values: Sequence[ArrayLike], options: BootstrapOptions) -> EstimateDict | None:
    at = data.with_gold
    if not at:
        return None
    gold = [g for g in data.gold if g is not None]
    ids = [data.prompt_ids[k] for k in at]
    return estimate_dict(within_prompt_correlation(gold, [values[k] for k in at], prompt_ids=ids, **options))


def _known(data: CardData, rewards: Sequence[ArrayLike]) -> tuple[list[ArrayLike], list[ArrayLike], list[str]]:
    """Rewards, gold rewards and ids of the prompts whose gold rewards are known."""
    at = data.with_gold
    return [rewards[k] for k in at], [g for g in data.gold if g is not None], [data.prompt_ids[k] for k in at]


def all_pairs(gold: Sequence[ArrayLike]) -> list[Comparison]:
    """All pairs of responses, labelled by their gold rewards; pairs of equal gold are ties."""
    pairs: list[Comparison] = []
    for k, values in enumerate(gold):
        n = len(np.asarray(values))
        pairs += [(k, i, j, 0.5, 1.0) for i in range(n) for j in range(i + 1, n)]
    return comparisons_by_reward(pairs, gold)


def _gold_section(data: CardData, rewards: Sequence[ArrayLike], options: BootstrapOptions) -> dict[str, Any] | None:
    """How far the reward agrees with gold on all pairs of responses, and how far the labels do."""
    scored, gold, ids = _known(data, rewards)
    if not gold:
        return None
    pairs = all_pairs(gold)
    position = {k: n for n, k in enumerate(data.with_gold)}
    labels = [(position[k], i, j, p, w) for k, i, j, p, w in data.comparisons if k in position]
    return {
        "accuracy": estimate_dict(pairwise_accuracy(decided(pairs), scored, prompt_ids=ids, **options)),
        "spearman": estimate_dict(within_prompt_correlation(scored, gold, prompt_ids=ids, **options)),
        "kendall": estimate_dict(within_prompt_correlation(scored, gold, method="kendall", prompt_ids=ids, **options)),
        "same_order": estimate_dict(order_agreement(pairs, scored, gold, prompt_ids=ids, **options)),
        "labels_accuracy": estimate_dict(pairwise_accuracy(labels, gold, prompt_ids=ids, **options)),
    }


def _best_of_n_section(
    data: CardData, rewards: Sequence[ArrayLike], options: BootstrapOptions
) -> list[dict[str, Any]] | None:
    scored, gold, ids = _known(data, rewards)
    return values_of_best_of_n(scored, gold, ids, options, most=data.best_of) if gold else None


def _judged_section(
    data: CardData, rewards: Sequence[ArrayLike], options: BootstrapOptions
) -> list[dict[str, Any]] | None:
    """The best of n in the judge's score, which has the key ``judge``."""
    if data.judged is None:
        return None
    ids = list(data.prompt_ids)
    return values_of_best_of_n(rewards, data.judged, ids, options, measure="judge", most=data.best_of)


def _source_section(
    data: CardData, rewards: Sequence[ArrayLike], options: BootstrapOptions
) -> list[dict[str, Any]] | None:
    """For each source the accuracy on it, and the accuracy on all other comparisons."""
    if data.sources is None:
        return None
    ids = list(data.prompt_ids)

    def accuracy(inside: NDArray[np.bool_]) -> EstimateDict:
        chosen = [c for c in data.comparisons if inside[c[0]]]
        return estimate_dict(pairwise_accuracy(chosen, rewards, prompt_ids=ids, **options))

    rows = []
    for name in sorted({source for source in data.sources if source is not None}):
        here = np.array([source == name for source in data.sources])
        rows.append({"source": name, "accuracy": accuracy(here), "accuracy_without": accuracy(~here)})
    return rows
