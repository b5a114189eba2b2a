from __future__ import annotations

import numpy as np
import pytest

from toolkit.errors import DataError
from toolkit.evals.slices import agreement_by_slice, disagreements

Comparisons = list[tuple[int, int, int, float, float]]


def pairs(n: int) -> tuple[list[str], Comparisons, list, list, list]:
    """Pairs with the first preferred: explicit right when it is longer, implicit right when it is shorter."""
    lengths = [np.array([10.0, 11.0 + k])[:: 1 if k % 2 else -1] for k in range(n)]
    explicit = [length * 1.0 for length in lengths]
    implicit = [-length for length in lengths]
    return [f"p{k}" for k in range(n)], [(k, 0, 1, 1.0, 1.0) for k in range(n)], explicit, implicit, lengths


def test_slices_partition_the_comparisons_and_show_where_a_reward_fails() -> None:
    ids, comparisons, explicit, implicit, lengths = pairs(30)
    result = agreement_by_slice(ids, comparisons, explicit, implicit, lengths, n_resamples=50)
    assert set(result) == {"length_difference", "explicit_margin", "implicit_margin"}
    for rows in result.values():
        assert sum(row["n_pairs"] for row in rows) == 30
        assert all(a["high"] < b["low"] for a, b in zip(rows, rows[1:], strict=False))
        assert all(row["agreement"]["value"] == 0.0 for row in rows)
    by_length = result["length_difference"]
    assert by_length[0]["high"] < 0 < by_length[-1]["low"]
    assert (by_length[0]["accuracy_explicit"]["value"], by_length[0]["accuracy_implicit"]["value"]) == (0.0, 1.0)
    assert (by_length[-1]["accuracy_explicit"]["value"], by_length[-1]["accuracy_implicit"]["value"]) == (1.0, 0.0)


def test_the_length_difference_is_towards_the_preferred_and_ties_have_none() -> None:
    comparisons: Comparisons = [(0, 0, 1, 0.0, 1.0), (1, 0, 1, 0.5, 1.0), (2, 0, 1, 1.0, 1.0)]
    rewards = [np.array([0.0, 1.0])] * 3
    lengths = [np.array([3.0, 10.0])] * 3
    rows = agreement_by_slice(["a", "b", "c"], comparisons, rewards, rewards, lengths, n_resamples=10)
    assert sorted((row["low"], row["n_pairs"]) for row in rows["length_difference"]) == [(-7.0, 1), (7.0, 1)]
    assert [row["n_pairs"] for row in rows["explicit_margin"]] == [3]  # equal values are never parted


def test_disagreements_by_hand() -> None:
    explicit = [[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0], [5.0, 0.0]]
    implicit = [[0.0, 1.0], [0.0, 1.0], [0.0, 3.0], [2.0, 0.0], [0.0, 0.1]]
    comparisons: Comparisons = [(k, 0, 1, 1.0, 1.0) for k in range(5)]
    # Pair 1 agrees, pair 3 is a tie of one; 2 is the clearest, and 4 is sure in one of the two only.
    assert disagreements(comparisons, explicit, implicit) == [(2, 3.0, -3.0), (0, 1.0, -1.0), (4, 5.0, -0.1)]
    assert disagreements(comparisons[1:2], explicit, implicit) == []


def test_comparisons_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError):
        disagreements([(0, 0, 5, 1.0, 1.0)], [[0.0, 1.0]], [[0.0, 1.0]])
