from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from toolkit.errors import DataError
from toolkit.evals.agreement import (
    LOG_Z_WARNING,
    cohen_kappa,
    compare_on_samples,
    compare_rewards,
    krippendorff_alpha,
    pairwise_accuracy,
    within_prompt_correlation,
)

PAIRS = [(0, 1), (0, 2), (1, 2)]


def simulated(n: int = 40, seed: int = 0) -> tuple[list[str], list[tuple[int, int, int, float, float]], list, list]:
    rng = np.random.default_rng(seed)
    explicit = [rng.normal(size=3) for _ in range(n)]
    implicit = [0.5 * e + 0.4 * rng.normal(size=3) for e in explicit]
    comparisons = [(k, i, j, float(rng.random() < 0.5 + 0.3 * np.sign(explicit[k][i] - explicit[k][j])), 1.0)
                   for k in range(n) for i, j in PAIRS]  # fmt: skip
    return [f"p{k}" for k in range(n)], comparisons, explicit, implicit


def test_accuracy_by_hand_with_ties_of_both_kinds() -> None:
    # right, equal rewards (1/2), wrong, tied label (1/2), soft label 0.8 on the right side with weight 2
    comparisons = [
        (0, 0, 1, 1.0, 1.0),
        (0, 1, 2, 1.0, 1.0),
        (1, 0, 1, 1.0, 1.0),
        (1, 0, 1, 0.5, 1.0),
        (2, 1, 0, 0.8, 2.0),
    ]
    rewards = [[2.0, 1.0, 1.0], [0.0, 3.0], [0.0, 1.0]]
    result = pairwise_accuracy(comparisons, rewards)
    assert result.value == pytest.approx((1 + 0.5 + 0 + 0.5 + 2 * 0.8) / 6)
    assert result.n == 3


def test_an_interval_is_the_same_with_and_without_the_names_of_prompts() -> None:
    ids, comparisons, explicit, _ = simulated()
    assert ids != sorted(ids)
    assert pairwise_accuracy(comparisons, explicit, prompt_ids=ids) == pairwise_accuracy(comparisons, explicit)


def test_direction_of_a_pair_does_not_matter() -> None:
    ids, comparisons, explicit, implicit = simulated()
    turned = [(k, j, i, 1 - p, w) for k, i, j, p, w in comparisons]
    a, b = (compare_rewards(ids, c, explicit, implicit, n_resamples=100) for c in (comparisons, turned))
    for name in ("accuracy_explicit", "agreement", "cohen_kappa", "margin_correlation", "margin_slope"):
        assert a[name] == pytest.approx(b[name]), name  # type: ignore[comparison-overlap]


def test_a_function_of_the_prompt_changes_nothing() -> None:
    ids, comparisons, explicit, implicit = simulated()
    shifted = [r + 100.0 * k for k, r in enumerate(implicit)]
    a = compare_rewards(ids, comparisons, explicit, implicit, n_resamples=100)
    b = compare_rewards(ids, comparisons, explicit, shifted, n_resamples=100)
    for name in ("accuracy_implicit", "agreement", "spearman", "kendall", "margin_correlation", "margin_slope"):
        assert a[name] == pytest.approx(b[name], abs=1e-9), name  # type: ignore[comparison-overlap]
    assert "function of the prompt" in LOG_Z_WARNING and a["warning"] == LOG_Z_WARNING


def test_positive_scaling_keeps_ranks_and_scales_the_slope() -> None:
    ids, comparisons, explicit, _ = simulated()
    result = compare_rewards(ids, comparisons, explicit, [3.0 * r for r in explicit], n_resamples=50)
    for name in ("agreement", "cohen_kappa", "spearman", "kendall", "margin_correlation"):
        assert result[name]["value"] == pytest.approx(1.0), name  # type: ignore[index]
    assert result["margin_slope"]["value"] == pytest.approx(3.0)  # type: ignore[index]
    opposite = compare_rewards(ids, comparisons, explicit, [-r for r in explicit], n_resamples=50)
    assert opposite["agreement"]["value"] == 0.0 and opposite["cohen_kappa"]["value"] == pytest.approx(-1.0)  # type: ignore[index]


def test_independent_rewards_agree_by_chance() -> None:
    ids, comparisons, explicit, _ = simulated(300, 1)
    rng = np.random.default_rng(9)
    result = compare_rewards(ids, comparisons, explicit, [rng.normal(size=3) for _ in explicit], n_resamples=400)
    for name, chance in (("agreement", 0.5), ("cohen_kappa", 0.0), ("spearman", 0.0), ("margin_correlation", 0.0)):
        entry = result[name]
        assert entry["ci_low"] < chance < entry["ci_high"], name  # type: ignore[index,operator]
        assert entry["n"] == 300  # type: ignore[index]


