"""The verdict: at most 5% false winners at any number of prompts, and no judge, order or side of a file decides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from toolkit.evals.judge_tests import not_tested
from toolkit.evals.verdict import MIN_PROMPTS, Judging, decide, mirrored, verdict
from toolkit.evals.winrate import permutation_test, win_rate

Draw = Callable[[np.random.Generator, int], np.ndarray]
OUTCOMES: dict[str, Draw] = {
    "ternary": lambda rng, n: rng.choice([0.0, 0.5, 1.0], n, p=[0.45, 0.1, 0.45]),
    "mostly ties": lambda rng, n: rng.choice([0.0, 0.5, 1.0], n, p=[0.1, 0.8, 0.1]),
    "graded": lambda rng, n: rng.beta(0.7, 0.7, n),
    "four samples": lambda rng, n: rng.binomial(4, rng.choice([0.2, 0.8], n)) / 4,
    "skewed": lambda rng, n: rng.choice([1.0, 0.375], n, p=[0.2, 0.8]),  # mean one half, and not symmetric
}


def winner_of(values: np.ndarray) -> bool:
    """Whether these preferences give a winner. The interval is computed where the test rejects alone: both must."""
    p = permutation_test(values)
    if p is None or p > 0.05:
        return False
    row = win_rate(values, policy="rm_ppo", baseline="dpo", judge="gold", n_resamples=1000)
    return verdict([row.as_dict()])["winner"] != "undecided"


@pytest.mark.parametrize("outcomes", OUTCOMES)
@pytest.mark.parametrize("n", [2, 4, 6, 8, 12, 19, 20, 21, 24, 32, 48, 64, 100, 200, 500])
def test_equal_arms_have_a_winner_in_one_run_of_twenty_at_most(n: int, outcomes: str) -> None:
    rng = np.random.default_rng(n)
    runs = 400 if n >= MIN_PROMPTS else 50
    false_winners = sum(winner_of(OUTCOMES[outcomes](rng, n)) for _ in range(runs))
    # At a true rate of 5% this bound is passed in one case of a thousand.
    assert false_winners <= (0.05 * runs + 3.1 * (0.05 * 0.95 * runs) ** 0.5 if n >= MIN_PROMPTS else 0)


def test_a_true_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    found = sum(winner_of(rng.choice([0.0, 1.0], 194, p=[0.4, 0.6])) for _ in range(100))
    assert found >= 65  # 194 prompts see 60% with a power of 76% by the exact test


def row(judge: str, rate: float | None, **more: Any) -> dict[str, Any]:
    spread = {"ci_low": None, "ci_high": None} if rate is None else {"ci_low": rate - 0.04, "ci_high": rate + 0.04}
    numbers = {"win": rate, "loss": None if rate is None else 1 - rate, "win_rate": rate, "p_value": 0.001, **spread}
    return {
        **{"policy": "rm_ppo", "baseline": "dpo", "judge": judge, "n_judged": 200, "n_prompts": 200, "slice": None},
        **numbers,
        **more,
    }


@pytest.mark.parametrize(
    ("more", "finding", "reason"),
    [
        ({}, "better", "agree"),
        ({"p_value": 0.051}, "undecided", "permutation test"),
        ({"ci_low": 0.5}, "undecided", "contains one half"),
        ({"ci_low": 0.501, "ci_high": 0.52}, "no practical difference", "within 2 points"),
        ({"ci_low": 0.49, "ci_high": 0.51, "p_value": 0.9}, "no practical difference", "within 2 points"),
        ({"n_judged": 19, "n_prompts": 19}, "undecided", "at least 20"),
        ({"n_judged": 12, "n_prompts": 388}, "undecided", "at least 20"),
        ({"n_judged": 150, "n_prompts": 200}, "undecided", "150 of 200"),
        ({"win_rate": None, "n_judged": 0}, "undecided", "no prompt"),
        ({"ci_low": None, "ci_high": None}, "undecided", "no interval"),
    ],
)
def test_every_condition(more: dict[str, Any], finding: str, reason: str) -> None:
    one = row("gold", 0.6, **more)
    names = ("win_rate", "ci_low", "ci_high", "p_value", "n_judged", "n_prompts")
    decision = decide(**{name: one[name] for name in names})
    assert decision.finding == finding and reason in decision.reason
    whole = verdict([one])
    assert whole["finding"] == finding and reason in whole["reason"]
    assert whole["winner"] == ("rm_ppo" if finding == "better" else "undecided")
    assert finding == "better" or reason in whole["sentence"]


def test_four_prompts_without_a_loss_decide_nothing() -> None:
    found = win_rate([1.0, 1.0, 1.0, 0.5], policy="rm_ppo", baseline="dpo", judge="gold")
    assert found.ci_low is not None and found.ci_low > 0.5  # which used to be enough
    assert verdict([found.as_dict()])["winner"] == "undecided"


def test_the_order_of_the_judges_changes_nothing() -> None:
    rates = {"one": 0.61, "two": 0.45, "three": 0.44}
    pooled = row("pooled", 0.60)
    for order in permutations(rates):
        found = verdict([row(judge, rates[judge]) for judge in order], Judging(pooled=pooled))
        assert found["winner"] == "undecided" and "disagree" in found["sentence"]
        assert found["judges"] == rates
        assert [*found["judges"]] == sorted(rates)


def test_judges_that_agree_are_pooled_and_a_primary_judge_decides_alone() -> None:
    rows = [row("b", 0.62), row("a", 0.58)]
    assert verdict(rows, Judging(pooled=row("pooled", 0.6)))["winner"] == "rm_ppo"
    assert verdict(rows, Judging(pooled=row("pooled", 0.6, p_value=0.2)))["winner"] == "undecided"
    mixed = [row("a", 0.62), row("b", 0.41)]
    assert verdict(mixed, Judging(primary_judge="b"))["winner"] == "dpo"
    assert verdict(mixed, Judging(primary_judge="a"))["winner"] == "rm_ppo"
    with pytest.raises(ValueError, match="pooled"):
        verdict(rows)


def test_a_file_that_lists_the_arms_the_other_way_round_says_the_same() -> None:
    there = row("gold", 0.6)
    back = row("gold", 0.4, policy="dpo", baseline="rm_ppo")
    assert mirrored(back)["win_rate"] == pytest.approx(0.6)
    assert verdict([back])["winner"] == verdict([there])["winner"] == "rm_ppo"
    assert verdict([back])["sentence"] == verdict([there])["sentence"]


def test_signals_do_not_decide() -> None:
    found = verdict([row("rm", 0.9), row("implicit", 0.2)])
    assert found["winner"] == "undecided" and "no independent judge" in found["sentence"]
    assert verdict([row("rm", 0.9), row("gold", 0.4)])["winner"] == "dpo"
    assert verdict([])["winner"] == "undecided"


def test_the_sentence_names_kl_reach_and_what_a_recipe_is_for() -> None:
    one = row("gold", 0.6, detectable_effect=0.099)
    there = verdict([one], kl_nats={"rm_ppo": 12.9, "dpo": 3.0})
    assert "at unequal KL (RM + PPO 12.90 nats, DPO 3.00)" in there["sentence"] and "in this run" in there["sentence"]
    assert "unequal" not in verdict([one], kl_nats={"rm_ppo": 3.1, "dpo": 3.0})["sentence"]
    unsure = verdict([row("gold", 0.52, ci_low=0.45, ci_high=0.59, p_value=0.4, detectable_effect=0.099)])
    assert "200 prompts see a difference of 9.9 points or more" in unsure["sentence"]
    assert "2 points takes about 4,9" in unsure["sentence"]  # the power formula's 4,903 for 52%
    shown = verdict([one], Judging(demonstration=True))
    assert "shows that everything runs" in shown["sentence"]


def test_a_judge_that_knows_the_prompts_does_not_decide() -> None:
    judging = Judging(not_independent={"rm:other": "a reward model that was trained on 80 of these prompts"})
    blocked = verdict([row("rm:other", 0.7)], judging)
    assert blocked["winner"] == "undecided" and "80 of these prompts" in blocked["sentence"]
    assert verdict([row("rm:other", 0.7), row("gold", 0.4)], judging)["winner"] == "dpo"
    failed = replace(not_tested("rm:other", "no better than a coin"), passed=False)
    both = verdict([row("rm:other", 0.7)], replace(judging, tests={"rm:other": failed}))
    assert both["reason"] == "no independent judge compared the two arms"


def test_a_primary_judge_that_did_not_judge_leaves_it_open() -> None:
    rows, pooled = [row("a", 0.62), row("b", 0.61)], row("pooled", 0.6)
    assert verdict(rows, Judging(pooled=pooled))["winner"] == "rm_ppo"
    missing = verdict(rows, Judging(primary_judge="mistyped", pooled=pooled))
    assert missing["winner"] == "undecided" and "primary judge mistyped" in missing["sentence"]
    alone = verdict(rows[:1], Judging(primary_judge="mistyped"))
    assert alone["winner"] == "undecided"


def test_coverage_is_of_the_evaluations_prompts_and_a_judge_of_few_has_no_veto() -> None:
    few = row("votes", 0.8, n_judged=25, n_prompts=25)
    assert verdict([few])["winner"] == "rm_ppo"  # nothing says that there were more
    found = verdict([few], Judging(n_prompts=400))
    assert found["winner"] == "undecided" and "25 of 400 prompts" in found["sentence"]
    one = row("one", 0.0, n_judged=1, n_prompts=1)
    whole = [row("a", 0.8), one]
    assert verdict(whole, Judging(pooled=row("pooled", 0.79), n_prompts=200))["winner"] == "rm_ppo"


@pytest.mark.parametrize(
    ("kl_nats", "words"),
    [
        ((12.9, 3.0), "at unequal KL (RM + PPO 12.90 nats, DPO 3.00)"),
        ((3.0, 3.2), "at about equal KL (RM + PPO 3.00 nats, DPO 3.20)"),
        ((-0.02, -0.05), "at unequal KL (RM + PPO -0.02 nats, DPO -0.05)"),
        ((0.0, 0.0), "at about equal KL (RM + PPO 0.00 nats, DPO 0.00)"),
    ],
)
def test_the_sentence_has_both_kls(kl_nats: tuple[float, float], words: str) -> None:
    for rate in (0.7, 0.5):
        assert (
            words
            in verdict([row("gold", rate)], kl_nats=dict(zip(("rm_ppo", "dpo"), kl_nats, strict=True)))["sentence"]
        )
    assert "KL" not in verdict([row("gold", 0.7)], kl_nats={"rm_ppo": None, "dpo": 1.0})["sentence"]


def test_opposite_judges_are_no_practical_difference_to_nobody() -> None:
    """Judges at 78% and 22% average to one half, with an interval as narrow as one likes."""
    rows = [row("ann", 0.78), row("bob", 0.22)]
    pooled = row("all judges", 0.5, ci_low=0.498, ci_high=0.502, p_value=1.0)
    for judges in permutations(rows):
        found = verdict(list(judges), Judging(pooled=pooled))
        assert (found["winner"], found["finding"]) == ("undecided", "undecided")
        assert "disagree" in found["sentence"] and "78.0%" in found["sentence"] and "22.0%" in found["sentence"]
    close = verdict([row("ann", 0.505), row("bob", 0.495)], Judging(pooled=pooled))
    assert close["finding"] == "no practical difference"
    missing = verdict(rows, Judging(pooled=pooled, primary_judge="eve"))
    assert missing["finding"] == "undecided" and "primary judge eve" in missing["sentence"]


@pytest.mark.parametrize("effect", [0.0, 0.02, 0.1, 0.11, 0.3, 0.49, 0.5])
@pytest.mark.parametrize("n_ties", [0, 17, 20])
def test_any_smallest_effect_and_share_of_ties_has_a_sentence(effect: float, n_ties: int) -> None:
    values = np.array([0.5] * n_ties + [1.0, 0.0, 1.0, 0.0] * 5)
    found = verdict(
        [win_rate(values, policy="rm_ppo", baseline="dpo", judge="a").as_dict()], Judging(smallest_effect=effect)
    )
    assert found["winner"] == "undecided" and found["sentence"]
