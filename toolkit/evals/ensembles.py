"""One reward of several outputs of reward models, and how far the outputs disagree.

Source: Coste et al. 2024 (arXiv 2310.02743), section 3.3: the mean; worst-case optimisation (WCO), the least of the
outputs; and uncertainty-weighted optimisation (UWO), the mean minus ``uwo_lambda`` times the variance.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Combination = Literal["mean", "wco", "uwo"]


def combined(outputs: ArrayLike, how: Combination, uwo_lambda: float = 0.5) -> NDArray[np.float64]:
    """[...] rewards of [..., M] outputs. The variance is that of the M outputs: its sum is divided by M.

    >>> [float(combined([1.0, 3.0], how)) for how in ("mean", "wco", "uwo")]
    [2.0, 1.0, 1.5]
    """
    values = np.asarray(outputs, dtype=np.float64)
    if how == "wco":
        return np.asarray(values.min(-1))
    mean = values.mean(-1)
    return np.asarray(mean - uwo_lambda * values.var(-1) if how == "uwo" else mean)


def disagreement(outputs: ArrayLike) -> NDArray[np.float64]:
    """[...] standard deviations of [..., M] outputs: large where a response lies outside of the training data.

    >>> float(disagreement([1.0, 3.0]))
    1.0
    """
    return np.asarray(np.asarray(outputs, dtype=np.float64).std(-1))
