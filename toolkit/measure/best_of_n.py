"""Best of n samples of SFT by each reward, for every n that its pool of samples reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from toolkit.evals.best_of_n import MAX_N, best_of_n_curve, exact_best_of_n_kl
from toolkit.evals.intervals import BootstrapOptions
from toolkit.preferences.samples import Sample, by_prompt

PICKS = {"explicit": "explicit_reward", "implicit": "implicit_reward"}
VALUES = {"gold": "gold_reward", **PICKS}


def best_of_n_rows(samples: Sequence[Sample], options: BootstrapOptions) -> list[dict[str, Any]]:
    """The rows of ``best_of_n`` in the results: for each reward that picks, and each one that measures, a row for n.

    ``samples`` are scored; those of SFT are the pools, of which the smallest sets the largest n. Empty where a prompt
    has a single one. Rewards that are not known for all samples measure nothing.
    """
    pools = list(by_prompt(sample for sample in samples if sample.policy == "sft").values())
    n_max = min(min((len(pool) for pool in pools), default=0), MAX_N)
    if n_max < 2:
        return []
    values = {name: _column(pools, column) for name, column in VALUES.items()}
    rows = []
    for picks in PICKS:
        picked_by = values[picks]
        if picked_by is None:
            continue
        kl_nats = _exact_kl(pools, picked_by, n_max)
        for measures, measured in values.items():
            if measured is not None:
                curve = best_of_n_curve(picked_by, measured, n_max, exact_kl_nats=kl_nats, **options)
                rows += [{"picked_by": picks, "measured_by": measures, **point.as_dict()} for point in curve]
    return rows


def _column(pools: Sequence[Sequence[Sample]], column: str) -> list[list[float]] | None:
    values = [[getattr(sample, column) for sample in pool] for pool in pools]
    return None if any(value is None for of_pool in values for value in of_pool) else values


def _exact_kl(pools: Sequence[Sequence[Sample]], rewards: Sequence[Sequence[float]], n_max: int) -> list[float] | None:
    """The mean exact KL of n = 1..n_max over prompts; None where a pool does not hold every response there is.

    It does where the probabilities of its distinct responses sum to one, as they do for a policy of few choices.
    """
    distributions = []
    for pool, of_pool in zip(pools, rewards, strict=True):
        distinct = {tuple(sample.response_ids): k for k, sample in enumerate(pool)}
        if any(sample.policy_logp is None for sample in pool):
            return None
        p = np.exp([float(pool[k].policy_logp or 0.0) for k in distinct.values()])
        if abs(float(p.sum()) - 1.0) > 1e-6:
            return None
        distributions.append((p, np.array([of_pool[k] for k in distinct.values()])))
    return [
        float(np.mean([exact_best_of_n_kl(p, of_pool, n) for p, of_pool in distributions])) for n in range(1, n_max + 1)
    ]
