"""Where an implicit and an explicit reward differ: agreement by slice of the comparisons, and the disagreements.

Comparisons are tuples ``(prompt_index, i, j, p, weight)`` as in :mod:`toolkit.evals.agreement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolkit.evals.agreement import (
    Comparison,
    comparison_columns,
    estimate_dict,
    margins,
    order_agreement,
    pairwise_accuracy,
)
from toolkit.evals.intervals import BootstrapOptions

_SLICES = 3


def agreement_by_slice(
    prompt_ids: Sequence[str],
    comparisons: Sequence[Comparison],
    explicit: Sequence[ArrayLike],
    implicit: Sequence[ArrayLike],
    lengths: Sequence[ArrayLike],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy of both rewards and their agreement in thirds of the comparisons.

    The comparisons are cut into thirds by ``length_difference`` (tokens of the preferred response minus those of the
    other; ties are left out), by ``explicit_margin`` and by ``implicit_margin`` (absolute difference of the rewards).
    Each slice has its bounds ``low`` and ``high``, ``n_pairs``, and the estimates with intervals over prompts. Where
    values repeat there are fewer slices.

    Raises:
        DataError: comparisons and rewards that do not fit each other.
    """
    prompt, i, j, p, _ = comparison_columns(comparisons, explicit)
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    measures = {
        "length_difference": np.where(p == 0.5, np.nan, np.sign(p - 0.5) * margins(lengths, prompt, i, j)),
        "explicit_margin": np.abs(margins(explicit, prompt, i, j)),
        "implicit_margin": np.abs(margins(implicit, prompt, i, j)),
    }
    out: dict[str, list[dict[str, Any]]] = {}
    for name, values in measures.items():
        out[name] = []
        for indices in _thirds(values):
            part = [comparisons[k] for k in indices]
            out[name].append(
                {
                    "low": float(values[indices].min()),
                    "high": float(values[indices].max()),
                    "n_pairs": len(part),
                    "accuracy_explicit": estimate_dict(
                        pairwise_accuracy(part, explicit, prompt_ids=prompt_ids, **options)
                    ),
                    "accuracy_implicit": estimate_dict(
                        pairwise_accuracy(part, implicit, prompt_ids=prompt_ids, **options)
                    ),
                    "agreement": estimate_dict(
                        order_agreement(part, explicit, implicit, prompt_ids=prompt_ids, **options)
                    ),
                }
            )
    return out


def _thirds(values: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Indices of the values in thirds by size. Equal values stay together; a NaN is in none of the thirds."""
    known = np.flatnonzero(~np.isnan(values))
    if len(known) == 0:
        return []
    cuts = np.unique(np.quantile(values[known], np.arange(1, _SLICES) / _SLICES))
    third = np.searchsorted(cuts, values[known], side="left")
    return [known[third == k] for k in range(len(cuts) + 1) if np.any(third == k)]


def disagreements(
    comparisons: Sequence[Comparison], explicit: Sequence[ArrayLike], implicit: Sequence[ArrayLike]
) -> list[tuple[int, float, float]]:
    """(index of the comparison, explicit margin, implicit margin) where the two rewards order a pair differently.

    The clearest disagreement comes first: the one whose smaller margin is largest, each margin in units of the root
    mean square of its reward.

    Raises:
        DataError: comparisons and rewards that do not fit each other.
    """
    prompt, i, j, _, _ = comparison_columns(comparisons, explicit)
    comparison_columns(comparisons, implicit)
    x, y = margins(explicit, prompt, i, j), margins(implicit, prompt, i, j)
    opposite = np.flatnonzero(x * y < 0.0)
    if len(opposite) == 0:
        return []
    smaller = np.minimum(np.abs(x) / np.sqrt(np.mean(x * x)), np.abs(y) / np.sqrt(np.mean(y * y)))
    order = opposite[np.argsort(-smaller[opposite], kind="stable")]
    return [(int(k), float(x[k]), float(y[k])) for k in order]
