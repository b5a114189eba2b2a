"""Which of many values are equal, in a few bytes for each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]


def first_of_equals(values: NDArray[Any]) -> tuple[Places, Places]:
    """Where each distinct value is first, in order (n_distinct,), and of each value which of these is equal to it (n,).

    >>> [found.tolist() for found in first_of_equals(np.array([7, 3, 7, 5]))]
    [[0, 1, 3], [0, 1, 0, 2]]
    """
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def equals(values: NDArray[np.int64]) -> Iterator[Places]:
    """The places of each distinct value, in the order in which the values are first.

    >>> [places.tolist() for places in equals(np.array([7, 3, 7, 5]))]
    [[0, 2], [1], [3]]
    """
    _, which = first_of_equals(values)
    order, ends = np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))
    return (order[start:end] for start, end in pairwise([0, *ends.tolist()]))
