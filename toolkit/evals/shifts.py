"""How far the accuracy of rewards falls on shifted versions of comparisons: the check away from the training data.

Published for comparison: implicit rewards lose 3% on average and up to 7% against explicit ones (Lin et al. 2024,
2409.03650), and follow surface cues (Razin et al. 2025, 2507.07981).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from toolkit.evals.agreement import (
    Comparison,
    EstimateDict,
    agreement_with_preference,
    comparison_columns,
    estimate_dict,
    margins,
)
from toolkit.evals.intervals import BootstrapOptions, Floats, bootstrap_statistic, sums_by_prompt


@dataclass(frozen=True)
class Scored:
    """Comparisons with two rewards, arrays (K,) by row. ``units[p]`` names what row p is resampled with."""

    units: Sequence[str]
    comparisons: Sequence[Comparison]
    implicit: Sequence[ArrayLike]
    explicit: Sequence[ArrayLike] | None = None


def shift_accuracy(
    name: str,
    data: Scored,
    shifted: Scored,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of both rewards on shifted comparisons, and what it falls by from that on the data.

    Rows of equal ``units`` in both are resampled together, so that the same comparisons are paired; others count as
    independent. ``difference`` is explicit less implicit on the shifted ones, ``drop_*`` the data's accuracy less the
    shifted one, and ``difference_of_drops`` how much more the implicit reward loses. All are None without an explicit
    reward, except those of the implicit one. ``n`` counts shifted comparisons, ``n_paired_prompts`` units in both.
    """
    common = set(data.units) & set(shifted.units)
    if common:  # what the data has beyond the shifted comparisons is of other prompts
        inside = {p for p, unit in enumerate(data.units) if unit in common}
        data = Scored(data.units, [c for c in data.comparisons if c[0] in inside], data.implicit, data.explicit)
    sums = _sums(data, shifted)
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}

    def estimate(statistic: Any) -> EstimateDict:
        return estimate_dict(bootstrap_statistic(sums, statistic, **options))

    row: dict[str, Any] = {"name": name, "n": len(shifted.comparisons), "n_paired_prompts": len(common)}
    row["explicit"] = row["difference"] = row["drop_explicit"] = row["difference_of_drops"] = None
    row["implicit"] = estimate(lambda w, i, e, sw, si, se: si / sw)
    row["drop_implicit"] = estimate(lambda w, i, e, sw, si, se: i / w - si / sw)
    if data.explicit is not None:
        row["explicit"] = estimate(lambda w, i, e, sw, si, se: se / sw)
        row["difference"] = estimate(lambda w, i, e, sw, si, se: (se - si) / sw)
        row["drop_explicit"] = estimate(lambda w, i, e, sw, si, se: e / w - se / sw)
        row["difference_of_drops"] = estimate(lambda w, i, e, sw, si, se: (i - e) / w - (si - se) / sw)
    return row


def _sums(data: Scored, shifted: Scored) -> list[Floats]:
    """For each unit: weight, and the weight that each reward orders right, on the data and then on the shifted."""
    columns = [_columns(data), _columns(shifted)]
    units = [*columns[0][0], *columns[1][0]]
    n_data = len(columns[0][0])
    parts = []
    for side, (_, *values) in enumerate(columns):
        for value in values:
            padded = np.zeros(len(units))
            padded[n_data * side : n_data * side + len(value)] = value
            parts.append(padded)
    return sums_by_prompt(units, *parts)


def _columns(scored: Scored) -> tuple[list[str], Floats, Floats, Floats]:
    """By comparison: its unit, its weight, and how much of that the implicit and the explicit reward order right."""
    prompt, i, j, p, weight = comparison_columns(scored.comparisons, scored.implicit)
    right = weight * agreement_with_preference(margins(scored.implicit, prompt, i, j), p)
    explicit = np.zeros(len(weight))
    if scored.explicit is not None:
        comparison_columns(scored.comparisons, scored.explicit)
        explicit = weight * agreement_with_preference(margins(scored.explicit, prompt, i, j), p)
    return [scored.units[k] for k in prompt], weight, right, explicit
