"""A judge is tested before it is believed: does it order held-out comparisons as their labels do?

A judge that is no better than a coin on labelled pairs says nothing about new ones, however narrow the interval of its
win rate is. Intervals resample prompts with all their pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.evals.agreement import EstimateDict, agreement_with_preference, estimate_dict
from toolkit.evals.intervals import NO_ESTIMATE, BootstrapOptions, Estimate, bootstrap_share
from toolkit.evals.label_references import disagree, majority
from toolkit.evals.winrate import exact_ties

MIN_COVERAGE = 0.8
"""The share of what a judge was asked that it must answer: what it failed on is not a random part of all."""


@dataclass(frozen=True)
class LabelledPair:
    """Two held-out responses to a prompt, named by its id or its number.

    ``p`` is the share of the labels' ``weight`` that prefers the first.
    """

    prompt: str | int
    p: float
    weight: float


Preferences = tuple[float | None, ...]
"""A judge's preferences for the first response of a pair, in [0, 1]: one, or one for each order of presentation.

None stands for an answer that failed. Empty: the judge was not asked about this pair.
"""


@dataclass(frozen=True)
class JudgeTest:
    """A judge against the labels of held-out pairs.

    ``accuracy`` is the weighted share of labels that the judge agrees with; its tie counts half, and so does a tied
    label. ``label_ceiling`` is what always saying the majority gets on the same pairs, null where no labels disagree.
    ``position_consistency`` is the share of pairs with the same answer in both orders; null for a judge that scores
    each response alone. A pair counts where no answer failed. ``passed``: the interval of the accuracy lies above one
    half, and at least ``MIN_COVERAGE`` of the pairs that it was asked about count; None where there was no test.
    ``reason`` says why the judge did not pass, or was not tested; it is empty where it passed.
    """

    judge: str
    passed: bool | None
    reason: str
    accuracy: EstimateDict
    label_ceiling: EstimateDict
    position_consistency: EstimateDict
    n_pairs: int
    n_failed: int


def not_tested(judge: str, reason: str) -> JudgeTest:
    nothing = estimate_dict(NO_ESTIMATE)
    return JudgeTest(judge, None, reason, nothing, nothing, nothing, 0, 0)


def judge_test(
    judge: str,
    pairs: Sequence[LabelledPair],
    answers: Sequence[Preferences],
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> JudgeTest:
    """Compare a judge's ``answers`` with the labels of ``pairs``, one entry for each pair.

    >>> pairs = [LabelledPair(str(k), 1.0, 1.0) for k in range(20)]
    >>> judge_test("a", pairs, [(1.0, 1.0)] * 20).passed, judge_test("b", pairs, [(1.0, 0.0)] * 20).passed
    (True, False)
    """
    options: BootstrapOptions = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    asked = [(pair, values) for pair, values in zip(pairs, answers, strict=True) if values]
    judged = [(pair, [value for value in values if value is not None]) for pair, values in asked if None not in values]
    if not asked:
        return not_tested(judge, "it judged no held-out pair")
    if judged and all(pair.p == 0.5 for pair, _ in judged):
        return not_tested(judge, "the labels of the held-out pairs prefer neither response")
    prompts = [pair.prompt for pair, _ in judged]
    p, weight = (np.array([getattr(pair, name) for pair, _ in judged], dtype=float) for name in ("p", "weight"))
    side = np.sign(exact_ties([np.mean(values) for _, values in judged]) - 0.5)
    accuracy = bootstrap_share(prompts, weight * agreement_with_preference(side, p), weight, **options)
    ceiling = bootstrap_share(prompts, weight * majority(p), weight, **options) if disagree(p) else NO_ESTIMATE
    twice = [(pair.prompt, values) for pair, values in judged if len(values) > 1]
    same = np.array([float(len(set(np.sign(exact_ties(values) - 0.5))) == 1) for _, values in twice])
    reason = _against(accuracy, len(judged), len(asked))
    return JudgeTest(
        judge=judge,
        passed=not reason,
        reason=reason,
        accuracy=estimate_dict(accuracy),
        label_ceiling=estimate_dict(ceiling),
        position_consistency=estimate_dict(
            bootstrap_share([prompt for prompt, _ in twice], same, np.ones(len(same)), **options)
        ),
        n_pairs=len(judged),
        n_failed=len(asked) - len(judged),
    )


def _against(accuracy: Estimate, n_pairs: int, n_asked: int) -> str:
    """What a test says against its judge; empty where it answered enough and its interval lies above one half."""
    if n_pairs < MIN_COVERAGE * n_asked:
        answered = f"it answered {n_pairs} of the {n_asked} held-out pairs, less than {MIN_COVERAGE:.0%}"
        return f"not shown to be better than a coin ({answered})"
    if accuracy.ci_low is None or accuracy.ci_high is None:
        return f"not known to be better than a coin on {n_pairs} held-out pairs (its accuracy has no interval)"
    if accuracy.ci_low > 0.5:
        return ""
    than = "worse than" if accuracy.ci_high < 0.5 else "not shown to be better than"
    bounds = f"{accuracy.ci_low:.1%} to {accuracy.ci_high:.1%}"
    return f"{than} a coin on {n_pairs} held-out pairs (accuracy {accuracy.value:.1%}, interval {bounds})"


def failed_tests(tests: Mapping[str, JudgeTest]) -> dict[str, str]:
    """Judge -> what its test says against it, for the judges that did not pass."""
    return {judge: test.reason for judge, test in tests.items() if test.passed is False}
