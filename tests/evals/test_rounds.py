"""Rounds side by side: what each number is of, and what a reader is warned of."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.rounds import FreshSamples, round_rows, round_warnings

OPTIONS: BootstrapOptions = {"n_resamples": 200, "confidence": 0.95, "seed": 0}


def policy(name: str, gold: float) -> dict[str, Any]:
    value = {"value": gold, "ci_low": gold - 1, "ci_high": gold + 1}
    fields = dict.fromkeys(("n_samples", "kl_standard_error", "kl_ci_low", "kl_ci_high", "length_tokens", "eos_rate"))
    return {**fields, "policy": name, "gold_reward": value, "explicit_reward": value, "kl_nats": 2 * gold}


def rate(name: str, baseline: str, judge: str, win_rate: float) -> dict[str, Any]:
    fields = ("standard_error", "ci_low", "ci_high", "n_prompts", "n_judged", "n_failed")
    return {**dict.fromkeys(fields), "policy": name, "baseline": baseline, "judge": judge, "win_rate": win_rate}


def labels(judge: str, failed: int = 0) -> dict[str, Any]:
    arm = {"labels": 10, "failed": failed, "tied": 1, "samples": 20, "tokens": 99}
    return {"judge": judge, "arms": {"rm_ppo": arm, "dpo": arm}}


POLICIES = [policy(f"{arm}{at}", gold) for arm in ("rm_ppo", "dpo") for at, gold in (("@round-1", 0.1), ("", 0.3))]
RATES = [
    rate("rm_ppo@round-1", "sft", "gold", 0.6),
    rate("rm_ppo@round-1", "dpo@round-1", "gold", 0.55),
    rate("rm_ppo", "sft", "gold", 0.7),
    rate("rm_ppo", "dpo", "gold", 0.4),
]


def test_a_round_has_its_own_policies_rates_and_labels() -> None:
    # Two prompts: the reward is right about the first one's pair, and wrong about the second one's.
    wrong_once = FreshSamples([(0, 0, 1, 1.0, 1.0), (1, 0, 1, 1.0, 1.0)], [[2.0, 1.0], [1.0, 2.0]])
    right = FreshSamples([(0, 1, 0, 1.0, 1.0)], [[0.0, 1.0]])
    fresh = {2: {"rm_ppo": wrong_once, "dpo": right}}
    first, last = round_rows(POLICIES, RATES, {2: labels("rm:x")}, fresh, OPTIONS)
    assert (first["round"], first["judge"], last["round"], last["judge"]) == (1, None, 2, "rm:x")
    assert first["rm_ppo"]["policy"] == "rm_ppo@round-1" and last["rm_ppo"]["policy"] == "rm_ppo"
    assert (first["rm_ppo"]["kl_nats"], last["dpo"]["kl_nats"]) == (0.2, 0.6)
    assert first["rm_ppo"]["win_rate_over_sft"]["gold"]["win_rate"] == 0.6 and first["dpo"]["win_rate_over_sft"] == {}
    assert first["rm_ppo_over_dpo"]["gold"]["win_rate"] == 0.55 and last["rm_ppo_over_dpo"]["gold"]["win_rate"] == 0.4
    # The samples of round 1 are those that round 2 labels.
    assert first["rm_ppo"]["fresh_accuracy"]["value"] == 0.5 and first["dpo"]["fresh_accuracy"]["value"] == 1.0
    assert last["rm_ppo"]["fresh_accuracy"] is None
    assert first["dpo"]["labels"] is None and first["dpo"]["labels_so_far"] == 0
    assert last["dpo"]["labels"]["labels"] == last["dpo"]["labels_so_far"] == 10
    assert round_rows(POLICIES, RATES, {}, {}, OPTIONS) == []


@pytest.mark.parametrize(
    ("judge", "failed", "judges", "said"),
    [
        ("gold", 0, ["gold"], []),
        ("rm:x", 0, ["gold"], []),
        ("rm:x", 0, ["gold", "rm:x"], ["judge rm:x also labelled"]),
        ("gold", 2, ["gold"], ["2 of 10 labels for RM + PPO failed", "2 of 10 labels for DPO failed"]),
    ],
)
def test_warnings(judge: str, failed: int, judges: list[str], said: list[str]) -> None:
    none = FreshSamples([(0, 1, 0, 1.0, 1.0)], [[0.0, 1.0]])
    fresh = {2: {"rm_ppo": none, "dpo": none}}
    rows = round_rows(POLICIES, RATES, {2: labels(judge, failed)}, fresh, OPTIONS)
    warnings = round_warnings(rows, judges)
    assert len(warnings) == len(said)
    assert all(text.startswith(start) for text, start in zip(warnings, said, strict=True))
