"""The expected best of n, against all subsets of a pool, and its KL, against sampling."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from toolkit.errors import DataError
from toolkit.evals.best_of_n import best_of_n_curve, best_of_n_kl, best_of_n_weights, exact_best_of_n_kl

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


# ---------------------------------------------------------------- the curve


def test_the_curve_is_the_hand_worked_one() -> None:
    """Of rewards 1, 2, 3 valued 10, 0, 40: the mean is 50/3; of the pairs {1,2} gives 0, {1,3} and {2,3} give 40."""
    curve = best_of_n_curve([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], [[10.0, 0.0, 40.0], [1.0, 2.0, 6.0]], 3)
    assert [point.n for point in curve] == [1, 2, 3]
    assert [point.value for point in curve] == pytest.approx([(50 / 3 + 3) / 2, (80 / 3 + 3) / 2, (40 + 3) / 2])
    assert [point.kl_nats for point in curve] == pytest.approx([0.0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    assert all(point.n_prompts == 2 and not point.kl_exact for point in curve)


def test_the_curve_goes_to_64_and_equals_the_mean_over_drawn_subsets() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.integers(0, 20, size=80).astype(float), rng.normal(size=80)
    curve = best_of_n_curve([rewards, rewards], [values, values], 64)
    assert [point.n for point in curve] == [1, 2, 4, 8, 16, 32, 64]
    for point in curve:
        drawn = rng.permuted(np.tile(np.arange(80), (20_000, 1)), axis=1)[:, : point.n]
        best = drawn[np.arange(len(drawn)), rewards[drawn].argmax(axis=1)]  # a random one of the best comes first
        assert point.value == pytest.approx(values[best].mean(), abs=0.03)


@pytest.mark.parametrize(
    ("rewards", "values", "n_max", "message"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 3, "best of 3 from a pool of 2"),
        ([[1.0, np.nan]], [[1.0, 2.0]], 2, "not finite"),
        ([[1.0, 2.0]], [[1.0]], 1, "values"),
        ([[1.0] * 65], [[1.0] * 65], 65, "best of 65"),
        ([[1.0]], [[1.0]], 0, "best of 0"),
        ([], [], 1, "no pool"),
    ],
)
def test_what_gives_no_curve_is_refused(rewards: list, values: list, n_max: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        best_of_n_curve(rewards, values, n_max)


# ---------------------------------------------------------------- the distance


def test_the_bound() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    with pytest.raises(DataError):
        best_of_n_kl(0)


def test_the_exact_kl_is_that_of_the_distribution_of_the_best() -> None:
    """By listing every draw of n, the equally good ones sharing it."""
    p, rewards = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.0, 1.0, 1.0, 2.0])
    for n in (1, 2, 3):
        best = np.zeros(4)
        for draw in np.ndindex(*[4] * n):
            tops = [y for y in draw if rewards[y] == max(rewards[list(draw)])]
            for y in tops:
                best[y] += np.prod(p[list(draw)]) / len(tops)
        assert exact_best_of_n_kl(p, rewards, n) == pytest.approx(np.sum(best * np.log(best / p)))
        assert exact_best_of_n_kl(p, rewards, n) <= best_of_n_kl(n) + 1e-12


def test_the_exact_kl_at_its_ends() -> None:
    assert exact_best_of_n_kl([0.3, 0.7], [1.0, 1.0], 8) == pytest.approx(0.0)  # nothing to pick by
    assert exact_best_of_n_kl([0.25, 0.75, 0.0], [1.0, 0.0, 9.0], 1000) == pytest.approx(math.log(4))  # the best alone
    rare = np.full(100_000, 1e-5)
    assert exact_best_of_n_kl(rare, np.arange(100_000.0), 16) == pytest.approx(best_of_n_kl(16), abs=1e-3)
    for p, n in (([0.5, 0.4], 2), ([0.5, 0.5], 0), ([-0.5, 1.5], 2)):
        with pytest.raises(DataError):
            exact_best_of_n_kl(p, [0.0, 1.0], n)
