"""What a reader must know before believing an evaluation, in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolkit.evals.hacking import drift
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.judge_tests import LabelledPair, Preferences, judge_test, not_tested
from toolkit.evals.result_warnings import (
    arms_that_did_not_move,
    changed_texts,
    failing_judge,
    judges_that_failed_their_test,
    length_turns_the_result,
    milestones_not_reached,
    places_instead_of_preferences,
    rewards_at_chance,
)

OPTIONS: BootstrapOptions = {"n_resamples": 300, "confidence": 0.95, "seed": 0}


def rate(**more: Any) -> dict[str, Any]:
    known = {"policy": "rm_ppo", "baseline": "dpo", "judge": "a", "win_rate": 0.6, "lc_win_rate": 0.55}
    return {**known, "position_consistency": None, **more}


def quality(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"accuracy": {"value": value, "ci_low": low, "ci_high": high}}


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        ((0.33, 0.2, 0.46), "the reward model is worse than a coin on held-out comparisons (accuracy 33.0%"),
        ((0.52, 0.45, 0.59), "the reward model is no better than a coin"),
        ((0.6, 0.51, 0.69), None),
        ((1.0, None, None), None),
        ((0.5, None, None), "the reward model is no better than a coin"),
    ],
)
def test_a_reward_at_chance(accuracy: tuple[float, float | None, float | None], said: str | None) -> None:
    found = rewards_at_chance({"explicit": quality(*accuracy), "implicit": quality(0.7, 0.6, 0.8)})
    assert found == [] if said is None else found[0].startswith(said)


def policy(name: str, kl: float, low: float) -> dict[str, Any]:
    known = {"gold_reward": {"value": None}, "explicit_reward": {"value": 0.0}, "implicit_reward": {"value": 0.0}}
    return {"policy": name, "kl_nats": kl, "kl_ci_low": low, "kl_ci_high": 2 * kl, **known}


def samples(rewards: np.ndarray) -> list[dict[str, Any]]:
    return [{"prompt_id": f"p{k}", "gold_reward": None, "explicit_reward": float(r)} for k, r in enumerate(rewards)]


def test_an_arm_that_did_not_move() -> None:
    noise = np.random.default_rng(0).normal(0.0, 1.0, (3, 80))
    of = {"sft": samples(noise[0]), "rm_ppo": samples(noise[1]), "dpo": samples(noise[0] + 1.0 + 0.1 * noise[2])}
    rows = [policy("sft", 0.0, 0.0), policy("rm_ppo", 0.02, 0.01), policy("dpo", 0.02, -0.01)]
    found = arms_that_did_not_move(rows, of, OPTIONS)
    assert len(found) == 1 and found[0].startswith("RM + PPO did not move: its KL from SFT is 0.020 nats")
    assert arms_that_did_not_move([policy("rm_ppo", 0.5, 0.3)], of, OPTIONS) == []
    assert len(arms_that_did_not_move([policy("rm_ppo", 0.5, -0.1)], of, OPTIONS)) == 1


def test_raw_and_length_controlled_results_that_disagree_in_sign() -> None:
    [said] = length_turns_the_result([rate(lc_win_rate=0.45)])
    assert "60.0%" in said and "45.0% at equal length" in said
    same = [rate(), rate(lc_win_rate=None), rate(lc_win_rate=0.5), rate(policy="rm_ppo@4", lc_win_rate=0.4)]
    assert length_turns_the_result(same) == []


def test_judges_that_fail_that_see_places_and_that_were_not_believed() -> None:
    assert failing_judge("a", 5, 100) == []
    assert failing_judge("a", 6, 100) == ["judge a failed in 6 of 100 judgements (6.0%)"]
    assert failing_judge("a", 1, 1) == ["judge a failed in 1 of 1 judgement (100.0%)"]
    labelled = [LabelledPair(f"p{k}", 1.0, 1.0) for k in range(40)]
    by_place: list[Preferences] = [(1.0, 0.0)] * 30 + [(1.0, 1.0)] * 10
    tests = {"a": judge_test("a", labelled, by_place, **OPTIONS), "file": not_tested("file", "it was not there")}
    [said] = places_instead_of_preferences([rate(position_consistency=0.42)], tests)
    assert "25.0% of the held-out pairs and 42.0% of the comparisons of the arms" in said
    assert places_instead_of_preferences([rate(position_consistency=0.65)], {}) == []
    chance = {"a": judge_test("a", labelled, [(1.0,), (0.0,)] * 20, **OPTIONS), "file": tests["file"]}
    does_not, untested = judges_that_failed_their_test(chance)
    assert does_not.startswith("judge a does not decide: it is not shown to be better than a coin")
    assert untested == "judge file was not tested on held-out labels: it was not there"


def test_kl_milestones_that_training_did_not_reach() -> None:
    assert milestones_not_reached({"rm_ppo": [4.0, 8.5], "dpo": []}, {"rm_ppo": 3.214, "dpo": 9.0}) == [
        "no policy of RM + PPO is kept for KL 4, 8.5, which its training did not reach: its last policy is 3.21 nats "
        "from SFT"
    ]
    assert milestones_not_reached({"dpo": [1.0]}, {}) == [
        "no policy of DPO is kept for KL 1, which its training did not reach"
    ]


def test_a_policy_whose_texts_changed_is_named_with_what_changed() -> None:
    longer, same = [10.0 + k for k in range(8)], [5.0] * 8
    rows = drift({"n_words": longer, "eos": same}, {"n_words": [1.0] * 8, "eos": same}, list(range(8)))
    assert changed_texts({"dpo": rows, "rm_ppo": rows[1:]}) == [
        "the responses of DPO differ from those of SFT: length in words"
    ]
