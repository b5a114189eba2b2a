"""The expected best of n trials, against all subsets of trials."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from toolkit.evals.study.effort import best_of_n_weights

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("ties", [False, True])
def test_the_weights_are_those_of_all_subsets(ties: bool) -> None:
    rng = np.random.default_rng(0)
    dev = rng.integers(0, 3, size=7).astype(float) if ties else rng.normal(size=7)
    weights = best_of_n_weights(dev)
    for n in range(1, 8):
        expected = np.zeros(7)
        subsets = list(combinations(range(7), n))
        for subset in subsets:
            best = max(dev[t] for t in subset)
            winners = [t for t in subset if dev[t] == best]
            for t in winners:
                expected[t] += 1 / len(winners) / len(subsets)
        assert weights[n - 1] == pytest.approx(expected)


def test_one_trial_is_the_mean_and_all_are_the_best() -> None:
    dev = np.array([0.2, -np.inf, 0.9, 0.5])
    weights = best_of_n_weights(dev)
    assert weights[0] == pytest.approx(np.full(4, 0.25))
    assert weights[-1].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert weights.sum(axis=1) == pytest.approx(np.ones(4))


def test_it_has_no_bias_where_sampling_with_replacement_has_one() -> None:
    """Tang et al. 2020: over samples of 5 trials, the best of 4 is too low with replacement, and right without."""
    rng = np.random.default_rng(3)
    values = np.sort(rng.normal(size=(20_000, 5)), axis=1)
    truth = rng.normal(size=(200_000, 4)).max(axis=1).mean()
    without = (values @ best_of_n_weights(np.arange(5.0))[3]).mean()
    cumulated = (np.arange(6) / 5) ** 4
    replaced = (values @ np.diff(cumulated)).mean()
    assert without == pytest.approx(truth, abs=0.015)
    assert replaced < truth - 0.1
