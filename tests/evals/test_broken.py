"""Arms and judges whose numbers say nothing are named, and no verdict rests on them."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.evals.beside_verdict import complete_verdict
from toolkit.evals.broken import (
    broken_arm_warnings,
    broken_arms,
    broken_judge,
    broken_policy,
    constant_reward,
    last_sound_policies,
)
from toolkit.evals.verdict import Judging, verdict

N = 40


def rate_row(judge: str, rate: float) -> dict[str, Any]:
    return {
        **{"policy": "rm_ppo", "baseline": "dpo", "judge": judge, "slice": None, "n_judged": 200, "n_prompts": 200},
        **{"win": rate, "tie": 0.0, "loss": 1 - rate, "win_rate": rate, "p_value": 0.001},
        **{"ci_low": rate - 0.04, "ci_high": rate + 0.04, "detectable_effect": 0.1},
    }


def arm(texts: list[str], *, kl: float = 2.0, ended: float = 0.9, tokens: float = 20.0) -> tuple[Any, list[Any]]:
    row = {"eos_rate": {"value": ended}, "kl_nats": kl, "length_tokens": {"value": tokens}}
    return row, [{"response": text, "kl_nats": kl} for text in texts]


def texts_of(word: str = "text") -> list[str]:
    return [f"a {word} number {k}" for k in range(N)]


def reasons(ppo: tuple[Any, list[Any]], sft: tuple[Any, list[Any]] | None = None) -> dict[str, str]:
    named = {"rm_ppo": ppo, "dpo": arm(texts_of("dpo")), "sft": sft or arm(texts_of("sft"), kl=0.0)}
    rows = [{"policy": name, **row} for name, (row, _) in named.items()]
    return broken_arms(rows, {name: samples for name, (_, samples) in named.items()})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (arm(texts_of(), kl=242.0, ended=0.0), "ends 0% of its responses, and SFT 90%"),
        (arm(texts_of(), kl=242.0), "is 242 nats from SFT, 12.1 nats in each token"),
        (arm(texts_of(), kl=1e29), "is 1e+29 nats from SFT"),
        (arm([""] * N, tokens=1.0), "has collapsed: 100% of its responses are empty"),
        (arm(["Great!"] * (N - 2) + ["a", "b"]), "has collapsed: 95% of its responses are the same text"),
        (arm(["no " * (5 + k) for k in range(N)]), "has collapsed: 100% of its responses are one word over and over"),
        (arm(texts_of("sft"), kl=0.0), "is SFT itself: training has changed none"),
    ],
)
def test_a_broken_arm(broken: Any, said: str) -> None:
    found = reasons(broken)
    assert list(found) == ["rm_ppo"] and found["rm_ppo"].startswith(said)
    (warning,) = broken_arm_warnings(found, {})
    assert (
        warning.startswith(f"RM + PPO {found['rm_ppo']}: no verdict rests on it; ") and "ppo.learning_rate" in warning
    )


def test_arms_that_are_as_they_should_be() -> None:
    assert reasons(arm(texts_of())) == {}
    assert reasons(arm(texts_of(), kl=90.0, tokens=300.0)) == {}  # far, with long responses
    assert reasons(arm(texts_of(), ended=0.0), arm(texts_of("sft"), kl=0.0, ended=0.1)) == {}  # SFT is cut as well
    assert reasons(arm(["yes"] * N), arm(["yes"] * N, kl=0.0)) == {}  # the task asks for it
    assert reasons(arm(["yes"] * 5)) == {}  # too few to say


def test_a_policy_of_a_study_by_its_samples_alone() -> None:
    def samples(texts: list[str], *, kl: float = 2.0, truncated: bool = False) -> list[dict[str, Any]]:
        return [{"response": text, "kl_nats": kl, "truncated": truncated, "n_tokens": 20} for text in texts]

    sft = samples(texts_of("sft"), kl=0.0)
    assert broken_policy(samples(texts_of()), sft) == broken_policy(sft, sft) == ""
    assert broken_policy(samples([""] * N), sft).startswith("has collapsed")
    assert broken_policy(samples(texts_of(), kl=242.0), sft).startswith("is 242 nats from SFT")
    assert broken_policy(samples(texts_of(), truncated=True), sft).startswith("ends 0% of its responses")


def test_the_last_policy_that_is_not_broken() -> None:
    named = {
        "sft": arm(texts_of("sft"), kl=0.0),
        **{"dpo@10": arm(texts_of(), kl=1.5), "dpo@20": arm(texts_of(), kl=2.25), "dpo@30": arm([""] * N)},
        "dpo": arm([""] * N, tokens=1.0),
    }
    rows = [
        {
            **row,
            "policy": name,
            "arm": name[:3],
            "kind": "checkpoint" if "@" in name else "final",
            "step": int(name[4:] or 40),
        }
        for name, (row, _) in named.items()
    ]
    samples = {name: of_policy for name, (_, of_policy) in named.items()}
    sound = last_sound_policies(["dpo"], rows, samples)
    assert {arm: row["policy"] for arm, row in sound.items()} == {"dpo": "dpo@20"}
    (warning,) = broken_arm_warnings({"dpo": "has collapsed"}, sound)
    assert warning == (
        "DPO has collapsed: no verdict rests on it; lower dpo.learning_rate or raise dpo.beta "
        "(DPO, step 20, at 2.25 nats, is the last one that is not broken)"
    )
    assert last_sound_policies(["dpo"], [row for row in rows if row["kind"] == "final"], samples) == {}


def test_a_constant_reward() -> None:
    assert constant_reward([0.25] * N).startswith("was trained on a constant")
    assert constant_reward([0.25] * (N - 1) + [0.26]) == constant_reward([0.25] * 3) == constant_reward([]) == ""


@pytest.mark.parametrize(
    ("preferences", "n_equal", "said"),
    [
        ([None] * 21 + [1.0] * 19, 0, "a judge that failed in 21 of 40 comparisons of the arms"),
        ([0.5] * N, 0, "a judge that calls all 40 comparisons of the arms a tie"),
        ([0.5] * 30 + [None] * 10, 0, "a judge that calls all 30 comparisons of the arms a tie"),
        ([0.5] * N, N, ""),  # the arms wrote the same texts
        ([0.5] * (N - 1) + [1.0], 0, ""),
        ([None] * 20 + [1.0] * 20, 0, ""),
        ([0.5] * 5, 0, ""),
    ],
)
def test_a_broken_judge(preferences: list[float | None], n_equal: int, said: str) -> None:
    assert broken_judge(preferences, n_equal) == said


def test_no_verdict_rests_on_them() -> None:
    assert verdict([rate_row("gold", 0.7)])["winner"] == "rm_ppo"
    result = {
        "verdict": verdict([rate_row("gold", 0.2)], Judging(broken_arms={"rm_ppo": "is 242 nats from SFT"})),
        "hacking": {},
    }
    complete_verdict(result, [], Judging())
    said = result["verdict"]
    assert (said["winner"], said["finding"], said["doubt"]) == ("undecided", "undecided", "broken arm")
    assert "; RM + PPO is 242 nats from SFT." in said["sentence"] and said["next_step"].startswith(
        "Train RM + PPO again"
    )
    assert said["broken_arms"] == {"rm_ppo": "is 242 nats from SFT"}
    refused = {"a": "a judge that calls all 40 comparisons of the arms a tie"}
    alone = verdict([rate_row("a", 0.7)], Judging(broken_judges=refused, broken_arms={"dpo": "has collapsed"}))
    assert alone["broken_arms"] == {"dpo": "has collapsed"} and alone["sentence"].endswith(" DPO has collapsed.")
    assert alone["winner"] == "undecided" and "no judge that can decide" in alone["reason"]
    assert "calls all 40" in alone["sentence"]
    beside = verdict([rate_row("a", 0.7), rate_row("b", 0.3)], Judging(broken_judges=refused))
    assert beside["winner"] == "dpo" and list(beside["judges"]) == ["b"]
