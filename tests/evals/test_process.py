"""Figures of step rewards: against scikit-learn, against arithmetic, and the coverage of their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.process import (
    SOLUTION_SCORES,
    ScoredSolution,
    best_threshold,
    cross_thresholds,
    paired_figures,
    process_figures,
    solution_score,
    step_rewards,
)

FAST: BootstrapOptions = {"n_resamples": 200, "confidence": 0.95, "seed": 0}


def simulated(seed: int, n_prompts: int = 40, skill: float = 1.0, n_solutions: int = 3) -> list[ScoredSolution]:
    """Solutions of 1 to 4 steps; a prompt shifts the scores of all of its steps, and how likely they are right."""
    rng = np.random.default_rng(seed)
    solutions = []
    for p in range(n_prompts):
        ease, shift = rng.normal(), 0.5 * rng.normal()
        for _ in range(n_solutions):
            right = rng.random(rng.integers(1, 5)) < 1 / (1 + np.exp(-0.5 - ease))
            score = 1 / (1 + np.exp(-(skill * (2.0 * right - 1) + shift + rng.normal(size=len(right)))))
            solutions.append(ScoredSolution(f"p{p}", [bool(x) for x in right], 0, score.tolist()))
    return solutions


def columns(solutions: list[ScoredSolution]) -> tuple[list[bool], list[float]]:
    pairs = [(bool(s.labels[k]), s.scores[k]) for s in solutions for k in s.counted]
    return [right for right, _ in pairs], [score for _, score in pairs]


@pytest.mark.parity
def test_figures_are_those_of_scikit_learn() -> None:
    solutions = simulated(0)
    right, score = columns(solutions)
    called = [s >= 0.5 for s in score]
    steps = process_figures(solutions, FAST, threshold=0.5)["steps"]
    assert steps["accuracy"]["value"] == pytest.approx(np.mean(np.array(right) == called))
    assert steps["f1_wrong"]["value"] == pytest.approx(f1_score(right, called, pos_label=False))
    assert steps["f1_macro"]["value"] == pytest.approx(f1_score(right, called, average="macro"))
    assert steps["auc"]["value"] == pytest.approx(roc_auc_score(right, score))
    assert steps["majority"]["value"] == pytest.approx(max(np.mean(right), 1 - np.mean(right)))
    assert steps["over_majority"]["value"] == pytest.approx(steps["accuracy"]["value"] - steps["majority"]["value"])
    for figure in steps.values():
        assert figure["ci_low"] < figure["value"] < figure["ci_high"] and figure["n"] == 40


@pytest.mark.parity
def test_area_within_prompts_is_the_mean_over_its_pairs() -> None:
    solutions = simulated(1)
    won = pairs = 0.0
    for prompt in {s.prompt_id for s in solutions}:
        right, score = columns([s for s in solutions if s.prompt_id == prompt])
        high, low = ([s for s, r in zip(score, right, strict=True) if r == side] for side in (True, False))
        won += sum(a > b for a in high for b in low)
        pairs += len(high) * len(low)
    figures = process_figures(solutions, FAST, threshold=0.5)["steps"]
    assert figures["auc_within_prompts"]["value"] == pytest.approx(won / pairs)
    # A shift of a prompt's scores moves the former and not the latter.
    moved = [
        ScoredSolution(s.prompt_id, s.labels, 0, [x + 3 * int(s.prompt_id[1:]) for x in s.scores]) for s in solutions
    ]
    after = process_figures(moved, FAST)["steps"]
    assert after["auc_within_prompts"] == figures["auc_within_prompts"] and after["auc"] != figures["auc"]


def test_steps_that_solutions_share_or_nobody_judged_count_once_or_not() -> None:
    first = ScoredSolution("p", [True, False], 0, [0.9, 0.1])
    second = ScoredSolution("p", [True, None], 1, [0.9, 0.2])
    third = ScoredSolution("q", [True, True], 0, [0.9, 0.4])
    figures = process_figures([first, second, third], FAST, threshold=0.5)
    assert figures["n_steps"] == 4 and figures["steps"]["accuracy"]["value"] == 0.75
    # The second's first error is not known; the third has none, and one is called.
    assert figures["first_error"]["n_solutions"] == 2 and figures["first_error"]["accuracy"]["value"] == 0.5
    assert figures["first_error"]["all_right"]["value"] == 0.5


def test_first_error_needs_the_very_step() -> None:
    labels = [True, False, False]
    for scores, found in (([0.9, 0.1, 0.9], 1), ([0.1, 0.1, 0.9], 0), ([0.9, 0.9, 0.1], 0), ([0.9, 0.9, 0.9], 0)):
        figures = process_figures([ScoredSolution("p", labels, 0, scores)], FAST, threshold=0.5)
        assert figures["first_error"]["accuracy"]["value"] == found


def test_solution_scores_and_the_rewards_that_add_up_to_them() -> None:
    probabilities = [0.9, 0.5, 0.8]
    for rule in SOLUTION_SCORES:
        assert sum(step_rewards(probabilities, rule)) == pytest.approx(solution_score(probabilities, rule))
        assert solution_score([], rule) == 0.0 and step_rewards([], rule) == []
    figures = process_figures(simulated(2), FAST, threshold=0.5)["solutions"]
    assert set(figures) == {"min", "product", "last"}
    assert figures["product"]["auc"]["value"] > figures["last"]["auc"]["value"] > 0.5
    no_probabilities = [ScoredSolution(s.prompt_id, s.labels, 0, [9 * x for x in s.scores]) for s in simulated(2)]
    assert set(process_figures(no_probabilities, FAST)["solutions"]) == {"min", "last"}


def test_a_threshold_is_chosen_on_the_other_half() -> None:
    solutions = simulated(3)
    thresholds = dict(zip([s.prompt_id for s in solutions], cross_thresholds(solutions), strict=True))
    low, high = sorted(set(thresholds.values()))
    for value, other in ((low, high), (high, low)):
        others = [s for s in solutions if thresholds[s.prompt_id] == other]
        right, score = columns(others)
        assert best_threshold(score, right) == value
    right, score = columns(solutions)
    best = best_threshold(score, right)
    accuracy = [np.mean((np.array(score) >= t) == right) for t in [best, *score, max(score) + 1]]
    assert accuracy[0] == max(accuracy)


def test_a_difference_of_a_reward_from_itself_is_nothing_and_a_better_one_is_better() -> None:
    good, poor = simulated(4, skill=2.0), simulated(4, skill=2.0)
    rng = np.random.default_rng(0)
    poor = [ScoredSolution(s.prompt_id, s.labels, 0, rng.random(len(s.scores)).tolist()) for s in poor]
    assert all(figure["value"] == 0 for figure in paired_figures(good, good, FAST).values())
    better = paired_figures(good, poor, FAST, threshold=0.5)
    assert set(better) == {"accuracy", "f1_macro", "auc", "auc_within_prompts", "first_error"}
    assert all(figure["ci_low"] > 0 for figure in better.values())


@pytest.mark.parametrize("labels", [[True, True], [None, None], [False]])
def test_one_class_has_accuracy_and_no_area(labels: list[bool | None]) -> None:
    figures = process_figures([ScoredSolution(p, labels, 0, [0.7] * len(labels)) for p in "abc"], FAST, threshold=0.5)
    if labels[0] is None:
        assert figures["steps"] is None and figures["n_steps"] == 0
    else:
        assert figures["steps"]["accuracy"]["value"] == float(labels[0]) and figures["steps"]["auc"]["value"] is None
        assert figures["solutions"] is None


FIGURES = ("accuracy", "f1_wrong", "f1_macro", "auc", "auc_within_prompts", "over_majority")


def covered(seed: int, truth: dict[str, float], n_prompts: int) -> list[bool]:
    steps = process_figures(simulated(seed, n_prompts), {**FAST, "n_resamples": 400}, threshold=0.5)["steps"]
    return [steps[name]["ci_low"] <= truth[name] <= steps[name]["ci_high"] for name in FIGURES]


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    """Over 300 simulated data sets of 40 prompts each interval has the true value in 90 to 98%."""
    large = process_figures(simulated(10_000, 4000), {**FAST, "n_resamples": 2}, threshold=0.5)["steps"]
    truth = {name: large[name]["value"] for name in FIGURES}
    rates = np.mean([covered(seed, truth, 40) for seed in range(300)], axis=0)
    assert all(0.90 <= rate <= 0.98 for rate in rates), dict(zip(FIGURES, rates, strict=True))
