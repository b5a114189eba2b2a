"""The win rate where both arms ended their responses: without what truncation is worth to a judge."""

from __future__ import annotations

import pytest

from toolkit.evals.beside_verdict import on_ended_responses
from toolkit.judging.ended import BOTH_ENDED, prompts_that_both_ended, where_both_ended
from toolkit.judging.records import POOLED, Judgement, response_hash
from toolkit.judging.win_rates import win_rates
from toolkit.preferences.samples import Sample


def samples(*cut: tuple[str, int]) -> list[Sample]:
    """Two samples of each arm for 60 prompts; ``cut`` names (policy, prompt) whose second sample has no end."""
    return [
        Sample(f"p{p}", policy, truncated=k == 1 and (policy, p) in cut)
        for policy in ("sft", "rm_ppo", "dpo")
        for p in range(60)
        for k in range(2)
    ]


# DPO's responses to 40 prompts have no end, and each of them loses; of the others it wins 12 of 20.
CUT = samples(*(("dpo", p) for p in range(40)), *(("sft", p) for p in range(60)))
VERDICT = {"judge": "gold", "judges": {"gold": 0.8}, "win_rate": 0.8, "n_judged": 60}
WON = [1.0] * 40 + [0.0] * 12 + [1.0] * 8


def judged(judge: str, won: list[float], policy: str = "rm_ppo", baseline: str = "dpo") -> list[Judgement]:
    return [Judgement(f"p{p}", policy, baseline, judge, value) for p, value in enumerate(won)]


def test_a_prompt_counts_where_every_sample_of_both_arms_ended() -> None:
    assert prompts_that_both_ended(CUT) == {f"p{p}" for p in range(40, 60)}
    assert len(prompts_that_both_ended(samples())) == 60


def test_an_arm_that_wins_by_the_other_ones_unfinished_texts_alone() -> None:
    judgements = judged("gold", WON) + judged("gold", [1.0] * 60, "rm_ppo", "sft")
    [whole] = [row for row in win_rates(judgements) if row.baseline == "dpo"]
    [row] = where_both_ended(judgements, CUT, ["gold"], seed=3)
    assert whole.win_rate == 0.8 and row["win_rate"] == pytest.approx(0.4) and row["slice"] == BOTH_ENDED
    assert (row["n_judged"], row["n_prompts"]) == (20, 20) and row["ci_low"] < 0.4 < row["ci_high"]
    [alone] = win_rates([j for j in judged("gold", WON)[40:]], seed=3)
    assert (row["ci_low"], row["ci_high"], row["p_value"]) == (alone.ci_low, alone.ci_high, alone.p_value)
    sentence = on_ended_responses(VERDICT, [row])
    assert sentence.startswith(" Where both responses of a pair ended, RM + PPO wins 40.0% (")
    assert sentence.endswith(", on 20 of 60 judged prompts).")


def test_several_judges_are_pooled_as_in_the_verdict() -> None:
    judgements = judged("a", WON) + judged("b", [1.0] * 60) + judged("rm", [1.0] * 60)
    rows = {row["judge"]: row for row in where_both_ended(judgements, CUT, ["a", "b"])}
    assert list(rows) == ["a", "b", "rm", POOLED] and rows[POOLED]["win_rate"] == pytest.approx((0.4 + 1.0) / 2)


def test_without_a_difference_or_without_such_prompts() -> None:
    rows = where_both_ended(judged("gold", WON), samples(), ["gold"])
    assert rows[0]["win_rate"] == 0.8 and on_ended_responses(VERDICT, rows) == ""
    none = where_both_ended(judged("gold", WON), samples(*(("rm_ppo", p) for p in range(60))), ["gold"])
    assert none == []
    assert (
        on_ended_responses(VERDICT, none) == " In no pair on the 60 judged prompts did both arms end their responses."
    )
    assert on_ended_responses({**VERDICT, "judges": {}}, none) == ""  # no judge decided


def test_a_prompt_counts_with_the_pairs_that_both_ended() -> None:
    """Two samples a prompt; DPO's second has no end on every prompt and loses: its first wins throughout."""
    drawn = [
        Sample(f"p{p}", policy, sample_index=k, response=f"{policy} {k}", truncated=(policy, k) == ("dpo", 1))
        for p in range(60)
        for policy in ("rm_ppo", "dpo")
        for k in range(2)
    ]
    judgements = [
        Judgement(
            f"p{p}",
            "rm_ppo",
            "dpo",
            "gold",
            float(k),
            policy_hash=response_hash(f"rm_ppo {k}"),
            baseline_hash=response_hash(f"dpo {k}"),
        )
        for p in range(60)
        for k in range(2)
    ]
    [row] = where_both_ended(judgements, drawn, ["gold"])
    assert (row["win_rate"], row["n_judged"]) == (0.0, 60)
    sentence = on_ended_responses({**VERDICT, "win_rate": 0.5}, [row])
    assert sentence.startswith(" Where both responses of a pair ended, RM + PPO wins 0.0%")
    assert sentence.endswith(", on all 60 judged prompts).")
