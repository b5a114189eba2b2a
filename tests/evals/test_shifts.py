"""Accuracy on shifted comparisons: hand-worked numbers, and simulated drops whose size is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolkit.evals.shifts import Scored, shift_accuracy


def scored(units: list[str], implicit: np.ndarray, explicit: np.ndarray | None = None) -> Scored:
    """Pairs whose first response is preferred, from the margins (n,) of both rewards."""
    rewards = [None if margin is None else [np.array([m, 0.0]) for m in margin] for margin in (implicit, explicit)]
    assert rewards[0] is not None
    return Scored(units, [(p, 0, 1, 1.0, 1.0) for p in range(len(units))], *rewards)


def test_the_hand_worked_drops() -> None:
    """Explicit: 4 of 4 right, then 3. Implicit: 3 of 4, then 1, where a margin of 0 is half right."""
    data = scored(list("abcd"), np.array([1, 1, 1, -1]), np.array([1, 1, 1, 1]))
    row = shift_accuracy("x", data, scored(list("abcd"), np.array([0, 0, -1, -1]), np.array([1, 1, 1, -1])))
    values = {name: cell["value"] for name, cell in row.items() if isinstance(cell, dict)}
    assert values == pytest.approx(
        {
            "explicit": 0.75,
            "implicit": 0.25,
            "difference": 0.5,
            "drop_explicit": 0.25,
            "drop_implicit": 0.5,
            "difference_of_drops": 0.25,
        }
    )
    assert (row["name"], row["n"], row["n_paired_prompts"], row["implicit"]["n"]) == ("x", 4, 4, 4)


def test_paired_comparisons_are_those_of_the_same_prompts() -> None:
    data = scored(list("abcd"), np.array([1, 1, -1, -1]))
    row = shift_accuracy("x", data, scored(list("ab"), np.array([1, -1])))
    assert row["drop_implicit"]["value"] == 0.5 and row["n_paired_prompts"] == 2  # from 2 of 2, not from 2 of 4
    assert row["explicit"] is row["difference"] is row["drop_explicit"] is row["difference_of_drops"] is None
    other = shift_accuracy("x", data, scored(list("xy"), np.array([1, -1])))
    assert other["drop_implicit"]["value"] == 0.0 and other["n_paired_prompts"] == 0


def covered(name: str, repeats: int, paired: bool, n_resamples: int) -> float:
    """How often the interval has the true value: accuracies 0.8 and 0.7, which a shift lowers to 0.7 and 0.5."""
    rng = np.random.default_rng(0)
    truth = {"implicit": 0.5, "explicit": 0.7, "difference": 0.2, "drop_implicit": 0.2, "difference_of_drops": 0.1}
    n, inside = 120, 0
    for seed in range(repeats):
        difficulty = rng.random((2, n))  # of a pair for both rewards alike, and for the shifted one too where paired
        second = difficulty[0] if paired else difficulty[1]
        margins: list[Any] = [np.where(difficulty[0] < rate, 1.0, -1.0) for rate in (0.7, 0.8)]
        noisy = np.where(rng.random((2, n)) < 0.5, second, rng.random((2, n)))
        shifted = [np.where(u < rate, 1.0, -1.0) for u, rate in zip(noisy, (0.5, 0.7), strict=True)]
        units = [str(p) for p in range(n)]
        row = shift_accuracy(
            "x",
            scored(units, *margins),
            scored(units if paired else [f"other {p}" for p in range(n)], *shifted),
            n_resamples=n_resamples,
            seed=seed,
        )
        inside += row[name]["ci_low"] <= truth[name] <= row[name]["ci_high"]
    return inside / repeats


def test_the_coverage_of_a_few_drops() -> None:
    assert covered("drop_implicit", 40, True, 300) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("name", ["implicit", "difference", "drop_implicit", "difference_of_drops"])
def test_the_coverage_of_each_interval(name: str, paired: bool) -> None:
    assert 0.92 <= covered(name, 400, paired, 1000) <= 0.985
