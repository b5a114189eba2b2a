"""What would change the verdict: the prompts, or the seeds, that an undecided comparison lacks.

The win rate and the variance parts are taken to stay where they are, and the size is the smallest at which 80% of
studies would find the difference (``POWER``). Both come from few seeds themselves, so the size is a rough one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolkit.evals.study.crossed import CrossedMean
from toolkit.evals.verdict import SMALLEST_EFFECT, Decision

POWER = 0.8
MOST_PROMPTS, MOST_SEEDS = 1_000_000, 100
CONTAINS_HALF = "the interval contains one half"
# At 80% power the interval ends 1.7 times as far from one half as the win rate: (1.96 + 2.80) / 2.80. Nearer win rates
# end within the smallest effect.
_REACH = 1.7


def needed(
    mean: CrossedMean | None,
    decision: Decision,
    lacking: str | None = None,
    *,
    smallest_effect: float = SMALLEST_EFFECT,
) -> dict[str, Any]:
    """One comparison's row of ``verdict.needed``. ``lacking`` is the reason where there is no comparison.

    ``n_prompts`` is a number of test prompts at the present seeds, and ``n_seeds`` a number of seeds of each arm at the
    present prompts. An arm that has more seeds already keeps them. A number that is None has a reason. A decided
    comparison has no numbers; ``nearest_bound`` is then the bound of its interval that is nearest to another finding:
    the one nearest to one half, or, where there is no practical difference, the one farthest from it.

    With the said number about 80% of studies decide this comparison, if the win rate is the true one: 64% to 85% in
    simulated studies of 3 to 8 seeds.
    """
    if mean is None:
        return _row(decision, reason=lacking)
    if decision.finding != "undecided":
        bounds = [bound for bound in mean.interval(bounds=(0.0, 1.0)) if bound is not None]
        nearest = min if decision.finding == "better" else max
        return _row(decision, nearest_bound=nearest(bounds, key=lambda bound: abs(bound - 0.5)))
    if decision.reason != CONTAINS_HALF:
        return _row(decision, reason=decision.reason)
    if mean.parts is None:
        return _row(decision, reason="all prompts have the same win rate, which says nothing of their spread")
    if abs(mean.value - 0.5) <= smallest_effect / _REACH:
        what = (
            f"a win rate of {mean.value:.1%} is so near to one half that more data would find no practical difference"
        )
        return _row(decision, reason=what)
    seeds, prompts = mean.parts.n_seeds, mean.n_prompts

    def with_prompts(n: int) -> float:
        return mean.power(0.5, seeds, n)

    def with_seeds(n: int) -> float:
        return mean.power(0.5, [max(k, n) for k in seeds], prompts)

    n_prompts = smallest(with_prompts, prompts + 1, MOST_PROMPTS)
    n_seeds = smallest(with_seeds, min(seeds) + 1, MOST_SEEDS)
    count = " and ".join(str(k) for k in dict.fromkeys(seeds))
    row = _row(decision, n_prompts=n_prompts, n_seeds=n_seeds)
    if n_prompts is None:
        row["n_prompts_reason"] = f"no number of prompts would do with {count} seeds: the seeds differ too much"
    if n_seeds is None:
        row["n_seeds_reason"] = (
            f"not even {MOST_SEEDS} seeds would do with {prompts} prompts: the prompts differ too much"
        )
    return row


def smallest(power: Callable[[int], float], first: int, last: int) -> int | None:
    """The smallest number from ``first`` to ``last`` whose power is ``POWER``; None where even ``last`` is too few.

    >>> smallest(lambda n: n / 1000, 4, 10_000), smallest(lambda n: n / 1000, 4, 700)
    (800, None)
    """
    if last < first or power(last) < POWER:
        return None
    low, high = first - 1, last  # what is below is too few, and ``high`` is enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def _row(
    decision: Decision,
    *,
    n_prompts: int | None = None,
    n_seeds: int | None = None,
    reason: str | None = None,
    nearest_bound: float | None = None,
) -> dict[str, Any]:
    return {
        "finding": decision.finding,
        "n_prompts": n_prompts,
        "n_prompts_reason": reason,
        "n_seeds": n_seeds,
        "n_seeds_reason": reason,
        "nearest_bound": nearest_bound,
    }