@pytest.mark.parametrize(("method", "oracle"), [("spearman", stats.spearmanr), ("kendall", stats.kendalltau)])
def test_within_prompt_correlation_leaves_out_constant_prompts(method: str, oracle: object) -> None:
    a = [[1.0, 2.0, 3.0, 4.0], [1.0, 1.0], [5.0, 6.0, 6.0], [1.0, 2.0]]
    b = [[1.0, 3.0, 2.0, 5.0], [1.0, 2.0], [2.0, 1.0, 0.0], [7.0, 7.0]]
    result = within_prompt_correlation(a, b, method=method)
    expected = np.mean([oracle(a[k], b[k]).statistic for k in (0, 2)])  # type: ignore[operator]
    assert result.value == pytest.approx(expected) and result.n == 2


def test_equal_prompt_ids_are_one_prompt() -> None:
    _, comparisons, explicit, implicit = simulated(40)
    result = compare_rewards([f"p{k // 2}" for k in range(40)], comparisons, explicit, implicit, n_resamples=50)
    assert result["n_prompts"] == result["agreement"]["n"] == result["spearman"]["n"] == 20  # type: ignore[index]


def test_kappa_by_hand() -> None:
    # agreement 0.7; both say "1" for 5 and 6 of 10: chance 0.5*0.6 + 0.5*0.4 = 0.5
    a = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    b = [1, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert cohen_kappa(a, b).value == pytest.approx(0.4)
    assert cohen_kappa([1, 1], [1, 1]).value is None  # chance agreement is 1


def test_alpha_by_hand() -> None:
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example B: binary, two observers, alpha 0.095
    a = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    b = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    result = krippendorff_alpha([a, b], n_resamples=50)
    assert result.value == pytest.approx(0.095, abs=5e-4) and result.n == 10
    with pytest.raises(DataError, match="level"):
        krippendorff_alpha([a, b], level="ratio")


@pytest.mark.parametrize(
    "comparison",
    [(0, 0, 0, 1.0, 1.0), (0, 0, 5, 1.0, 1.0), (3, 0, 1, 1.0, 1.0), (0, 0, 1, 1.2, 1.0), (0, 0, 1, 1.0, 0.0)],
)
def test_bad_comparisons_are_refused(comparison: tuple[int, int, int, float, float]) -> None:
    with pytest.raises(DataError, match="does not fit"):
        pairwise_accuracy([comparison], [[0.0, 1.0]])


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        pairwise_accuracy([(0, 0, 1, 1.0, 1.0)], [[0.0, np.nan]])
    with pytest.raises(DataError, match="different numbers"):
        compare_rewards(["p"], [], [[0.0, 1.0]], [[0.0, 1.0, 2.0]])


def test_samples_of_a_collapsed_policy_are_judged_where_they_differ() -> None:
    """Three of four samples are equal: the rewards are right about all that can be ordered."""
    ids = [f"p{k}" for k in range(30)]
    texts = [["same", "same", "other", "same"] for _ in ids]
    rewards = [np.array([1.0, 1.0, 2.0, 1.0]) + k for k in range(30)]
    result: Any = compare_on_samples(ids, texts, rewards, rewards, [list(r) for r in rewards], n_resamples=50)
    assert [result[name]["value"] for name in ("accuracy_explicit", "accuracy_implicit", "agreement")] == [1.0] * 3
    assert (result["n_pairs"], result["n_pairs_equal"], result["n_pairs_gold_tied"]) == (90, 90, 0)
    alike: Any = compare_on_samples(ids[:2], [["a", "a"]] * 2, [[1.0, 1.0]] * 2, [[1.0, 2.0]] * 2, [None] * 2)
    assert (alike["n_pairs"], alike["n_pairs_equal"], alike["agreement"]["value"]) == (0, 2, None)


def test_samples_of_equal_or_unknown_gold_are_in_no_accuracy() -> None:
    texts = [["a", "b", "c"], ["a", "b", "c"]]
    rewards = [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]
    result: Any = compare_on_samples(["p", "q"], texts, rewards, rewards, [[5.0, 5.0, 0.0], None], n_resamples=50)
    assert (result["accuracy_explicit"]["value"], result["accuracy_explicit"]["n"]) == (1.0, 1)
    assert (result["n_pairs"], result["n_pairs_equal"], result["n_pairs_gold_tied"]) == (6, 0, 1)
    assert result["agreement"]["n"] == 2
