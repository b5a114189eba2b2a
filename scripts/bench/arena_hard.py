"""Coverage of the interval that Arena-Hard-Auto prints, and of duel's on the same battles, in a simulation.

usage: python scripts/bench/arena_hard.py [--runs 1000] [--prompts 500]

A judge compares a model with the baseline on each prompt in both orders. Prompts differ in how likely the model wins,
so both games of one prompt are alike; the judge likes the first place a little; half of the wins are clear ("A>>B"),
and Arena-Hard counts a clear win as three battles. Its interval: the 5% and the 95% quantile of the win rate in 100
bootstrap draws of the battles. Ours: 95% over prompts (BCa, 1,000 draws), each with the mean of its games; and the 90%
one for a like comparison. Truth is each estimator's own value on 400,000 prompts. What was measured is written to
``results/arena_hard.json`` beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import date

import harness
import numpy as np
from numpy.typing import NDArray

from toolkit.evals.intervals import bootstrap_mean

Games = NDArray[np.float64]


def games(rng: np.random.Generator, n: int, spread: float, ability: float) -> tuple[Games, Games]:
    """The model's results (n, 2) in both orders, and how many battles Arena-Hard makes of each."""
    skill = ability + spread * rng.standard_normal(n)
    shown_first = 0.3
    logits = skill[:, None] + np.array([-shown_first, shown_first])
    draw = rng.logistic(size=(n, 2))
    won = logits > draw
    tied = np.abs(logits - draw) < 0.25
    clear = ~tied & (rng.random((n, 2)) < 0.5)
    return np.where(tied, 0.5, won.astype(float)), np.where(clear, 3.0, 1.0)


def arena_hard_interval(rng: np.random.Generator, results: Games, weights: Games) -> tuple[float, float]:
    """Quantiles 5 and 95 of 100 draws over battles: with two systems Bradley-Terry's win rate is the mean battle."""
    battles = np.repeat(results.ravel(), weights.ravel().astype(int))
    draws = battles[rng.integers(0, len(battles), size=(100, len(battles)))].mean(axis=1)
    low, high = np.quantile(draws, [0.05, 0.95])
    return float(low), float(high)


def coverage(n: int, spread: float, runs: int, ability: float = 0.3) -> dict[str, float]:
    """Share of runs whose interval holds the truth, and mean widths."""
    results, weights = games(np.random.default_rng(99), 400_000, spread, ability)
    truth_battles, truth_prompts = float(np.average(results, weights=weights)), float(results.mean())
    alike = float(np.corrcoef(results[:, 0], results[:, 1])[0, 1])
    inside: dict[str, list[float]] = {"arena_hard": [], "duel_95": [], "duel_90": []}
    widths: dict[str, list[float]] = {name: [] for name in inside}
    for run in range(runs):
        rng = np.random.default_rng([7, run])
        results, weights = games(rng, n, spread, ability)
        rows: Sequence[tuple[str, float, tuple[float | None, float | None]]] = [
            ("arena_hard", truth_battles, arena_hard_interval(rng, results, weights)),
            *(
                (name, truth_prompts, (estimate.ci_low, estimate.ci_high))
                for name, level in (("duel_95", 0.95), ("duel_90", 0.9))
                for estimate in [bootstrap_mean(results.mean(axis=1), n_resamples=1000, confidence=level, seed=run)]
            ),
        ]
        for name, truth, (low, high) in rows:
            assert low is not None and high is not None
            inside[name].append(low <= truth <= high)
            widths[name].append(high - low)
    return {
        "prompts": n,
        "correlation_of_both_games": round(alike, 3),
        **{f"coverage_{name}": round(float(np.mean(values)), 4) for name, values in inside.items()},
        **{f"width_{name}": round(float(np.mean(values)), 4) for name, values in widths.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--day", default=date.today().isoformat())
    options = parser.parse_args()
    rows = [coverage(options.prompts, spread, options.runs) for spread in (0.0, 1.5, 4.0)]
    measured = {
        "command": "python scripts/bench/arena_hard.py",
        "date": options.day,
        "runs": options.runs,
        "rows": rows,
    }
    print(measured)
    harness.write(harness.RESULTS / "arena_hard.json", measured)


if __name__ == "__main__":
    main()
