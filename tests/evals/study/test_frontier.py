"""Frontiers, the range that arms share, and interpolation, against written-out rules."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.evals.study.frontier import N_GRID, frontier, shared_grid, upper_hull, weights_along

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_is_what_no_chord_passes_above(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 8, size=12).astype(float), rng.normal(size=12)
    expected = []
    for i in range(12):
        above = [j for j in range(12) if x[j] == x[i] and y[j] > y[i]]
        chords = [
            (a, b) for a in range(12) for b in range(12) if x[a] < x[i] < x[b]
            and y[a] + (y[b] - y[a]) * (x[i] - x[a]) / (x[b] - x[a]) >= y[i]
        ]  # fmt: skip
        if not above and not chords:
            expected.append(i)
    assert upper_hull(x, y).tolist() == sorted(expected, key=lambda i: x[i])


def test_a_frontier_over_cost_ends_at_its_peak() -> None:
    x, y = np.array([1.0, 4.0, 9.0, 16.0]), np.array([0.0, 2.0, 3.0, 1.0])
    assert frontier(x, y, until_peak=False).tolist() == [0, 1, 2, 3]
    assert frontier(x, y, until_peak=True).tolist() == [0, 1, 2]


def test_the_grid_covers_what_every_seed_of_both_arms_covers() -> None:
    grid = shared_grid(np.array([[0.5, 6.0], [0.8, 7.0]]), np.array([[1.0, 5.0], [0.2, 9.0]]))
    assert grid is not None and grid.x_G[[0, -1]].tolist() == [1.0, 5.0] and len(grid.x_G) == N_GRID
    assert grid.weight_G @ grid.x_G == pytest.approx(3.0)
    assert grid.weight_G @ grid.x_G**2 == pytest.approx((5**3 - 1) / 3 / 4, rel=1e-3)


def test_ranges_that_miss_each_other() -> None:
    assert shared_grid(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])) is None
    grid = shared_grid(np.array([[1.00e6]]), np.array([[1.03e6]]))  # equal budgets within 5%
    assert grid is not None and grid.x_G.tolist() == [1.03e6] and grid.weight_G.tolist() == [1.0]


def test_weights_are_linear_in_the_square_root() -> None:
    x = np.array([[1.0, 4.0, 16.0], [9.0, 1.0, 4.0]])
    grid = np.array([0.25, 1.0, 2.25, 9.0, 25.0])
    first = [[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]]
    second = [[0, 1, 0], [0, 1, 0], [0, 0.5, 0.5], [1, 0, 0], [1, 0, 0]]  # the same rule, in this seed's own order
    assert weights_along(x, grid) == pytest.approx(np.stack([first, second], axis=1))
