"""How good a reward is at judging the steps of solutions, with intervals over prompts.

Every figure is ``{value, ci_low, ci_high, n}``; n counts prompts. Steps of one prompt, and its solutions, are no
independent observations: whole prompts are resampled. A step whose score is at least the threshold is called right.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from toolkit.evals.agreement import EstimateDict, estimate_dict
from toolkit.evals.intervals import (
    BootstrapOptions,
    Estimate,
    Floats,
    bca_interval,
    bootstrap_share,
    bootstrap_statistic,
    resamples,
    with_ties,
)

SolutionScore = Literal["min", "product", "last"]
SOLUTION_SCORES: tuple[SolutionScore, ...] = ("min", "product", "last")
PROBABLE = 0.5  # a process reward model calls a step right from this probability on


def solution_score(probabilities: Sequence[float], rule: SolutionScore) -> float:
    """The score of a solution by its steps' probabilities of being right; 0 for one without steps.

    The product is the probability that all steps are right, if they were independent (Lightman et al. 2023, arXiv
    2305.20050); the minimum is the weakest step's (Wang et al. 2023, arXiv 2312.08935).

    >>> [round(solution_score([0.9, 0.5, 0.8], rule), 2) for rule in SOLUTION_SCORES]
    [0.5, 0.36, 0.8]
    """
    if not probabilities:
        return 0.0
    if rule == "last":
        return float(probabilities[-1])
    return float(min(probabilities) if rule == "min" else math.prod(probabilities))


def step_rewards(probabilities: Sequence[float], rule: SolutionScore) -> list[float]:
    """How each step changes the solution score: the first gives its own, and the sum is the score of the solution.

    >>> [round(reward, 2) for reward in step_rewards([0.9, 0.5, 0.8], "min")]
    [0.9, -0.4, 0.0]
    """
    scores = [solution_score(probabilities[: k + 1], rule) for k in range(len(probabilities))]
    return [score - before for score, before in zip(scores, [0.0, *scores], strict=False)]


@dataclass(frozen=True)
class ScoredSolution:
    """A solution with a score for each of its steps: the higher, the more likely the step is right.

    ``labels[k]`` is None where nobody judged step k. The first ``n_shared`` steps count in an earlier solution.
    """

    prompt_id: str
    labels: Sequence[bool | None]
    n_shared: int
    scores: Sequence[float]

    @property
    def counted(self) -> list[int]:
        """The steps that count here: those with a label that no earlier solution has."""
        return [k for k in range(self.n_shared, len(self.labels)) if self.labels[k] is not None]

    @property
    def first_error(self) -> int | None:
        """The index of the first wrong step, the number of steps if all are right, None if a step is not judged."""
        for k, label in enumerate(self.labels):
            if not label:
                return None if label is None else k
        return len(self.labels)


@dataclass(frozen=True)
class _Steps:
    """The steps that count: the prompt of each, whether it is right, its score, and whether it is called right."""

    prompts: list[str]
    right: NDArray[np.bool_]
    score: Floats
    called_right: NDArray[np.bool_]

    @property
    def hit(self) -> NDArray[np.bool_]:
        return np.asarray(self.right == self.called_right)


def process_figures(
    solutions: Sequence[ScoredSolution], options: BootstrapOptions, *, threshold: float | None = None
) -> dict[str, Any]:
    """The figures of one reward on labelled steps.

    ``steps``: accuracy, F1 of the wrong steps and of both classes (macro), and the area under the ROC curve, over all
    pairs of a right and a wrong step and over those of one prompt. ``majority`` is the accuracy of calling every step
    what most of these steps are, and ``over_majority`` what the reward is better by. ``first_error``: the share of
    solutions whose first wrong step is found (none, where there is none), beside ``all_right``, what calling every step
    right gets. ``solutions``: how well the solution scores tell solutions without a wrong step from others.

    Without ``threshold`` it is chosen on other steps: prompts are in two halves, and each half gets the threshold with
    the best accuracy on the other half.
    """
    thresholds = [threshold] * len(solutions) if threshold is not None else cross_thresholds(solutions)
    steps = _steps(solutions, thresholds)
    if not len(steps.right):
        return {"n_steps": 0, "n_solutions": len(solutions), "steps": None, "first_error": None, "solutions": None}
    by_prompt = _Clusters(steps.prompts)
    majority = steps.right == (steps.right.mean() >= 0.5)
    return {
        "n_steps": len(steps.right),
        "n_solutions": len(solutions),
        "right": _share(steps.prompts, steps.right, options),
        "thresholds": sorted(set(thresholds)),
        "steps": {
            "accuracy": _share(steps.prompts, steps.hit, options),
            "majority": _share(steps.prompts, majority, options),
            "over_majority": _difference(steps.prompts, steps.hit, majority, options),
            "f1_wrong": by_prompt.figure(_f1(by_prompt, steps, wrong=True), options),
            "f1_macro": by_prompt.figure(_f1_macro(by_prompt, steps), options),
            **_areas(steps.prompts, steps.right, steps.score, options),
        },
        "first_error": _first_error_figures(solutions, thresholds, options),
        "solutions": _solution_figures(solutions, options),
    }


def paired_figures(
    first: Sequence[ScoredSolution],
    second: Sequence[ScoredSolution],
    options: BootstrapOptions,
    *,
    threshold: float | None = None,
) -> dict[str, EstimateDict]:
    """How much better ``first`` is than ``second`` on the same steps; ``threshold`` is of the first alone.

    Both are drawn with the same prompts, so that what makes a prompt easy for both does not widen the interval.
    """
    of_first = [threshold] * len(first) if threshold is not None else cross_thresholds(first)
    sides = [(first, of_first), (second, cross_thresholds(second))]
    steps = [_steps(*side) for side in sides]
    by_prompt = _Clusters(steps[0].prompts)
    f1, area, area_within = (
        [of(by_prompt, side) for side in steps]
        for of in (_f1_macro, lambda c, s: c.area(s.right, s.score), lambda c, s: c.area(s.right, s.score, within=True))
    )
    found = [_first_errors(*side) for side in sides]
    prompts, hits = found[0][0], [hit for _, hit, _ in found]
    return {
        "accuracy": _difference(steps[0].prompts, steps[0].hit, steps[1].hit, options),
        "f1_macro": by_prompt.figure(lambda counts: f1[0](counts) - f1[1](counts), options),
        "auc": by_prompt.figure(lambda counts: area[0](counts) - area[1](counts), options),
        "auc_within_prompts": by_prompt.figure(lambda counts: area_within[0](counts) - area_within[1](counts), options),
        "first_error": _difference(prompts, hits[0], hits[1], options),
    }


def cross_thresholds(solutions: Sequence[ScoredSolution]) -> list[float]:
    """For each solution the threshold that is best on the steps of prompts in the other half; halves are by a hash."""
    halves = [int(hashlib.sha256(s.prompt_id.encode()).hexdigest(), 16) % 2 for s in solutions]
    best = []
    for half in (0, 1):
        others = [s for s, h in zip(solutions, halves, strict=True) if h != half] or list(solutions)
        labelled = [(s.scores[k], bool(s.labels[k])) for s in others for k in s.counted]
        best.append(best_threshold([score for score, _ in labelled], [right for _, right in labelled]))
    return [best[half] for half in halves]


def best_threshold(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The threshold with the best accuracy: halfway between two scores, or beyond all; the lowest of the best.

    >>> best_threshold([0.1, 0.4, 0.6], [False, True, True])
    0.25
    """
    if not len(scores):
        return 0.0
    values = np.asarray(scores, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    ordered, labels = values[order], np.asarray(right, dtype=np.float64)[order]
    edges = np.concatenate([[ordered[0] - 1.0], (ordered[1:] + ordered[:-1]) / 2.0, [ordered[-1] + 1.0]])
    # With the threshold at edge k, the first k steps are called wrong and the others right.
    hits = np.concatenate([[0.0], np.cumsum(1.0 - labels)]) + labels.sum() - np.concatenate([[0.0], np.cumsum(labels)])
    possible = np.concatenate([[True], ordered[1:] > ordered[:-1], [True]])
    return float(edges[int(np.argmax(np.where(possible, hits, -1.0)))])


def _steps(solutions: Sequence[ScoredSolution], thresholds: Sequence[float]) -> _Steps:
    rows = [
        (s.prompt_id, bool(s.labels[k]), float(s.scores[k]), s.scores[k] >= threshold)
        for s, threshold in zip(solutions, thresholds, strict=True)
        for k in s.counted
    ]
    prompts, right, score, called = zip(*rows, strict=True) if rows else ((), (), (), ())
    return _Steps(list(prompts), np.array(right, bool), np.array(score, np.float64), np.array(called, bool))


def _share(prompts: Sequence[str], part: NDArray[np.bool_], options: BootstrapOptions) -> EstimateDict:
    return estimate_dict(bootstrap_share(prompts, part, np.ones(len(part)), **options))


def _difference(
    prompts: Sequence[str], first: NDArray[np.bool_], second: NDArray[np.bool_], options: BootstrapOptions
) -> EstimateDict:
    """The share of ``first`` minus that of ``second``."""
    by_prompt = _Clusters(prompts)
    difference, whole = by_prompt.sums(first.astype(np.float64) - second), by_prompt.sums(np.ones(len(first)))
    return estimate_dict(bootstrap_statistic([difference, whole], lambda d, n: d / n, **options))


# ---------------------------------------------------------------------------------------------------- first errors
def _first_errors(
    solutions: Sequence[ScoredSolution], thresholds: Sequence[float]
) -> tuple[list[str], NDArray[np.bool_], NDArray[np.bool_]]:
    """Of the solutions whose first wrong step is known: the prompt, whether it is found, and whether all are right."""
    prompts, hits, all_right = [], [], []
    for solution, threshold in zip(solutions, thresholds, strict=True):
        if (true := solution.first_error) is None:
            continue
        called_wrong = (k for k, score in enumerate(solution.scores) if score < threshold)
        prompts.append(solution.prompt_id)
        hits.append(next(called_wrong, len(solution.scores)) == true)
        all_right.append(true == len(solution.labels))
    return prompts, np.array(hits, bool), np.array(all_right, bool)


def _first_error_figures(
    solutions: Sequence[ScoredSolution], thresholds: Sequence[float], options: BootstrapOptions
) -> dict[str, Any] | None:
    prompts, hits, all_right = _first_errors(solutions, thresholds)
    if not prompts:
        return None
    return {
        "n_solutions": len(prompts),
        "accuracy": _share(prompts, hits, options),
        "all_right": _share(prompts, all_right, options),
        "over_all_right": _difference(prompts, hits, all_right, options),
    }


def _solution_figures(solutions: Sequence[ScoredSolution], options: BootstrapOptions) -> dict[str, Any] | None:
    """For each rule, how well the solution's score tells solutions without a wrong step from those with one."""
    known = [(s, s.first_error == len(s.labels)) for s in solutions if s.first_error is not None]
    if len({right for _, right in known}) < 2:
        return None
    prompts, right = [s.prompt_id for s, _ in known], np.array([right for _, right in known])
    figures: dict[str, Any] = {}
    for rule in SOLUTION_SCORES:
        if rule == "product" and any(not 0.0 <= score <= 1.0 for s, _ in known for score in s.scores):
            continue  # no probabilities: nothing to multiply
        scores = np.array([solution_score(s.scores, rule) for s, _ in known])
        figures[rule] = _areas(prompts, right, scores, options)
    return figures


# ---------------------------------------------------------------------------------------------------- whole prompts
Statistic = Callable[[Floats], Floats]
"""From how often each prompt was drawn, (B, n), to a value for each draw (B,)."""


class _Clusters:
    """Observations in their prompts, and statistics of resampled prompts."""

    def __init__(self, prompts: Sequence[str]) -> None:
        names, self.index = np.unique(np.asarray(prompts), return_inverse=True)
        self.n = len(names)

    def sums(self, column: Floats) -> Floats:
        """(n,) the sum of a column inside each prompt."""
        return np.bincount(self.index, weights=column, minlength=self.n).astype(np.float64)

    def area(self, right: NDArray[np.bool_], score: Floats, *, within: bool = False) -> Statistic:
        """The area under the ROC curve: the share of pairs of a right and a wrong observation in the right order.

        Ties count one half. ``within`` takes the pairs inside a prompt alone.
        """
        if within:
            won, pairs = self._pairs_within(right, score)
            return lambda counts: (counts @ won) / (counts @ pairs)
        n_right, n_wrong = self.sums(right.astype(np.float64)), self.sums((~right).astype(np.float64))
        won_PQ = np.zeros((self.n, self.n))  # pairs that the right ones of p win against the wrong ones of q
        for q in range(self.n):
            won_PQ[:, q] = self._wins(score[right], self.index[right], score[~right & (self.index == q)])
        return lambda counts: ((counts @ won_PQ) * counts).sum(axis=1) / ((counts @ n_right) * (counts @ n_wrong))

    def _pairs_within(self, right: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
        won, pairs = np.zeros(self.n), np.zeros(self.n)
        for p in range(self.n):
            here = self.index == p
            high, low = score[here & right], score[here & ~right]
            won[p] = self._wins(high, np.zeros(len(high), np.int64), low)[0]
            pairs[p] = len(high) * len(low)
        return won, pairs

    def _wins(self, high: Floats, prompt: NDArray[np.int64], low: Floats) -> Floats:
        """(n,) by prompt of ``high``, the pairs in which it is above ``low``; ties count one half."""
        ordered = np.sort(low)
        below = (np.searchsorted(ordered, high, "left") + np.searchsorted(ordered, high, "right")) / 2.0
        return np.bincount(prompt, weights=below, minlength=self.n).astype(np.float64)

    def figure(self, statistic: Statistic, options: BootstrapOptions) -> EstimateDict:
        """A statistic with its BCa interval over prompts; no interval where it is undefined for 1% of the draws."""

        def of(counts: Floats) -> Floats:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(statistic(counts), dtype=np.float64)

        value = float(of(np.ones((1, self.n)))[0])
        if not np.isfinite(value):
            return estimate_dict(Estimate(None, None, None, None, self.n))
        drawn = np.concatenate([of(c) for c in resamples(self.n, options["n_resamples"], options["seed"])])
        defined = drawn[np.isfinite(drawn)]
        if self.n == 1 or len(drawn) - len(defined) > 0.01 * len(drawn):
            return estimate_dict(Estimate(value, None, None, None, self.n))
        defined = with_ties(defined, value)
        left_out = np.concatenate([of(1.0 - np.eye(self.n)[k : k + 64]) for k in range(0, self.n, 64)])
        low, high = bca_interval(value, defined, left_out[np.isfinite(left_out)], options["confidence"])
        return estimate_dict(Estimate(value, float(defined.std(ddof=1)), low, high, self.n))


def _areas(
    prompts: Sequence[str], right: NDArray[np.bool_], score: Floats, options: BootstrapOptions
) -> dict[str, EstimateDict]:
    """Over all pairs, and over those of one prompt, which no function of the prompt can change."""
    by_prompt = _Clusters(prompts)
    return {
        "auc": by_prompt.figure(by_prompt.area(right, score), options),
        "auc_within_prompts": by_prompt.figure(by_prompt.area(right, score, within=True), options),
    }


def _f1(clusters: _Clusters, steps: _Steps, *, wrong: bool) -> Statistic:
    """F1 of the wrong steps, or of the right ones: 2 TP / (2 TP + FP + FN)."""
    is_class, called = (~steps.right, ~steps.called_right) if wrong else (steps.right, steps.called_right)
    hits = clusters.sums((is_class & called).astype(np.float64)) * 2.0
    whole = clusters.sums(is_class.astype(np.float64)) + clusters.sums(called.astype(np.float64))
    return lambda counts: (counts @ hits) / (counts @ whole)


def _f1_macro(clusters: _Clusters, steps: _Steps) -> Statistic:
    of_wrong, of_right = (_f1(clusters, steps, wrong=side) for side in (True, False))
    return lambda counts: (of_wrong(counts) + of_right(counts)) / 2.0
