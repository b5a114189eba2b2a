"""Annotators who disagree with the others are found, and equal ones are not."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.evals.odd_annotators import odd_annotators


def judged(
    errors: dict[str, float], n: int, seed: int, per_prompt: int = 1
) -> tuple[list[dict[str, float]], list[int]]:
    """Pairs whose first response is better, which each annotator gets wrong with a probability, and their prompts.

    The pairs of a prompt are judged alike: who errs on one errs on all.
    """
    rng = np.random.default_rng(seed)
    units = []
    for _ in range(n):
        of_prompt = {name: float(rng.random() >= share) for name, share in errors.items()}
        units += [of_prompt] * per_prompt
    return units, [k // per_prompt for k in range(len(units))]


@pytest.mark.parametrize(
    ("errors", "n"),
    [
        ({"a": 0.2, "b": 0.2, "c": 0.5}, 1000),  # a coin
        ({"a": 0.1, "b": 0.1, "c": 0.5}, 150),
        ({"a": 0.2, "b": 0.2, "c": 0.8}, 100),  # labels swapped
        ({"a": 0.2, "b": 0.2, "c": 0.5, "d": 0.2}, 600),
    ],
)
def test_who_flips_coins_is_found(errors: dict[str, float], n: int) -> None:
    found = [[odd.name for odd in odd_annotators(*judged(errors, n, seed))] for seed in range(20)]
    assert sum(names == ["c"] for names in found) >= 18 and all(set(names) <= {"c"} for names in found)


def test_a_coin_among_many_pairs() -> None:
    [odd] = odd_annotators(*judged({"a": 0.2, "b": 0.2, "c": 0.5}, 4000, 0))
    assert (odd.name, odd.n) == ("c", 4000) and odd.p_value < 1e-9
    assert odd.agreement == pytest.approx(0.5, abs=0.03) and odd.others_agreement == pytest.approx(0.68, abs=0.03)


@pytest.mark.parametrize(("n", "per_prompt"), [(8, 1), (30, 1), (30, 6), (200, 1)])
@pytest.mark.parametrize("errors", [{"a": 0.2, "b": 0.2, "c": 0.2}, {"a": 0.3, "b": 0.3, "c": 0.3, "d": 0.3}])
def test_equal_annotators_are_rarely_odd(errors: dict[str, float], n: int, per_prompt: int) -> None:
    """In 400 simulations at most 5% have a finding, and three standard errors; pairs of one prompt are one."""
    found = [bool(odd_annotators(*judged(errors, n, seed, per_prompt))) for seed in range(400)]
    assert np.mean(found) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_who_judges_with_one_other_only_is_compared_by_shares() -> None:
    pairs = [{"a": 1.0, "b": 1.0}] * 20 + [{"a": 1.0, "c": 0.0}] * 20
    assert [odd.name for odd in odd_annotators(pairs)] == ["c"]
    assert odd_annotators(pairs, [0] * 20 + [1] * 20) == []  # two prompts
    assert odd_annotators(pairs[20:]) == []  # two annotators cannot tell
    assert odd_annotators([]) == []
