"""A judge is tested on held-out labels before it is believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolkit.evals.judge_tests import JudgeTest, LabelledPair, Preferences, judge_test, not_tested
from toolkit.evals.verdict import Judging, verdict

ASKED_TWICE: list[tuple[Preferences, float | None]] = [
    ((1.0, 0.9), 1.0),  # two preferences for the first response, and what they say together
    ((0.9, 0.1), 0.5),
    ((0.0, 0.5), 0.0),
    ((1.0, None), None),
    ((), None),
]


def pairs(n: int, p: float = 1.0, per_prompt: int = 1) -> list[LabelledPair]:
    return [LabelledPair(f"p{k // per_prompt}", p, 1.0) for k in range(n)]


def examined(judge: str, share: float, n: int = 100) -> JudgeTest:
    """A judge that is right on this share of n pairs."""
    right = round(share * n)
    return judge_test(judge, pairs(n), [(1.0,)] * right + [(0.0,)] * (n - right), n_resamples=500)


def row(judge: str, rate: float) -> dict[str, Any]:
    sure = {"ci_low": rate - 0.04, "ci_high": rate + 0.04, "p_value": 0.001}
    of = {"policy": "rm_ppo", "baseline": "dpo", "judge": judge, "n_judged": 200, "n_prompts": 200, "slice": None}
    return {**of, "win": rate, "loss": 1 - rate, "win_rate": rate, **sure}


@pytest.mark.parametrize(("values", "verdict_of_pair"), ASKED_TWICE)
def test_a_pair_counts_by_both_orders_where_no_answer_failed(
    values: Preferences, verdict_of_pair: float | None
) -> None:
    found = judge_test("a", pairs(2), [values, (1.0, 1.0)], n_resamples=100)
    assert found.n_pairs == (1 if verdict_of_pair is None else 2)
    assert found.n_failed == (1 if None in values else 0)
    if verdict_of_pair is not None:
        assert found.accuracy["value"] == pytest.approx((verdict_of_pair + 1.0) / 2)
        same = len({np.sign(value - 0.5) for value in values if value is not None}) == 1
        assert found.position_consistency["value"] == (1.0 if same else 0.5)


def test_accuracy_has_the_label_ceiling_of_the_same_pairs_beside_it() -> None:
    labelled = [LabelledPair(f"p{k}", p, 2.0) for k, p in enumerate([1.0, 0.5, 0.0, 0.5] * 25)]
    found = judge_test("a", labelled, [(1.0,), (1.0,), (0.0,), (0.0,)] * 25, n_resamples=200)
    assert found.accuracy["value"] == found.label_ceiling["value"] == 0.75
    assert found.position_consistency["value"] is None  # it scores each response alone


def test_pairs_of_one_prompt_are_not_independent() -> None:
    answers: list[Preferences] = [(1.0,)] * 6 * 9 + [(0.0,)] * 6 * 4
    apart = judge_test("a", pairs(len(answers)), answers)
    together = judge_test("a", pairs(len(answers), per_prompt=6), answers)
    assert apart.accuracy["value"] == together.accuracy["value"]
    assert apart.passed is True and together.passed is False


def test_what_a_judge_must_show() -> None:
    assert examined("a", 0.7).passed is True and examined("a", 0.7).reason == ""
    assert examined("a", 1.0).passed is True  # equal values have an exact interval
    chance = examined("a", 0.55)
    assert (
        chance.passed is False
        and "not shown to be better than a coin on 100 held-out pairs (accuracy 55.0%" in chance.reason
    )
    reversed_ = examined("a", 0.2)
    assert reversed_.passed is False and "worse than a coin" in reversed_.reason
    ties = judge_test("a", pairs(30), [(0.5, 0.5)] * 30)
    assert ties.passed is False
    assert judge_test("a", pairs(9, p=0.5), [(1.0,)] * 9).passed is None
    assert judge_test("a", pairs(9), [()] * 9).passed is None


def test_a_judge_that_answers_too_few_pairs_does_not_pass() -> None:
    silent = judge_test("j", pairs(40), [(1.0, None)] * 40)
    assert (silent.passed, silent.n_pairs, silent.n_failed) == (False, 0, 40)
    assert silent.accuracy["value"] is None and "it answered 0 of the 40 held-out pairs" in silent.reason
    few = judge_test("j", pairs(100), [(1.0,)] * 79 + [(None,)] * 21)
    assert few.passed is False and "79 of the 100 held-out pairs, less than 80%" in few.reason
    assert judge_test("j", pairs(100), [(1.0,)] * 80 + [(None,)] * 20).passed is True
    assert judge_test("j", pairs(140), [(1.0,)] * 80 + [(None,)] * 20 + [()] * 40).passed is True  # not asked
    found = verdict([row("j", 0.6)], Judging(tests={"j": silent}))
    assert found["winner"] == "undecided" and "is not shown to be better than a coin (it answered" in found["sentence"]


def test_few_pairs_show_nothing_however_many_are_right() -> None:
    found = judge_test("j", [LabelledPair(f"p{k}", 1.0, 1.0) for k in range(3)], [(1.0,)] * 3)
    assert found.passed is False and found.reason.startswith("not shown to be better than a coin on 3 held-out pairs")


def test_a_judge_at_chance_does_not_decide() -> None:
    found = verdict([row("llm:tiny", 0.6)], Judging(tests={"llm:tiny": examined("llm:tiny", 0.5)}))
    assert found["winner"] == "undecided"
    assert "failed its test" in found["reason"] and "better than a coin on 100" in found["sentence"]
    assert verdict([row("llm:tiny", 0.6)], Judging(tests={"llm:tiny": examined("llm:tiny", 0.8)}))["winner"] == "rm_ppo"


def test_a_judge_at_chance_has_no_say_beside_one_that_passed() -> None:
    tests = {"a": examined("a", 0.8), "b": examined("b", 0.5)}
    found = verdict([row("a", 0.6), row("b", 0.3)], Judging(tests=tests))
    assert found["winner"] == "rm_ppo" and found["judge"] == "a"
    assert "Judge b does not decide: it is not shown to be better than a coin" in found["sentence"]
    primary = verdict([row("a", 0.6), row("b", 0.3)], Judging(primary_judge="b", tests=tests))
    assert (
        primary["winner"] == "undecided"
        and "primary judge b is not shown to be better than a coin" in primary["reason"]
    )


def test_the_verdict_names_judgements_without_hashes() -> None:
    found = verdict([row("file", 0.6)], Judging(unverified={"file": 1200, "other": 3}))
    assert found["winner"] == "rm_ppo"
    says = " Judge file's 1,200 judgements carry no hashes: that they are of these responses is not known."
    assert found["sentence"].endswith(says)
    one = " Judge file's 1 judgement carries no hashes: that it is of these responses is not known."
    assert verdict([row("file", 0.6)], Judging(unverified={"file": 1}))["sentence"].endswith(one)
    assert "hashes" not in verdict([row("file", 0.6)], Judging(unverified={"file": 0}))["sentence"]


def test_a_judge_that_was_not_tested_decides_and_the_verdict_says_so() -> None:
    tests = {"file": not_tested("file", "it judged no held-out pair")}
    found = verdict([row("file", 0.6)], Judging(tests=tests))
    assert found["winner"] == "rm_ppo"
    assert "Judge file was not tested on held-out labels: it judged no held-out pair." in found["sentence"]
