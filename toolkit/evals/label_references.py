"""What an accuracy, a log loss and a Brier score are to be compared with: a coin, and the best that the labels allow.

Where labels disagree on a pair, no predictor agrees with all of them. Always saying the majority gets the highest
possible accuracy on these labels, and predicting their share the lowest possible log loss and Brier score. With few
labels for a pair the shares are those of a few people: a model that knew what most people prefer would get less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import xlogy

from toolkit.evals.agreement import Comparison, comparison_columns, estimate_dict, prompt_clusters
from toolkit.evals.intervals import (
    BootstrapOptions,
    Floats,
    bootstrap_share,
    bootstrap_statistic,
    ratio,
    sums_by_prompt,
)

COIN = {"accuracy": 0.5, "nll": math.log(2.0), "brier": 0.25, "ece": 0.0}
"""What the probability one half for every pair gets, on any labels."""


def majority(p: Floats) -> Floats:
    """The share of a pair's labels that its majority has, from the share ``p`` that prefers the first response."""
    return np.maximum(p, 1.0 - p)


def disagree(p: Floats) -> bool:
    """Whether the labels of some pair disagree. Where none do, how far people would is not known."""
    return bool(np.any((p > 0.0) & (p < 1.0)))


def label_references(
    comparisons: Sequence[Comparison],
    rewards: Sequence[ArrayLike],
    *,
    prompt_ids: Sequence[str] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """``coin`` and ``label_ceiling``, each with ``accuracy``, ``nll`` (nats), ``brier`` and ``ece``.

    The ceiling's numbers are estimates with intervals over prompts. ``label_ceiling`` is None, with a
    ``label_ceiling_reason``, where no pair has labels that disagree. ``rewards`` only say which responses there are;
    entries with equal ``prompt_ids`` are one prompt.

    >>> both = label_references([(0, 0, 1, 1.0, 2.0), (1, 0, 1, 0.5, 2.0)], [[0.0, 0.0]] * 2)
    >>> both["label_ceiling"]["accuracy"]["value"], both["label_ceiling"]["brier"]["value"]
    (0.75, 0.125)
    """
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    prompt, _, _, p, weight = comparison_columns(comparisons, rewards)
    if not disagree(p):
        reason = "no pair has labels that disagree: how far people would is not known"
        return {"coin": COIN, "label_ceiling": None, "label_ceiling_reason": reason}

    prompt = prompt_clusters(prompt_ids, len(rewards))[prompt]

    def mean(of_pair: Floats) -> dict[str, float | int | None]:
        return estimate_dict(bootstrap_statistic(sums_by_prompt(prompt, weight * of_pair, weight), ratio, **options))

    ceiling = {
        "accuracy": estimate_dict(bootstrap_share(prompt, weight * majority(p), weight, **options)),
        "nll": mean(-xlogy(p, p) - xlogy(1.0 - p, 1.0 - p)),
        "brier": mean(p * (1.0 - p)),
        "ece": 0.0,
    }
    return {"coin": COIN, "label_ceiling": ceiling, "label_ceiling_reason": None}
