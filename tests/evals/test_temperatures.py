"""What is said where the arms change places between two sampling temperatures, and how surely."""

from __future__ import annotations

from typing import Any

from toolkit.evals.temperatures import side_by_side


def entry(temperature: float, rate: float | None, spread: float | None = 0.05, *judges: str) -> dict[str, Any]:
    def row(judge: str, baseline: str, p: float) -> dict[str, Any]:
        known = rate is not None and spread is not None
        bounds = {"ci_low": rate - spread, "ci_high": rate + spread} if known else {"ci_low": None, "ci_high": None}
        return {"policy": "rm_ppo", "baseline": baseline, "judge": judge, "win_rate": rate, "p_value": p, **bounds}

    rows = [row(judge, baseline, p) for judge in judges or ("gold",) for baseline, p in (("dpo", 0.01), ("sft", 0.04))]
    return {"temperature": temperature, "n_prompts": 200, "policies": [], "win_rates": rows}


def test_a_sure_change_of_the_order_is_a_warning() -> None:
    entries, warnings = side_by_side([entry(1.0, 0.58), entry(0.7, 0.41)], 1.0, "gold")
    assert warnings == [
        "at temperature 0.7 DPO is ahead (RM + PPO wins 41.0%, 36.0% to 46.0%), at 1.0 RM + PPO is "
        "(58.0%, 53.0% to 63.0%): the verdict is for 1.0"
    ]
    assert [(e["temperature"], e["verdict"]) for e in entries] == [(0.7, False), (1.0, True)]
    assert [e["order_change"] for e in entries] == [{"sure": True, "sentence": warnings[0]}, None]


def test_an_unsure_change_is_said_and_is_no_warning() -> None:
    for colder, main in ((entry(0.7, 0.48), 0.58), (entry(0.7, 0.41), 0.54), (entry(0.7, 0.41, None), 0.58)):
        entries, warnings = side_by_side([entry(1.0, main), colder], 1.0, "gold")
        assert warnings == [] and entries[0]["order_change"]["sure"] is False
        assert entries[0]["order_change"]["sentence"].endswith(": not both intervals leave out one half")
    assert "(RM + PPO wins 41.0%, no interval)" in entries[0]["order_change"]["sentence"]


def test_the_same_arm_ahead_says_nothing() -> None:
    for rate in (0.7, 0.51, 0.5, None):
        entries, warnings = side_by_side([entry(1.0, 0.58), entry(0.7, rate)], 1.0, "gold")
        assert warnings == [] and all(e["order_change"] is None for e in entries)


def test_two_further_temperatures_may_disagree_where_the_verdict_is_undecided() -> None:
    parts = [entry(1.0, 0.5), entry(0.7, 0.41), entry(1.5, 0.6), entry(2.0, 0.61)]
    entries, warnings = side_by_side(parts, 1.0, "gold")
    assert len(warnings) == 1 and all(e["order_change"] is None for e in entries)
    assert warnings[0].startswith("at temperature 0.7 DPO is ahead") and "at 1.5 RM + PPO is" in warnings[0]
    assert warnings[0].endswith("the verdict is for 1.0")


def test_the_judge_that_decides_is_looked_at() -> None:
    """Judge a changes its mind and b does not: what counts is the judge that decides."""
    main, colder = entry(1.0, 0.58, 0.05, "a", "b"), entry(0.7, 0.41, 0.05, "a")
    colder["win_rates"] += entry(0.7, 0.6, 0.05, "b")["win_rates"]
    assert len(side_by_side([main, colder], 1.0, "a")[1]) == 1
    assert side_by_side([main, colder], 1.0, "b")[1] == side_by_side([main, colder], 1.0, None)[1] == []


def test_holm_corrects_over_all_temperatures() -> None:
    entries, _ = side_by_side([entry(1.0, 0.58), entry(0.7, 0.6)], 1.0, "gold")
    assert [row["holm_p"] for e in entries for row in e["win_rates"]] == [0.04, 0.08, 0.04, 0.08]
