"""RM-Bench's accuracy by style: three chosen and three rejected responses, each in three styles (Liu et al. 2024).

The styles are, in this order, concise, detailed, and detailed with Markdown (arXiv 2410.16184). A reward that goes by
style finds it easy to prefer a detailed right answer to a concise wrong one, and hard to prefer a concise right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from toolkit.evals.agreement import EstimateDict, estimate_dict
from toolkit.evals.intervals import BootstrapOptions, Floats, bootstrap_share

STYLES = ("concise", "detailed", "markdown")


def style_matrix(
    chosen: Sequence[ArrayLike], rejected: Sequence[ArrayLike], prompt_ids: Sequence[str], options: BootstrapOptions
) -> dict[str, Any] | None:
    """``matrix[i][j]`` is the accuracy of a chosen response in style i against a rejected one in style j.

    ``normal`` is the mean of its diagonal, ``hard`` of what lies above it (the chosen one is the plainer), ``easy`` of
    what lies below. ``chosen`` and ``rejected`` are (N, 3) rewards. Equal rewards count half. None without any row.

    >>> matrix = style_matrix([[0, 1, 2]], [[0.5, 1.5, 2.5]], ["a"], {"n_resamples": 9, "confidence": 0.9, "seed": 0})
    >>> [matrix[name]["value"] for name in ("easy", "normal", "hard")]
    [1.0, 0.0, 0.0]
    """
    if not chosen:
        return None
    right, wrong = (np.asarray(rewards, dtype=np.float64) for rewards in (chosen, rejected))
    difference = right[:, :, None] - wrong[:, None, :]
    correct = np.where(difference > 0.0, 1.0, np.where(difference < 0.0, 0.0, 0.5))
    count = np.ones(len(right))

    def accuracy(of_row: Floats) -> EstimateDict:
        return estimate_dict(bootstrap_share(prompt_ids, of_row, count, **options))

    styles = range(len(STYLES))
    above, below = np.triu_indices(3, 1), np.tril_indices(3, -1)
    return {
        "styles": list(STYLES),
        "matrix": [[accuracy(correct[:, i, j]) for j in styles] for i in styles],
        "easy": accuracy(correct[:, below[0], below[1]].mean(axis=1)),
        "normal": accuracy(np.einsum("nii->ni", correct).mean(axis=1)),
        "hard": accuracy(correct[:, above[0], above[1]].mean(axis=1)),
    }
