"""The gap between the arms as a sum of steps along the controls: exact sums, known truths, what is there or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from support.study_tables import columns, equal_arms, study_rows

from toolkit.evals.study.comparing import win_shares
from toolkit.evals.study.controls import score_step, steps, win_rate_step
from toolkit.evals.study.study import study
from toolkit.evals.study.table import study_data

TRUTH = {"dpo": 0.0, "online_dpo": 0.2, "rloo": 0.5, "rm_ppo": 0.6, "more_prompts": 0.65, "online_dpo_gold": 0.4}
TRUTH |= {"sft": -0.5, "length_only": 0.1}


def studied(*controls: str, **options: Any) -> dict[str, Any]:
    def mean(arm: str, setting: int, checkpoint: int) -> float:
        return equal_arms(arm, setting, checkpoint) + TRUTH.get(arm, 0.0)

    rows = list(study_rows(mean, arms=("rm_ppo", "dpo", *controls), **options))
    return study(study_data(columns(rows)))


def named(document: dict[str, Any], measure: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["from"], row["to"]): row for row in document["gap"] if row["measure"] == measure}


def test_the_steps_add_up_to_the_gap_of_the_verdict() -> None:
    document = studied(*(arm for arm in TRUTH if arm not in ("rm_ppo", "dpo")))
    for measure in ("win_rate", "score"):
        rows = named(document, measure)
        way = [rows["dpo", "online_dpo"], rows["online_dpo", "rloo"], rows["rloo", "rm_ppo"]]
        assert {row["kind"] for row in way} == {"step"} and rows["dpo", "rm_ppo"]["kind"] == "total"
        assert sum(row["difference"] for row in way) == pytest.approx(rows["dpo", "rm_ppo"]["difference"])
        length = [rows[pair]["difference"] for pair in (("sft", "length_only"), ("length_only", "rm_ppo"))]
        assert sum(length) == pytest.approx(rows["sft", "rm_ppo"]["difference"])
        gold = [rows[pair]["difference"] for pair in (("dpo", "online_dpo"), ("online_dpo", "online_dpo_gold"))]
        assert sum(gold) == pytest.approx(rows["dpo", "online_dpo_gold"]["difference"])
    best, total = document["verdict"]["best"], named(document, "win_rate")["dpo", "rm_ppo"]
    assert total["difference"] == pytest.approx(best["win_rate"] - 0.5)
    assert total["ci_low"] == pytest.approx(best["ci_low"] - 0.5) and total["n_prompts"] == 40
    assert total["probability"] == pytest.approx(best["probability"])
    chosen = document["chosen"]
    by_score = chosen["rm_ppo"]["test_score"]["score"] - chosen["dpo"]["test_score"]["score"]
    assert named(document, "score")["dpo", "rm_ppo"]["difference"] == pytest.approx(by_score)


def test_steps_are_those_of_the_controls_that_are_there() -> None:
    assert studied("something_else")["gap"] == [] and studied()["gap"] == []
    rows = named(studied("rloo"), "score")
    assert list(rows) == [("dpo", "rm_ppo"), ("dpo", "rloo"), ("rloo", "rm_ppo")]
    assert rows["rloo", "rm_ppo"]["what"] == "the critic"
    assert rows["dpo", "rloo"]["what"].startswith("on-policy data and the reward model; reinforcement learning")
    assert [(step.kind, step.first, step.second) for step in steps(["dpo", "rm_ppo", "length_only"])] == [
        ("beside", "length_only", "rm_ppo")
    ]
    assert [(step.kind, step.first, step.second) for step in steps(["dpo", "rm_ppo", "more_prompts"])] == [
        ("beside", "rm_ppo", "more_prompts")
    ]


def test_one_seed_has_no_intervals_and_several_judges_have_rows_each() -> None:
    for row in studied("rloo", seeds=1)["gap"]:
        assert row["ci_low"] is None and row["probability"] is None and np.isfinite(row["difference"])
    rows = list(study_rows(arms=("rm_ppo", "dpo", "rloo")))
    both = [{**row, "judge": "a"} for row in rows] + [{**row, "judge": "b", "score": 9 * row["score"]} for row in rows]
    gap = study(study_data(columns(both)))["gap"]
    assert [row["judge"] for row in gap if row["to"] == "rm_ppo" and row["from"] == "dpo"] == [None, "a", "b"]
    by_judge = [row["difference"] for row in gap if row["kind"] == "total" and row["measure"] == "score"]
    assert by_judge[1] == pytest.approx(9 * by_judge[0])


@pytest.mark.parity
@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.05), (3, 0.3), (5, 0.15)])
def test_intervals_of_the_steps_cover_the_truth(seeds: int, seed_sd: float) -> None:
    """800 studies: a coverage of 95% has a standard deviation of 0.8%."""
    rng, n, names = np.random.default_rng(seeds), 100, ("dpo", "online_dpo", "rloo", "rm_ppo")
    spread = np.sqrt(2 * (1 + 0.4**2 + seed_sd**2))
    win_rate = {name: float(norm.cdf(TRUTH[name] / spread)) for name in names}
    inside: dict[tuple[str, str, str], int] = {}
    for _ in range(800):
        by_prompt = rng.normal(size=n)
        scores = {
            name: TRUTH[name]
            + seed_sd * rng.normal(size=(seeds, 1))
            + by_prompt
            + 0.4 * rng.normal(size=n)
            + rng.normal(size=(seeds, n))
            for name in names
        }
        wins = {
            name: None if name == "dpo" else win_shares(scores[name][None, None], scores["dpo"][None, None])[0, 0]
            for name in names
        }
        for first, second in (*zip(names, names[1:], strict=False), ("dpo", "rm_ppo")):
            for measure, mean, truth in (
                ("score", score_step(scores[first], scores[second]), TRUTH[second] - TRUTH[first]),
                ("win_rate", win_rate_step(wins[first], wins[second]), win_rate[second] - win_rate[first]),
            ):
                low, high = mean.interval()
                key = (measure, first, second)
                inside[key] = inside.get(key, 0) + (low <= truth <= high)
    assert {key: count / 800 for key, count in inside.items() if not 0.92 <= count / 800 <= 0.98} == {}
